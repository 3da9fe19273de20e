"""Leaner forms of a decoder's norm, MLP and attention: the same numbers as Hugging Face's, less saved, fewer passes.

`speed_up` gives the modules of a loaded model a forward of ours; nothing is patched at import, and generation (with a
cache) still goes through the original attention. Each function stands beside the Hugging Face module it equals, which
the tests compare with bit for bit.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.attention import packed_attention
from minilora.lora import project

Function = Callable[..., Any]
How = Callable[[Function], Function]  # eager | compiled
ATTENTIONS = ("Qwen2Attention", "Qwen3Attention", "LlamaAttention")
NORMS = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm")
MLPS = ("Qwen2MLP", "Qwen3MLP", "LlamaMLP")


def eager(function: Function) -> Function:
    """The function as it stands, operation by operation."""
    return function


@functools.cache
def compiled(function: Function) -> Function:
    """The function as one kernel, for all numbers of tokens. What lies between its operations is never rounded."""
    return torch.compile(function, dynamic=True)


def speed_up(model: nn.Module, torch_compile: bool = False) -> None:
    """Give every module that is known here its leaner forward; others keep their own.

    torch_compile: run their elementwise chains as kernels of torch.compile
    """
    how = compiled if torch_compile else eager
    for module in model.modules():
        kind = type(module).__name__
        if kind in NORMS:
            module.forward = MethodType(_norm_forward, module)
        elif kind in MLPS and _is_silu(module.act_fn):
            module.forward = MethodType(_mlp_forward, module)
        elif kind in ATTENTIONS:
            module.forward = MethodType(_attention_forward, module)
        else:
            continue
        module.how = how  # type: ignore[assignment]  # no parameter and no module, but nn.Module takes it


def _is_silu(function: Any) -> bool:
    probe = torch.linspace(-4, 4, 9)
    return bool(torch.equal(function(probe), F.silu(probe)))


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.how)


class _RMSNorm(torch.autograd.Function):
    """weight * (x / rms(x)) as Qwen2RMSNorm computes it; saves x and one number a row, nothing in fp32 of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, how: How) -> Tensor:
        out, rstd = how(_norm)(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weight = ctx.how(_norm_backward)(*grad_outputs, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return d_x, d_weight, None, None


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: (..., hidden) -> the normed x, (..., hidden), and 1 / rms(x), (..., 1)"""
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


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_SwiGLU.apply(*project(x, (self.gate_proj, self.up_proj)), self.how))


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202); saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, how: How) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.how = how
        return how(_swiglu)(gate, up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.how(_swiglu_backward)(*grad_outputs, *ctx.saved_tensors), None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_up = F.silu(gate).mul_(dy)
    return torch.ops.aten.silu_backward(dy * up, gate), d_up


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Packed training takes the short way; everything else is the class's own forward."""
    if "layout" not in kwargs:
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
    tokens = hidden_states.shape[1]
    shape = (1, tokens, -1, self.head_dim)
    projections = project(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
    query, key, value = (projection.view(shape) for projection in projections)
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    cos, sin = position_embeddings
    query, key = (_Rotary.apply(rotated, cos, sin, self.how) for rotated in (query, key))
    query, key = query.to(value.dtype), key.to(value.dtype)  # norms whose weights are in fp32 widen them
    out, _ = packed_attention(
        self,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        scaling=self.scaling,
        layout=kwargs["layout"],
    )
    return self.o_proj(out.reshape(1, tokens, -1)), None


class _Rotary(torch.autograd.Function):
    """Rotary position embedding (arXiv:2104.09864), x cos + rotate_half(x) sin, saving neither x nor its rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, how: How) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.how = how
        return how(_rotate)(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.how(_rotate)(grad_outputs[0], cos, -sin), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (1, T, heads, head_dim), cos, sin: (1, T, head_dim), whose two halves are equal."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]  # (1, T, 1, half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
