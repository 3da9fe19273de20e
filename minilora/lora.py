"""LoRA (arXiv:2106.09685): a frozen linear layer plus a product of two small matrices, W = W0 + (alpha/r) B A."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import ConfigError


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` and its low-rank update: y = x W0^T + b + scale * dropout(x) A^T B^T.

    lora_A: (rank, in), Kaiming-uniform; lora_B: (out, rank), zero, so that training starts at W0 exactly
    (paper, section 4.1); both fp32 whatever the base is. scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    def __init__(
        self, base_layer: nn.Linear, rank: int, alpha: int, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        device = base_layer.weight.device
        dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        A = torch.empty(rank, base_layer.in_features, dtype=dtype)  # drawn on the CPU: the same on every device
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)).to(device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, dtype=dtype, device=device))
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = dropout
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)"""
        if not self.enabled:
            return self.base_layer(x)
        dropout = self.dropout if self.training else 0.0
        if not torch.is_grad_enabled() and not dropout:
            return self._answer(x)
        return lora_linear(
            x, self.base_layer.weight, self.base_layer.bias, self.lora_A, self.lora_B, self.scale, dropout
        )

    def _answer(self, x: Tensor) -> Tensor:
        """`lora_linear` to the bit, without what autograd costs: for a single token, a quarter of the layer's time."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = self.base_layer.weight, self.base_layer.bias
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        z = (flat @ self.lora_A.to(x.dtype).T).mul_(self.scale)  # (tokens, rank)
        y = F.linear(flat, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
        return y.addmm_(z, self.lora_B.to(x.dtype).T).view(*x.shape[:-1], -1)

    def delta(self) -> Tensor:
        """The update of the weight, scale * B A. (out, in)"""
        return self.scale * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """What print(model) shows of this layer."""
        return f"rank={len(self.lora_A)}, scale={self.scale:g}, dropout={self.dropout}"


def plain_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> Tensor:
    """The formula itself, the oracle of `lora_linear`."""
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(F.dropout(x, dropout), lora_A), lora_B)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> Tensor:
    """`plain_lora_linear` with a hand-written backward: saves x, the mask and a rank-wide product, no copy in fp32.

    x: (..., in), weight: (out, in), bias: (out,), lora_A: (rank, in), lora_B: (out, rank) -> (..., out)
    """
    return _lora_linears(x, scale, dropout, [(weight, bias, lora_A, lora_B)])[0]


def project(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """What layers that read the same x make of it. (..., in) -> (..., out) of each

    LoRA layers of one kind are computed together, under one dropout mask, where each alone would draw its own: each
    sees the same distribution, and x is masked, met with A and given its gradient once.
    """
    if not all(isinstance(layer, LoRALinear) and layer.enabled for layer in layers):
        return [layer(x) for layer in layers]
    loras = [layer for layer in layers if isinstance(layer, LoRALinear)]
    kinds = {(layer.scale, layer.dropout if layer.training else 0.0) for layer in loras}
    if len(kinds) > 1:
        return [layer(x) for layer in layers]
    ((scale, dropout),) = kinds
    weights = [(each.base_layer.weight, each.base_layer.bias, each.lora_A, each.lora_B) for each in loras]
    return _lora_linears(x, scale, dropout, weights)


Weights = tuple[Tensor, Tensor | None, Tensor, Tensor]  # W (out, in), b (out,), A (rank, in), B (out, rank)


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


def draw_dropped(x: Tensor, dropout: float) -> Tensor:
    """Which elements of x a dropout zeroes: a mask of x's shape, or on the CPU their flat positions when they are few.

    There the gaps between dropped elements are drawn, from their geometric distribution: the same Bernoulli process
    with one draw for each element that is dropped instead of one for each element.
    """
    if x.is_cuda or dropout > 1 / torch.int64.itemsize:  # a position takes 8 bytes, an element of a mask one
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(dropout)
    size, positions = x.numel(), torch.zeros(0, dtype=torch.int64)
    while (last := int(positions[-1]) if len(positions) else -1) < size:
        count = int(size * dropout + 6 * math.sqrt(size * dropout)) + 1
        gaps = torch.rand(count, dtype=torch.float64).neg_().log1p_().div_(math.log1p(-dropout)).floor_().add_(1)
        positions = torch.cat([positions, gaps.cumsum_(0).to(torch.int64).add_(last)])
    return positions[: int(torch.searchsorted(positions, size))]


def zeroed(x: Tensor, dropped: Tensor | None) -> Tensor:
    """A copy of x without the dropped elements (x itself when there are none)."""
    return x if dropped is None else zero_(x.clone(memory_format=torch.contiguous_format), dropped)


def zero_(x: Tensor, dropped: Tensor) -> Tensor:
    """Set the dropped elements of x, as `draw_dropped` names them, to zero."""
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped, 0)
    x.view(-1).index_fill_(0, dropped, 0)
    return x


def inject(
    model: nn.Module,
    target_modules: Sequence[str],
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Freeze the model and put a LoRALinear around each linear layer whose last name segment is in target_modules.

    Returns their names. A is drawn from `seed`, whatever was drawn before. Raises ConfigError that lists the model's
    linear layers when a target matches none.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None  # the loss reads its weight: it is no layer to adapt
    modules = dict(model.named_modules())
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    last = Counter(name.rpartition(".")[2] for name in linears)
    if unmatched := [target for target in target_modules if target not in last]:
        raise ConfigError(
            f"target_modules {unmatched} match nothing; this model's linear layers end in "
            + ", ".join(f"{name} ({count})" for name, count in last.items())
        )
    model.requires_grad_(False)
    chosen = [name for name in linears if name.rpartition(".")[2] in target_modules]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in chosen:
            parent, _, child = name.rpartition(".")
            wrapped = LoRALinear(linears[name], rank, alpha, dropout, rslora)
            setattr(model.get_submodule(parent), child, wrapped)
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base does."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
