"""Leaner forms of a decoder's norm, MLP and attention: the same numbers as Hugging Face's, less saved, fewer passes.

`speed_up` gives the modules of a loaded model a forward of ours; nothing is patched at import, and generation (with a
cache) still goes through the original attention. Each function stands beside the Hugging Face module it equals, which
the tests compare with bit for bit.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.attention import packed_attention
from minilora.lora import project

CPU_ROWS = 256  # rows of an elementwise chain computed together, so that what is between them stays in the cache
ATTENTIONS = ("Qwen2Attention", "Qwen3Attention", "LlamaAttention")
NORMS = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm")
MLPS = ("Qwen2MLP", "Qwen3MLP", "LlamaMLP")


def speed_up(model: nn.Module) -> None:
    """Give every module that is known here its leaner forward; others keep their own."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in NORMS:
            module.forward = MethodType(_norm_forward, module)
        elif kind in MLPS and _is_silu(module.act_fn):
            module.forward = MethodType(_mlp_forward, module)
        elif kind in ATTENTIONS:
            module.forward = MethodType(_attention_forward, module)


def _is_silu(function: Any) -> bool:
    probe = torch.linspace(-4, 4, 9)
    return bool(torch.equal(function(probe), F.silu(probe)))


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """weight * (x / rms(x)) as Qwen2RMSNorm computes it; saves x and one number a row, nothing in fp32 of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, hidden)
        out = torch.empty_like(flat, dtype=torch.promote_types(x.dtype, weight.dtype))
        rstd = torch.empty(len(flat), 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for rows in _row_blocks(flat):
            wide = flat[rows].to(rstd.dtype)
            rstd[rows] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            torch.mul((wide * rstd[rows]).to(x.dtype), weight, out=out[rows])
        ctx.save_for_backward(x, rstd, weight)
        return out.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        dy = grad_outputs[0].reshape_as(flat)
        dx = torch.empty_like(flat)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _row_blocks(flat):
            unit = flat[rows].to(rstd.dtype) * rstd[rows]
            if d_weight is not None:
                d_weight += (dy[rows] * unit.to(x.dtype)).sum(0)
            wide = (dy[rows] * weight).to(rstd.dtype)
            wide.addcmul_(unit, (wide * unit).mean(-1, keepdim=True), value=-1)
            torch.mul(wide, rstd[rows], out=wide)
            dx[rows] = wide
        return dx.view_as(x), d_weight, None


def _row_blocks(flat: Tensor) -> list[slice]:
    """All rows at once on CUDA; on the CPU blocks of a size that stays in the cache."""
    size = CPU_ROWS if flat.device.type == "cpu" else len(flat)
    return [slice(start, start + size) for start in range(0, len(flat), max(1, size))]


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(_SwiGLU.apply(*project(x, (self.gate_proj, self.up_proj))))


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202); saves only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        flat_gate, flat_up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        out = torch.empty_like(flat_gate)
        for rows in _row_blocks(flat_gate):
            torch.mul(F.silu(flat_gate[rows]), flat_up[rows], out=out[rows])
        return out.view_as(gate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        flat_gate, flat_up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        dy = grad_outputs[0].reshape_as(flat_gate)
        d_gate, d_up = torch.empty_like(flat_gate), torch.empty_like(flat_up)
        for rows in _row_blocks(flat_gate):
            torch.mul(dy[rows], F.silu(flat_gate[rows]), out=d_up[rows])
            torch.ops.aten.silu_backward.grad_input(dy[rows] * flat_up[rows], flat_gate[rows], grad_input=d_gate[rows])
        return d_gate.view_as(gate), d_up.view_as(up)


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
    query, key = _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
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
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (1, T, heads, head_dim), cos, sin: (1, T, head_dim), whose two halves are equal."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]  # (1, T, 1, half)
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    torch.mul(first, cos, out=out[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=out[..., half:]).add_(first * sin)
    return out
