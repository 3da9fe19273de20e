r"""LoRA (arXiv:2106.09685): a frozen linear layer plus a product of two small matrices, W = W0 + (alpha/r) B A.

            x (tokens, in)
           /              \
     W0 (out, in)     A (rank, in)        W0 is frozen, A and B are trained
          |                |
          |           B (out, rank)       rank is small: 8 where in and out are 896
           \              /
    y = x W0^T + b  +  scale * dropout(x) A^T B^T

The order of this file: the plain formula, the layer, the formula with a backward pass by hand, and `inject`, which puts
layers into a model.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.kernels import draw_dropped, first_derivative_only, zero_, zeroed
from minilora.lora_variants import dora_linear, weight_norm


def is_quantised(layer: nn.Linear) -> bool:
    """Whether a layer's weight is held in 4 or 8 bits."""
    return not layer.weight.is_floating_point()


Weights = tuple[Tensor, Tensor | None, Tensor, Tensor]  # W (out, in), b (out,), A (rank, in), B (out, rank)


def plain_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> Tensor:
    """The formula itself; `lora_linear` is tested against it."""
    return F.linear(x, weight, bias) + plain_update(x, lora_A, lora_B, scale, dropout)


def plain_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """What the low-rank path adds. x: (..., in) -> (..., out)"""
    return scale * F.linear(F.linear(F.dropout(x, dropout), lora_A.to(x.dtype)), lora_B.to(x.dtype))


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` and its low-rank update: y = x W0^T + b + scale * dropout(x) A^T B^T.

    lora_A: (rank, in), Kaiming-uniform; lora_B: (out, rank), zero, so that training starts at W0 exactly
    (paper, section 4.1); both fp32 whatever the base is. scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    DoRA adds lora_magnitude_vector: (out,), which starts as the norms of W0's rows; see `dora_linear`.
    """

    lora_magnitude_vector: nn.Parameter | None
    lora_A0: Tensor | None  # PiSSA's start, frozen: see `weights`
    lora_B0: Tensor | None

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        alpha: int,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        device = base_layer.weight.device
        dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        A = torch.empty(rank, base_layer.in_features, dtype=dtype)  # drawn on the CPU: the same on every device
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)).to(device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, dtype=dtype, device=device))
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        norms = weight_norm(base_layer.weight, self.lora_A, self.lora_B, self.scale) if dora else None
        self.lora_magnitude_vector = None if norms is None else nn.Parameter(norms)
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)
        self.dropout = dropout
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)"""
        if not self.enabled:
            return self.base_layer(x)
        dropout = self.dropout if self.training else 0.0
        if is_quantised(self.base_layer):  # it multiplies by what it holds, and carries the gradient back through that
            return self.base_layer(x) + plain_update(x, self.lora_A, self.lora_B, self.scale, dropout)
        if self.lora_magnitude_vector is not None:
            return dora_linear(x, *self.weights(), self.lora_magnitude_vector, self.scale, dropout)
        if not torch.is_grad_enabled() and not dropout:
            return self._without_autograd(x)
        return lora_linear(x, *self.weights(), self.scale, dropout)

    def weights(self) -> Weights:
        """W0, b, and an A and a B whose product is the update: those that are trained.

        From PiSSA's start (A0, B0) the update is B A - B0 A0 = B (A - A0) + (B - B0) A0, a product of rank 2r: exactly
        zero at the start, without a rounded residual of W0, and good in bf16, where a difference of products is not.
        """
        base, A, B, A0, B0 = self.base_layer, self.lora_A, self.lora_B, self.lora_A0, self.lora_B0
        if A0 is None or B0 is None:
            return base.weight, base.bias, A, B
        return base.weight, base.bias, torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1)

    def _without_autograd(self, x: Tensor) -> Tensor:
        """`lora_linear` without autograd, equal bit for bit; it saves a quarter of the time of a single token."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias, A, B = self.weights()
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        z = (flat @ A.to(x.dtype).T).mul_(self.scale)  # (tokens, rank)
        y = F.linear(flat, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
        return y.addmm_(z, B.to(x.dtype).T).view(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        """The update of the weight: scale * B A, and what DoRA's magnitudes make of the sum. (out, in)"""
        weight, _, A, B = self.weights()
        update = self.scale * (B @ A)
        if self.lora_magnitude_vector is None:
            return update
        gain = self.lora_magnitude_vector / weight_norm(weight, A, B, self.scale)
        return gain[:, None] * (weight + update) - weight

    def extra_repr(self) -> str:
        """What print(model) shows of this layer."""
        return f"rank={len(self.lora_A)}, scale={self.scale:g}, dropout={self.dropout}"


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> Tensor:
    """`plain_lora_linear` with a hand-written backward: saves x, the mask and a rank-wide product, no copy in fp32.

    x: (..., in), weight: (out, in), bias: (out,), lora_A: (rank, in), lora_B: (out, rank) -> (..., out)
    """
    return _lora_linears(x, scale, dropout, [(weight, bias, lora_A, lora_B)])[0]


def linear(x: Tensor, layer: nn.Module, policy: Any = None) -> Tensor:
    return project(x, (layer,), policy)[0]


def project(x: Tensor, layers: Sequence[nn.Module], policy: Any = None) -> Sequence[Tensor]:
    """The outputs of layers that read the same x. (..., in) -> (..., out) of each

    LoRA layers of one kind are computed together, under one dropout mask, where each alone would draw its own. Each
    sees the same distribution; x is masked once, multiplied by A once, and gets its gradient once.
    """
    if not all(isinstance(layer, LoRALinear) and layer.enabled for layer in layers):
        return [layer(x) for layer in layers]
    loras = [layer for layer in layers if isinstance(layer, LoRALinear)]
    kinds = {(layer.scale, layer.dropout if layer.training else 0.0) for layer in loras}
    plain = any(layer.lora_magnitude_vector is not None or is_quantised(layer.base_layer) for layer in loras)
    if plain or len(kinds) > 1:
        return [layer(x) for layer in layers]
    ((scale, dropout),) = kinds
    return _lora_linears(x, scale, dropout, [layer.weights() for layer in loras])


def _lora_linears(x: Tensor, scale: float, dropout: float, weights: Sequence[Weights]) -> tuple[Tensor, ...]:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _LoRALinears.apply(x, scale, dropout, *itertools.chain(*weights))


class _LoRALinears(torch.autograd.Function):
    """For each layer y = x W^T + b + z B^T, with its columns of z = scale * dropout(x) A^T; A is that of all layers.

    Then dB = dy^T z, dz = scale * dy B, dA = dz^T dropout(x), dx = sum of dy W + dropout'(dz A).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, dropout: float, *weights: Any) -> tuple[Tensor, ...]:
        Ws, biases, As, Bs = (weights[i::4] for i in range(4))
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        A = _together(As, x.dtype)  # (ranks, in)
        dropped = draw_dropped(flat, dropout) if dropout else None
        ctx.scale = scale / (1 - dropout)  # dropout's own factor is folded into the scale
        z = (zeroed(flat, dropped) @ A.T).mul_(ctx.scale)  # (tokens, ranks)
        outputs = []
        for W, bias, B, z_own in zip(Ws, biases, Bs, z.split([len(A) for A in As], 1), strict=True):
            y = F.linear(flat, W.to(x.dtype), bias if bias is None else bias.to(x.dtype))
            y.addmm_(z_own, B.to(x.dtype).T)  # into the base product: no second (tokens, out) buffer
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, dropped, z, *Ws, *As, *Bs)
        return tuple(outputs)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        flat, dropped, z, *saved = ctx.saved_tensors
        count = len(grad_outputs)
        Ws, As, Bs = saved[:count], saved[count : 2 * count], saved[2 * count :]
        ranks = [len(A) for A in As]
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grad_outputs]  # (tokens, out) of each
        d_Bs = [(dy.T @ z_own).to(B.dtype) for dy, z_own, B in zip(dys, z.split(ranks, 1), Bs, strict=True)]
        dz = _together([dy @ B.to(dy.dtype) for dy, B in zip(dys, Bs, strict=True)], flat.dtype, 1).mul_(ctx.scale)
        d_A = dz.T @ zeroed(flat, dropped)  # (ranks, in)
        d_As = [part.to(A.dtype) for part, A in zip(d_A.split(ranks), As, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dys[0] @ Ws[0].to(flat.dtype)  # (tokens, in)
            for dy, W in zip(dys[1:], Ws[1:], strict=True):
                dx.addmm_(dy, W.to(flat.dtype))
            A = _together(As, flat.dtype)
            if dropped is None:
                dx.addmm_(dz, A)
            else:
                dx.add_(zero_(dz @ A, dropped))
            dx = dx.view(*grad_outputs[0].shape[:-1], -1)
        own = (gradient for d_A, d_B in zip(d_As, d_Bs, strict=True) for gradient in (None, None, d_A, d_B))
        return dx, None, None, *own


def _together(parts: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)).to(dtype)


def inject(
    model: nn.Module,
    target_modules: Sequence[str],
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
    dora: bool = False,
) -> list[str]:
    """Freeze the model and put a LoRALinear around each linear layer whose last name segment is in target_modules.

    Returns their names. A is drawn from `seed`, whatever was drawn before. Raises ConfigError that lists the model's
    linear layers when a target matches none.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None  # the loss reads its weight: it is no layer to adapt
    modules = dict(model.named_modules())
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    last = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    if unmatched := [target for target in target_modules if target not in last]:
        raise ConfigError(
            f"target_modules {unmatched} match nothing; this model's linear layers end in " + ", ".join(last)
        )
    model.requires_grad_(False)
    chosen = [name for name in linears if name.rpartition(".")[2] in target_modules]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in chosen:
            parent, _, child = name.rpartition(".")
            wrapped = LoRALinear(linears[name], rank, alpha, dropout, rslora, dora)
            setattr(model.get_submodule(parent), child, wrapped)
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
