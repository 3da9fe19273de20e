"""Causal attention over packed examples: blocks on the CPU, one FlashAttention call on CUDA, no mask on either."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import first_derivative_only
from minilora.utils.device import block_rows


class Layout(NamedTuple):
    """How examples lie end to end along T = prefix + sum(lengths) + padding.

    prefix: tokens at the start that all examples begin with, there once; 0 when nothing is shared
    lengths: the tokens of each example after the prefix
    padding: tokens at the end that belong to no example; they see only each other
    """

    lengths: tuple[int, ...]
    prefix: int = 0
    padding: int = 0

    def parts(self) -> Iterator[tuple[slice, bool]]:
        """(its tokens, whether it also sees the prefix) of the prefix itself, of each example and of the padding."""
        if self.prefix:
            yield slice(0, self.prefix), False
        ends = list(itertools.accumulate(self.lengths, initial=self.prefix))
        for start, end in itertools.pairwise(ends):
            yield slice(start, end), self.prefix > 0
        if self.padding:
            yield slice(ends[-1], ends[-1] + self.padding), False


@dataclass(frozen=True)
class Placement:
    """A layout, and its index tensors on the device of a batch. They are made once a batch and used by every layer."""

    layout: Layout
    device: torch.device

    @functools.cached_property
    def key_order(self) -> Tensor | None:
        """The tokens that each part sees, [prefix, own], part after part. (keys,); None where each sees only its own"""
        if not self.layout.prefix:
            return None
        prefix = torch.arange(self.layout.prefix)
        parts = [(torch.arange(tokens.start, tokens.stop), sees_prefix) for tokens, sees_prefix in self.layout.parts()]
        order = [torch.cat([prefix, own]) if sees_prefix else own for own, sees_prefix in parts]
        return torch.cat(order).to(self.device, non_blocking=True)

    @functools.cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """(where each part's queries begin, where its keys begin). (parts + 1,), int32, both"""
        parts = list(self.layout.parts())
        own = [tokens.stop - tokens.start for tokens, _ in parts]
        seen = [length + self.layout.prefix * sees for length, (_, sees) in zip(own, parts, strict=True)]
        both = [torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (own, seen)]
        queries, keys = (tensor.to(self.device, non_blocking=True) for tensor in both)
        return queries, keys


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, place: Placement, scale: float, device_type: str
) -> Tensor:
    """Causal self-attention within each of the examples of `place`, each of them seeing the shared prefix too.

    query: (T, heads, head_dim), key, value: (T, kv_heads, head_dim) -> (T, heads, head_dim)
    device_type: cpu | cuda, the kind of device whose code runs
    """
    if device_type == "cpu":
        return _PackedAttention.apply(query, key, value, place, scale)
    if query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, place, scale)
    return plain_attention(query, key, value, place.layout, scale)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One masked softmax for each example, by PyTorch's SDPA; the other two implementations are tested against it."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, T, head_dim)
    outputs = []
    for tokens, sees_prefix in layout.parts():
        own_k, own_v = k[:, :, tokens], v[:, :, tokens]
        if sees_prefix:
            own_k, own_v = (torch.cat([x[:, :, : layout.prefix], y], 2) for x, y in ((k, own_k), (v, own_v)))
        length, seen = tokens.stop - tokens.start, own_k.shape[2]
        mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril_(seen - length)
        options: dict[str, Any] = {"attn_mask": mask, "scale": scale, "enable_gqa": True}
        outputs.append(F.scaled_dot_product_attention(q[:, :, tokens], own_k, own_v, **options))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


class _PackedAttention(torch.autograd.Function):
    """softmax(scale q k^T) v in blocks of queries, for the CPU; saves its inputs.

    query: (T, heads, head_dim), key, value: (T, kv_heads, head_dim) -> (T, heads, head_dim). All products are in fp32,
    block by block: on examples of 40 to 400 tokens that is faster than bf16 (PyTorch's own bf16 backward takes two to
    three times as long), more exact, and oneDNN keeps no product of each new shape (benchmarks/README.md).
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # it would take the products to bf16
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, place: Placement, scale: float) -> Tensor:
        out = query.new_empty(query.shape)
        for block in _Blocks(query, key, value, place, scale):
            block.put(torch.bmm(block.probabilities(), block.value), out)
        ctx.save_for_backward(query, key, value)
        ctx.place, ctx.scale = place, scale
        return out

    @staticmethod
    @first_derivative_only
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (query, key, value) = grad_outputs, ctx.saved_tensors
        blocks = _Blocks(query, key, value, ctx.place, ctx.scale)
        d_query = query.new_empty(query.shape)
        d_keys, d_values = torch.zeros_like(blocks.keys), torch.zeros_like(blocks.values)
        for block in blocks:
            dy_block, p = _rows(dy, block.queries, block.key), block.probabilities()
            d_values[:, block.seen] += torch.bmm(p.transpose(1, 2), dy_block)
            d_p = torch.bmm(dy_block, block.value.transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
            block.put(torch.bmm(d_scores, block.key).mul_(ctx.scale), d_query)
            d_keys[:, block.seen] += torch.bmm(d_scores.transpose(1, 2), block.query)  # which is scaled
        d_key, d_value = blocks.to_tokens(d_keys), blocks.to_tokens(d_values)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


class _Block(NamedTuple):
    """Some queries of one example, and the keys and values that the last of them sees, in fp32.

    Query heads that share a key head stand together: a block has (kv_heads, queries * shared, head_dim) rows.
    """

    queries: slice  # their tokens
    seen: slice  # the keys' places in `Placement.key_order`
    ahead: Tensor  # (queries, queries): -inf where a key comes after the query, else 0
    query: Tensor  # (kv_heads, queries * shared, head_dim), scaled
    key: Tensor  # (kv_heads, keys, head_dim)
    value: Tensor

    def put(self, rows: Tensor, x: Tensor) -> None:
        """The inverse of `_rows`: write the block's rows into x."""
        x.unflatten(1, (len(rows), -1))[self.queries] = rows.unflatten(1, (len(self.ahead), -1)).transpose(0, 1)

    def probabilities(self) -> Tensor:
        """How much each query attends to each key. (kv_heads, queries * shared, keys)"""
        scores = torch.bmm(self.query, self.key.transpose(1, 2))
        last = scores.unflatten(1, (len(self.ahead), -1))[..., -len(self.ahead) :]  # all see what comes before them
        last += self.ahead[:, None]
        return torch.softmax(scores, -1)


def _rows(x: Tensor, queries: slice, key: Tensor) -> Tensor:
    """The block's rows of x. (T, heads, head_dim) -> (kv_heads, queries * shared, head_dim), in the key's dtype"""
    return x.unflatten(1, (len(key), -1))[queries].transpose(0, 1).flatten(1, 2).to(key.dtype)


class _Blocks:
    """The blocks of all examples, one after the other.

    keys, values: what each example sees, one after the other, in fp32; (kv_heads, keys, head_dim)
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, place: Placement, scale: float) -> None:
        self._query, self._layout, self._scale, self._tokens = query, place.layout, scale, len(key)
        self._order = place.key_order
        wide = torch.promote_types(query.dtype, torch.float32)
        gathered = (_side_by_side(x, self._order) for x in (key, value))
        self.keys, self.values = (x.transpose(0, 1).to(wide).contiguous() for x in gathered)
        self._most = block_rows(query.shape[1])  # queries computed together: their scores stay in the cache
        self._ahead = torch.full((self._most, self._most), -torch.inf, dtype=wide).triu_(1)

    def __iter__(self) -> Iterator[_Block]:
        first_seen = 0
        for tokens, sees_prefix in self._layout.parts():
            length, prefix = tokens.stop - tokens.start, self._layout.prefix * sees_prefix
            size = math.ceil(length / math.ceil(length / self._most))  # blocks of about one size
            for start in range(0, length, size):
                end = min(start + size, length)
                queries = slice(tokens.start + start, tokens.start + end)
                seen = slice(first_seen, first_seen + prefix + end)
                ahead = self._ahead[: end - start, : end - start]
                query = _rows(self._query, queries, self.keys) * self._scale
                yield _Block(queries, seen, ahead, query, self.keys[:, seen], self.values[:, seen])
            first_seen += prefix + length

    def to_tokens(self, x: Tensor) -> Tensor:
        """Sums by the token that stands at each key's place. (kv_heads, keys, head_dim) -> (T, kv_heads, head_dim)"""
        x = x.transpose(0, 1)
        return x if self._order is None else x.new_zeros(self._tokens, *x.shape[1:]).index_add_(0, self._order, x)


def _varlen(query: Tensor, key: Tensor, value: Tensor, place: Placement, scale: float) -> Tensor:
    """One FlashAttention call for all examples (torch.nn.attention.varlen), causal from the lower right corner.

    With a shared prefix each example's keys are gathered as [prefix, own]: key heads are few, so the copy is small.
    """
    from torch.nn.attention.varlen import varlen_attn

    layout = place.layout
    key, value = (_side_by_side(x, place.key_order) for x in (key, value))
    longest_query = max(layout.prefix, layout.padding, *layout.lengths)
    longest_key = max(layout.prefix + max(layout.lengths), layout.padding)
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # causal
    if _takes_grouped_queries(varlen_attn):
        options["enable_gqa"] = True
    else:  # torch 2.11 has no grouped queries here: each query head gets its own copy of its key head
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = varlen_attn(query, key, value, *place.offsets, longest_query, longest_key, **options)
    assert isinstance(out, Tensor)
    return out


@functools.cache  # asked in every layer
def _takes_grouped_queries(varlen_attn: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _side_by_side(x: Tensor, order: Tensor | None) -> Tensor:
    """Keys or values in `Placement.key_order`. (T, kv_heads, head_dim) -> (keys, kv_heads, head_dim)"""
    return x if order is None else x.index_select(0, order)
