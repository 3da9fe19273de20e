"""Computes RMSNorm, SwiGLU, rotary embedding and dropout, with backward passes written by hand."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]  # eager | compiled


def draw_dropped(x: Tensor, dropout: float) -> Tensor:
    """Draw the elements of x that dropout sets to zero.

    Returns a mask of x's shape. On the CPU, if few elements are dropped, returns their flat positions. In that case the
    gaps between dropped elements are drawn from a geometric distribution. This is the same Bernoulli process, but it
    needs one draw for each dropped element instead of one for each element.
    """
    if x.is_cuda or dropout > 1 / torch.int64.itemsize:  # a position needs 8 bytes, an element of a mask needs one
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(dropout)
    size, positions = x.numel(), torch.zeros(0, dtype=torch.int64)
    while (last := int(positions[-1]) if len(positions) else -1) < size:
        count = int(size * dropout + 6 * math.sqrt(size * dropout)) + 1
        gaps = torch.rand(count, dtype=torch.float64).neg_().log1p_().div_(math.log1p(-dropout)).floor_().add_(1)
        positions = torch.cat([positions, gaps.cumsum_(0).to(torch.int64).add_(last)])
    return positions[: int(torch.searchsorted(positions, size))]


def zeroed(x: Tensor, dropped: Tensor | None) -> Tensor:
    """A copy of x with the dropped elements set to zero. If `dropped` is None, returns x itself."""
    return x if dropped is None else zero_(x.clone(memory_format=torch.contiguous_format), dropped)


def zero_(x: Tensor, dropped: Tensor) -> Tensor:
    """Set the dropped elements of x to zero in place. `dropped` is a result of `draw_dropped`."""
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped, 0)
    x.view(-1).index_fill_(0, dropped, 0)
    return x


def first_derivative_only(backward: Function) -> Function:
    """Make a backward pass raise RuntimeError if a second derivative is asked for (create_graph=True).

    A backward pass written by hand is not differentiable: without this check, autograd would give a wrong second
    derivative and no error.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "minilora's backward passes give first derivatives only, and create_graph=True asks for second "
                "derivatives. Use the plain formulas for them (plain_lora_linear, plain_nats, plain_attention)."
            )
        return backward(ctx, *grad_outputs)

    return checked


def eager(function: Function) -> Function:
    """The function itself, which runs operation by operation."""
    return function


@functools.cache
def compiled(function: Function) -> Function:
    """The function compiled to one kernel for any number of tokens. It does not round intermediate results."""
    return torch.compile(function, dynamic=True)


@dataclass(frozen=True)
class Policy:
    """How the kernels of a step run. The decoder hands it down; the prediction of memory has one of its own.

    device_type: cpu | cuda, the kind of device whose code runs
    wrap: eager or compiled, for the elementwise chains
    draw: draws what dropout sets to zero
    """

    device_type: str
    wrap: Wrap = eager
    draw: Callable[[Tensor, float], Tensor] = draw_dropped

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * (x / rms(x)). (..., hidden) -> (..., hidden)"""
        return _RMSNorm.apply(x, weight, eps, self.wrap)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up. (..., ffn), (..., ffn) -> (..., ffn)"""
        return _SwiGLU.apply(gate, up, self.wrap)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary position embedding. x: (T, heads, head_dim), cos and sin: (T, head_dim) -> (T, heads, head_dim)"""
        return _Rotary.apply(x, cos, sin, self.wrap)


class _RMSNorm(torch.autograd.Function):
    """weight * (x / rms(x)), as Qwen2RMSNorm computes it.

    It saves x and one fp32 number for each row, but no fp32 tensor of x's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, wrap: Wrap) -> Tensor:
        out, rstd = wrap(_norm)(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.wrap = wrap
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weight = ctx.wrap(_norm_backward)(*grad_outputs, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return d_x, d_weight, None, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (..., hidden) -> (the normalised x: (..., hidden), 1 / rms(x): (..., 1))"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * rstd).to(x.dtype) * weight, rstd


def _norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    unit = x * rstd  # in fp32, as rstd is
    d_weight = (dy * unit.to(x.dtype)).flatten(0, -2).sum(0) if needs_weight else None
    wide = (dy * weight).to(rstd.dtype)
    wide = wide.addcmul(unit, (wide * unit).mean(-1, keepdim=True), value=-1)
    return wide.mul_(rstd).to(x.dtype), d_weight


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202). It saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, wrap: Wrap) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.wrap = wrap
        return wrap(_swiglu)(gate, up)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.wrap(_swiglu_backward)(*grad_outputs, *ctx.saved_tensors), None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_up = F.silu(gate).mul_(dy)
    return torch.ops.aten.silu_backward(dy * up, gate), d_up


class _Rotary(torch.autograd.Function):
    """Rotary position embedding (arXiv:2104.09864): x cos + rotate_half(x) sin. It saves only cos and sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, wrap: Wrap) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.wrap = wrap
        return wrap(_rotate)(x, cos, sin)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.wrap(_rotate)(grad_outputs[0], cos, -sin), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (..., T, heads, head_dim), cos and sin: (..., T, head_dim), whose two halves are equal."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]  # (..., T, 1, half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
