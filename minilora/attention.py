"""Causal attention over packed examples, through transformers' public attention registry.

Training runs under the name PACKED: no mask is ever built, and the lengths of the packed examples travel with the call.
Everything else (generation with a cache, padded batches) runs under transformers' own "sdpa".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED = "minilora_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: tuple[int, ...] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention within each of the examples of `lengths`, which lie end to end along T.

    query: (1, heads, T, head_dim), key, value: (1, kv_heads, T, head_dim) -> (1, T, heads, head_dim)
    """
    assert attention_mask is None, "packed examples carry their lengths, not a mask"
    assert dropout == 0.0, "attention dropout is refused when the model is loaded"
    assert sum(lengths) == query.shape[2], "the examples' lengths must cover the packed tokens"
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, lengths, scaling), None
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None) -> Tensor:
    """One FlashAttention call for all examples (torch.nn.attention.varlen)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, head_dim)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    offsets = offsets.pin_memory().to(query.device, non_blocking=True)
    longest = max(lengths)
    window = (-1, 0)  # causal
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=window, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out[None]


def no_mask(*_: Any, **__: Any) -> None:
    """The mask function of PACKED: there is none to build."""


def register() -> None:
    """Make PACKED known to transformers; harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
