r"""LoRA (arXiv:2106.09685): a frozen linear layer plus a product of two small matrices, W = W0 + (alpha/r) B A.

            x (tokens, in)
           /              \
     W0 (out, in)     A (rank, in)        W0 is frozen, A and B are trained
          |                |
          |           B (out, rank)       rank is small: 8 where in and out are 896
           \              /
    y = x W0^T + b  +  scale * dropout(x) A^T B^T

The order of this file: the plain formula, the layer, the formula with a backward pass by hand, `project`, which
computes layers that read the same x, and `inject`, which puts layers into a model.
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
from minilora.kernels import Policy, first_derivative_only, zero_, zeroed
from minilora.lora_variants import DoRA, LoRA, plain_update
from minilora.matmul import as_autocast, frozen_linears, products, products_backward


def is_quantised(layer: nn.Linear) -> bool:
    """Whether a layer's weight is held in 4 or 8 bits."""
    return not layer.weight.is_floating_point()


Weights = tuple[Tensor, Tensor | None, Tensor, Tensor]  # W (out, in), b (out,), A (rank, in), B (out, rank)


def plain_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> Tensor:
    """The formula itself; `lora_linear` is tested against it."""
    return F.linear(x, weight, bias) + plain_update(x, lora_A, lora_B, scale, dropout)


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` and its low-rank update: y = x W0^T + b + scale * dropout(x) A^T B^T.

    lora_A: (rank, in), Kaiming-uniform; lora_B: (out, rank), zero, so that training starts at W0 exactly
    (paper, section 4.1); both fp32 whatever the base is. scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    variant: what is computed with them. The layer holds the variant's own tensors: see `lora_variants`.
    """

    variant: LoRA
    lora_magnitude_vector: nn.Parameter  # of DoRA, (out,); otherwise None
    lora_A0: Tensor  # of PiSSA, (rank, in); otherwise None
    lora_B0: Tensor  # of PiSSA, (out, rank); otherwise None

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
        self.register_parameter("lora_magnitude_vector", None)
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)
        self.variant = DoRA() if dora else LoRA()
        self.variant.initialise(self)
        self.dropout = dropout
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)"""
        return linear(x, self, Policy(x.device.type))

    def weights(self) -> Weights:
        """W0, b, and an A and a B whose product is the update: see `LoRA.pair`."""
        base = self.base_layer
        return base.weight, base.bias, *self.variant.pair(self)

    def delta(self) -> Tensor:
        """The merged weight minus W0. (out, in)"""
        return self.variant.delta(self)

    @property
    def current_dropout(self) -> float:
        """The dropout of the layer in its mode. It is 0 outside training."""
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        """What print(model) shows of this layer."""
        return f"rank={len(self.lora_A)}, scale={self.scale:g}, dropout={self.dropout}"


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> Tensor:
    """`plain_lora_linear` with a hand-written backward: saves x, the mask and a rank-wide product, no copy in fp32.

    x: (..., in), weight: (out, in), bias: (out,), lora_A: (rank, in), lora_B: (out, rank) -> (..., out)
    """
    weights = [(weight, bias, lora_A, lora_B)]
    return _lora_linears(x, scale, dropout, Policy(x.device.type), weights)[0]


def linear(x: Tensor, layer: nn.Module, policy: Policy) -> Tensor:
    """The output of any linear layer of a model. (..., in) -> (..., out)"""
    return project(x, (layer,), policy)[0]


def project(x: Tensor, layers: Sequence[nn.Module], policy: Policy) -> Sequence[Tensor]:
    """The outputs of any linear layers that read the same x. (..., in) -> (..., out) of each

    LoRA layers of one kind are computed together, under one dropout mask, where each alone would draw its own. Each
    sees the same distribution; x is masked once, multiplied by A once, and gets its gradient once. Frozen layers are
    computed together, too. Other layers, and layers of several kinds, are computed one by one.
    """
    loras = [layer for layer in layers if isinstance(layer, LoRALinear) and _has_product(layer)]
    kinds = {(layer.scale, layer.current_dropout) for layer in loras}
    if len(loras) == len(layers) and len(kinds) == 1:
        ((scale, dropout),) = kinds
        return _lora_linears(x, scale, dropout, policy, [layer.weights() for layer in loras])
    bases = [_base(layer) for layer in layers]
    if all(_is_frozen(base) for base in bases):
        return frozen_linears(x, [(base.weight, base.bias) for base in bases if isinstance(base, nn.Linear)])
    if len(layers) > 1:
        return [linear(x, layer, policy) for layer in layers]
    ((layer, base),) = zip(layers, bases, strict=True)
    if isinstance(layer, LoRALinear) and layer.enabled:
        return [layer.variant.forward(layer, x, layer.current_dropout)]
    return [base(x)]


def _has_product(layer: LoRALinear) -> bool:
    return layer.enabled and not layer.variant.alone and not is_quantised(layer.base_layer)


def _base(layer: nn.Module) -> nn.Module:
    """What is computed of a layer without its update: the base of a disabled LoRALinear, otherwise the layer itself."""
    return layer.base_layer if isinstance(layer, LoRALinear) and not layer.enabled else layer


def _is_frozen(layer: nn.Module) -> bool:
    """Whether a layer is a floating-point `nn.Linear` that is not trained."""
    if type(layer) is not nn.Linear or is_quantised(layer):
        return False
    return not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)


def _lora_linears(
    x: Tensor, scale: float, dropout: float, policy: Policy, weights: Sequence[Weights]
) -> tuple[Tensor, ...]:
    x = as_autocast(x)
    if not torch.is_grad_enabled():  # autograd's part is a quarter of the time of a single token
        return _outputs(x, scale, dropout, policy, weights)[0]
    return _LoRALinears.apply(x, scale, dropout, policy, *itertools.chain(*weights))


def _outputs(
    x: Tensor, scale: float, dropout: float, policy: Policy, weights: Sequence[Weights]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None, Tensor]:
    """The outputs, and what the backward pass needs: x as (tokens, in), its dropped elements, and z (tokens, ranks)."""
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    As = [A for _, _, A, _ in weights]
    dropped = policy.draw(flat, dropout) if dropout else None
    z = (zeroed(flat, dropped) @ _together(As, x.dtype).T).mul_(scale / (1 - dropout))  # (tokens, ranks)
    ys = products(flat, [(W, bias) for W, bias, _, _ in weights])  # (tokens, out) of each
    z_owns = [z] if len(As) == 1 else z.split([len(A) for A in As], 1)  # one operation less for a single layer
    for y, (_, _, _, B), z_own in zip(ys, weights, z_owns, strict=True):
        y.addmm_(z_own, B.to(x.dtype).T)  # into the base product: no second (tokens, out) buffer
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys), flat, dropped, z


class _LoRALinears(torch.autograd.Function):
    """For each layer y = x W^T + b + z B^T, with its columns of z = scale * dropout(x) A^T; A is that of all layers.

    Then dB = dy^T z, dz = scale * dy B, dA = dz^T dropout(x), dx = sum of dy W + dropout'(dz A).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, dropout: float, policy: Policy, *weights: Any) -> tuple[Tensor, ...]:
        Ws, biases, As, Bs = (weights[i::4] for i in range(4))
        outputs, *saved = _outputs(x, scale, dropout, policy, list(zip(Ws, biases, As, Bs, strict=True)))
        ctx.scale = scale / (1 - dropout)  # dropout's own factor is folded into the scale
        ctx.weights = Ws
        ctx.save_for_backward(*saved, *As, *Bs)
        return outputs

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        flat, dropped, z, *saved = ctx.saved_tensors
        count = len(grad_outputs)
        As, Bs = saved[:count], saved[count:]
        ranks = [len(A) for A in As]
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grad_outputs]  # (tokens, out) of each
        d_Bs = [(dy.T @ z_own).to(B.dtype) for dy, z_own, B in zip(dys, z.split(ranks, 1), Bs, strict=True)]
        dz = _together([dy @ B.to(dy.dtype) for dy, B in zip(dys, Bs, strict=True)], flat.dtype, 1).mul_(ctx.scale)
        d_A = dz.T @ zeroed(flat, dropped)  # (ranks, in)
        d_As = [part.to(A.dtype) for part, A in zip(d_A.split(ranks), As, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = products_backward(dys, ctx.weights)  # (tokens, in)
            A = _together(As, flat.dtype)
            if dropped is None:
                dx.addmm_(dz, A)
            else:
                dx.add_(zero_(dz @ A, dropped))
            dx = dx.view(*grad_outputs[0].shape[:-1], dx.shape[-1])
        own = (gradient for d_A, d_B in zip(d_As, d_Bs, strict=True) for gradient in (None, None, d_A, d_B))
        return dx, None, None, None, *own


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
