"""Causal attention over packed examples, through transformers' public attention registry.

Training runs under the name PACKED: no mask is ever built, and the layout of the packed examples travels with the call.
Everything else (generation with a cache, padded batches) runs under transformers' own "sdpa".
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED = "minilora_packed"
BLOCK_ROWS = 96  # most queries computed together on the CPU: their scores stay in the cache


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
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # it would take the scores to bf16
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        heads, tokens, dim = query.shape
        out = query.new_empty(tokens, heads, dim)
        y = _grouped(out.transpose(0, 1), len(key))
        for block in _Blocks(query, key, value, layout, scale):
            p = block.probabilities().to(query.dtype)
            y[:, :, block.queries] = torch.bmm(p, block.value).unflatten(1, (-1, block.rows))
        ctx.save_for_backward(query, key, value, out)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        prefix, groups = ctx.layout.prefix, len(key)
        blocks = _Blocks(query, key, value, ctx.layout, ctx.scale)
        dy, y = (_grouped(tensor.transpose(0, 1), groups) for tensor in (grad_outputs[0], out))
        inner = (dy.to(blocks.wide) * y).sum(-1, keepdim=True)  # of dp and p, row by row: (kv_heads, shared, T, 1)
        d_query = torch.empty_like(query)
        d_q = _grouped(d_query, groups)
        d_key, d_value = torch.zeros_like(key, dtype=blocks.wide), torch.zeros_like(value, dtype=blocks.wide)
        for block in blocks:
            dy_block = dy[:, :, block.queries].flatten(1, 2)
            p = block.probabilities()
            d_v = torch.bmm(p.to(query.dtype).transpose(1, 2), dy_block)
            d_p = torch.bmm(dy_block.to(blocks.wide), block.wide_value.transpose(1, 2))
            d_scores = d_p.sub_(inner[:, :, block.queries].flatten(1, 2)).mul_(p).to(query.dtype)
            d_q[:, :, block.queries] = torch.bmm(d_scores, block.key).unflatten(1, (-1, block.rows))
            d_k = torch.bmm(d_scores.transpose(1, 2), block.query.flatten(1, 2))
            for gradient, part in ((d_key, d_k), (d_value, d_v)):
                if block.sees_prefix:
                    gradient[:, :prefix] += part[:, :prefix]
                gradient[:, block.own] += part[:, prefix * block.sees_prefix :]
        return d_query.mul_(ctx.scale), d_key.mul_(ctx.scale).to(key.dtype), d_value.to(value.dtype), None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """The heads by the key they share. (heads, T, head_dim) -> (kv_heads, shared, T, head_dim)"""
    return x.unflatten(0, (groups, -1))


class _Block(NamedTuple):
    """Some queries of one example, and the keys and values that the last of them sees; what is `wide` is fp32."""

    queries: slice
    own: slice  # the example's own tokens among the keys
    sees_prefix: bool
    query: Tensor  # (kv_heads, shared, rows, head_dim)
    wide_query: Tensor  # the same, scaled
    key: Tensor  # (kv_heads, keys, head_dim)
    value: Tensor
    wide_key: Tensor
    wide_value: Tensor

    @property
    def rows(self) -> int:
        """How many queries there are."""
        return self.query.shape[2]

    def probabilities(self) -> Tensor:
        """How much each query attends to each key. (kv_heads, shared * rows, keys)"""
        scores = torch.bmm(self.wide_query.flatten(1, 2), self.wide_key.transpose(1, 2))
        ahead = torch.full((self.rows, self.rows), -torch.inf, dtype=scores.dtype).triu_(1)
        scores.unflatten(1, (-1, self.rows))[..., -self.rows :] += ahead
        return torch.softmax(scores, -1)


class _Blocks:
    """The blocks of all examples, one after the other."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> None:
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self._layout, self._query = layout, _grouped(query, len(key))
        self._wide_query = self._query.to(self.wide) * scale
        self._keys = (key, value, key.to(self.wide), value.to(self.wide))

    def __iter__(self) -> Iterator[_Block]:
        for tokens, sees_prefix in self._layout.parts():
            prefix = self._layout.prefix if sees_prefix else 0
            keys = [x[:, tokens] for x in self._keys]
            if prefix:
                keys = [torch.cat([x[:, :prefix], own], 1) for x, own in zip(self._keys, keys, strict=True)]
            length = tokens.stop - tokens.start
            rows = math.ceil(length / math.ceil(length / BLOCK_ROWS))  # blocks of about one size
            for start in range(tokens.start, tokens.stop, rows):
                end = min(start + rows, tokens.stop)
                queries, seen = slice(start, end), prefix + end - tokens.start
                pieces = (self._query[:, :, queries], self._wide_query[:, :, queries], *(x[:, :seen] for x in keys))
                yield _Block(queries, slice(tokens.start, end), sees_prefix, *pieces)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One FlashAttention call for all examples (torch.nn.attention.varlen), causal from the lower right corner.

    With a shared prefix each example's keys are gathered as [prefix, own]: key heads are few, so the copy is small.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, head_dim)
    queries, seen, order = _varlen_layout(layout, query.device)
    if order is not None:
        k, v = k.index_select(0, order), v.index_select(0, order)
    longest_q = max(layout.prefix, *layout.lengths)
    longest_k = max(layout.lengths) + layout.prefix
    causal = (-1, 0)
    out = varlen_attn(q, k, v, queries, seen, longest_q, longest_k, scale=scale, window_size=causal, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out[None]


@functools.lru_cache(maxsize=2)
def _varlen_layout(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """(where each part's queries begin, where its keys begin, the keys' order or None for their own), once a batch.

    (parts + 1,), (parts + 1,), int32; (keys,), int64
    """
    parts = list(layout.parts())
    own = [tokens.stop - tokens.start for tokens, _ in parts]
    seen = [length + layout.prefix * sees_prefix for length, (_, sees_prefix) in zip(own, parts, strict=True)]
    offsets = [torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (own, seen)]
    queries, keys = (tensor.to(device, non_blocking=True) for tensor in offsets)
    if not layout.prefix:
        return queries, keys, None
    prefix = torch.arange(layout.prefix)
    pieces = [torch.arange(tokens.start, tokens.stop) for tokens, _ in parts]
    order = [torch.cat([prefix, p]) if sees else p for p, (_, sees) in zip(pieces, parts, strict=True)]
    return queries, keys, torch.cat(order).to(device, non_blocking=True)


def no_mask(*_: Any, **__: Any) -> None:
    """The mask function of PACKED: there is none to build."""


def register() -> None:
    """Make PACKED known to transformers; harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
