"""Causal attention over packed examples, through transformers' public attention registry.

Training runs under the name PACKED: no mask is ever built, and the layout of the packed examples travels with the call.
Everything else (generation with a cache, padded batches) runs under transformers' own "sdpa".
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED = "minilora_packed"
BLOCK_ROWS = 64  # queries computed together on the CPU: their scores stay in the cache


class Layout(NamedTuple):
    """How examples lie end to end along T = prefix + sum(lengths).

    prefix: tokens at the start that all examples begin with, there once; 0 when nothing is shared
    lengths: the tokens of each example after the prefix
    """

    lengths: tuple[int, ...]
    prefix: int = 0

    def parts(self) -> Iterator[tuple[slice, bool]]:
        """(its tokens, whether it also sees the prefix) of the prefix itself and of each example."""
        if self.prefix:
            yield slice(0, self.prefix), False
        ends = itertools.accumulate(self.lengths, initial=self.prefix)
        for start, end in itertools.pairwise(ends):
            yield slice(start, end), self.prefix > 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention within each of the examples of `layout`, each of them seeing the shared prefix too.

    query: (1, heads, T, head_dim), key, value: (1, kv_heads, T, head_dim) -> (1, T, heads, head_dim)
    """
    assert attention_mask is None, "packed examples carry their layout, not a mask"
    assert dropout == 0.0, "attention dropout is refused when the model is loaded"
    assert layout is not None, "packed examples carry their layout"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, layout, scale), None
    if query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # it would take the scores to bf16
            return _PackedAttention.apply(query[0], key[0], value[0], layout, scale)[None], None
    return plain_attention(query, key, value, layout, scale), None


def plain_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One masked softmax for each example, through PyTorch's SDPA: the oracle of the other two ways."""
    outputs = []
    for tokens, sees_prefix in layout.parts():
        q, k, v = query[:, :, tokens], key[:, :, tokens], value[:, :, tokens]
        if sees_prefix:
            k, v = (torch.cat([whole[:, :, : layout.prefix], own], 2) for whole, own in ((key, k), (value, v)))
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_(k.shape[2] - q.shape[2])
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)


class _PackedAttention(torch.autograd.Function):
    """softmax(scale q k^T) v in blocks of queries, for the CPU; saves its inputs and its output.

    query: (heads, T, head_dim), key, value: (kv_heads, T, head_dim) -> (T, heads, head_dim). Scores are computed in
    fp32 from the inputs as they are, probabilities meet the values in the inputs' dtype, as in FlashAttention
    (arXiv:2205.14135); PyTorch's own bf16 backward on the CPU is two to three times slower on examples of 40 to 300
    tokens, and less exact (benchmarks/README.md).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        heads, tokens, dim = query.shape
        groups = len(key)
        wide = torch.promote_types(query.dtype, torch.float32)
        q = query.view(groups, -1, tokens, dim)  # (kv_heads, heads / kv_heads, T, head_dim)
        out = query.new_empty(tokens, heads, dim)
        grouped_out = out.view(tokens, groups, -1, dim).permute(1, 2, 0, 3)
        for block in _blocks(key, value, layout, wide):
            p = _probabilities(q[:, :, block.queries], block, scale).to(query.dtype)
            grouped_out[:, :, block.queries] = torch.bmm(p.flatten(1, 2), block.value).view(groups, -1, p.shape[2], dim)
        ctx.save_for_backward(query, key, value, out)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        tokens, dim = query.shape[1:]
        groups, prefix = len(key), ctx.layout.prefix
        wide = torch.promote_types(query.dtype, torch.float32)
        q = query.view(groups, -1, tokens, dim)
        dy, y = (tensor.view(tokens, groups, -1, dim).permute(1, 2, 0, 3) for tensor in (grad_outputs[0], out))
        d_query = torch.empty_like(q)
        d_key, d_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for block in _blocks(key, value, ctx.layout, wide):
            q_block, dy_block = q[:, :, block.queries].flatten(1, 2), dy[:, :, block.queries].flatten(1, 2)
            p = _probabilities(q[:, :, block.queries], block, ctx.scale)
            d_v = torch.bmm(p.to(q.dtype).flatten(1, 2).transpose(1, 2), dy_block)
            inner = (dy[:, :, block.queries].to(wide) * y[:, :, block.queries]).sum(-1, keepdim=True)
            d_p = torch.bmm(dy_block.to(wide), block.wide_value).view_as(p)
            d_scores = d_p.sub_(inner).mul_(p).to(q.dtype).flatten(1, 2)
            d_query[:, :, block.queries] = (
                torch.bmm(d_scores, block.key).view_as(q[:, :, block.queries]).mul_(ctx.scale)
            )
            d_k = torch.bmm(d_scores.transpose(1, 2), q_block)
            for gradient, part in ((d_key, d_k), (d_value, d_v)):
                if block.sees_prefix:
                    gradient[:, :prefix] += part[:, :prefix]
                gradient[:, block.own] += part[:, part.shape[1] - (block.own.stop - block.own.start) :]
        return (
            d_query.view_as(query),
            d_key.mul_(ctx.scale).to(key.dtype),
            d_value.to(value.dtype),
            None,
            None,
        )


class _Block(NamedTuple):
    """Some queries of one example, and the keys and values that the last of them sees."""

    queries: slice
    own: slice  # the example's own tokens among the keys
    sees_prefix: bool
    key: Tensor  # (kv_heads, keys, head_dim)
    value: Tensor  # (kv_heads, keys, head_dim)
    wide_key: Tensor  # (kv_heads, head_dim, keys), fp32
    wide_value: Tensor  # (kv_heads, head_dim, keys), fp32


def _blocks(key: Tensor, value: Tensor, layout: Layout, wide: torch.dtype) -> Iterator[_Block]:
    for tokens, sees_prefix in layout.parts():
        k, v = key[:, tokens], value[:, tokens]
        prefix = layout.prefix if sees_prefix else 0
        if prefix:
            k, v = torch.cat([key[:, :prefix], k], 1), torch.cat([value[:, :prefix], v], 1)
        wide_k, wide_v = (x.to(wide).transpose(1, 2).contiguous() for x in (k, v))
        for start in range(tokens.start, tokens.stop, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, tokens.stop)
            seen = prefix + end - tokens.start
            pieces = (k[:, :seen], v[:, :seen], wide_k[:, :, :seen], wide_v[:, :, :seen])
            yield _Block(slice(start, end), slice(tokens.start, end), sees_prefix, *pieces)


def _probabilities(q: Tensor, block: _Block, scale: float) -> Tensor:
    """How much each query of a block attends to each key. (kv_heads, heads / kv_heads, queries, keys)"""
    rows = q.shape[2]
    scores = torch.bmm(q.flatten(1, 2).to(block.wide_key.dtype) * scale, block.wide_key)
    scores = scores.view(*q.shape[:3], -1)
    ahead = torch.ones(rows, rows, dtype=torch.bool).triu_(1)
    scores[..., -rows:].masked_fill_(ahead, -torch.inf)
    return torch.softmax(scores, -1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One FlashAttention call for all examples (torch.nn.attention.varlen), causal from the lower right corner.

    With a shared prefix each example's keys are gathered as [prefix, own]: key heads are few, so the copy is small.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, head_dim)
    parts = list(layout.parts())
    own = [tokens.stop - tokens.start for tokens, _ in parts]
    seen = [length + layout.prefix * sees_prefix for length, (_, sees_prefix) in zip(own, parts, strict=True)]
    if layout.prefix:
        prefix = torch.arange(layout.prefix)
        pieces = [torch.arange(tokens.start, tokens.stop) for tokens, _ in parts]
        order = torch.cat([torch.cat([prefix, p]) if sees else p for p, (_, sees) in zip(pieces, parts, strict=True)])
        order = order.to(query.device, non_blocking=True)
        k, v = k.index_select(0, order), v.index_select(0, order)
    offsets_q, offsets_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(query.device, non_blocking=True)
        for lengths in (own, seen)
    )
    causal = (-1, 0)
    out = varlen_attn(
        q, k, v, offsets_q, offsets_k, max(own), max(seen), scale=scale, window_size=causal, enable_gqa=True
    )
    assert isinstance(out, Tensor)
    return out[None]


def no_mask(*_: Any, **__: Any) -> None:
    """The mask function of PACKED: there is none to build."""


def register() -> None:
    """Make PACKED known to transformers; harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
