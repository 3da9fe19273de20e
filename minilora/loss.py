"""Computes the nats of each supervised token from its hidden state, a chunk of logits at a time."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import first_derivative_only
from minilora.matmul import as_autocast
from minilora.utils.device import wide_rows

CHUNK_ROWS = {"cpu": 256, "cuda": 768}  # positions whose logits exist at a time: 78 MB, 233 MB in bf16 for Qwen
CUDA_WIDE_ROWS = 256  # positions converted to fp32 at a time; on the CPU, as many as fit the cache


def plain_nats(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain formula: -log softmax(hidden @ weight.T)[target] of each row.

    The tests compare `token_nats` with it.
    hidden: (S, hidden), weight: (vocabulary, hidden), targets: (S,) -> nats (S,)
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def token_nats(
    hidden: Tensor, weight: Tensor, targets: Tensor, device_type: str | None = None, chunk_rows: int | None = None
) -> Tensor:
    """The nats of each supervised token, computed `chunk_rows` rows at a time. The default depends on the device.

    hidden: (S, hidden), weight: (vocabulary, hidden), targets: (S,) -> nats (S,), fp32
    device_type: cpu | cuda, the kind of device whose code runs; by default that of hidden
    The gradient of a row's logits is softmax - onehot, times the gradient of its nats. The nats of a row depend on one
    row of hidden alone. So the forward pass computes the row's gradient for a factor of 1 while its logits are in
    memory, and the backward pass only multiplies it by the factor (arXiv:2410.10989, section 3.2).
    """
    hidden = as_autocast(hidden)
    device_type = device_type or hidden.device.type
    chunk_rows = chunk_rows or CHUNK_ROWS[device_type]
    few = wide_rows(len(weight)) if device_type == "cpu" else CUDA_WIDE_ROWS
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_rows, few, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_rows: int,
        few: int,
        training: bool,
    ) -> Tensor:
        needs_hidden, needs_weight = (needed and training for needed in ctx.needs_input_grad[:2])
        head = weight.to(hidden.dtype)
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        nats = torch.empty(len(hidden), dtype=accumulate, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        for rows, logits in _chunks_of_logits(hidden, head, chunk_rows):
            nats[rows] = _nats_and_gradient(logits, targets[rows], few, needs_hidden or needs_weight)
            if d_hidden is not None:
                torch.mm(logits, head, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight, *((hidden, weight, targets) if needs_weight else ()))
        ctx.rows = (chunk_rows, few)
        return nats

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """d_hidden times each row's factor; d_weight times the factor, where all rows have the same."""
        d_nats, (d_hidden, d_weight, *operands) = grad_outputs[0], ctx.saved_tensors
        equal = len(d_nats) > 0 and d_nats.stride() == (0,)  # the gradient of a sum is one number, expanded
        factor = d_nats[0] if equal else None
        if d_weight is not None:
            d_weight = d_weight * factor if equal else _weight_gradient(d_nats, *operands, *ctx.rows)
        if d_hidden is not None:
            d_hidden = (d_hidden * (factor if equal else d_nats[:, None])).to(d_hidden.dtype)
        return d_hidden, d_weight, None, None, None, None


def _weight_gradient(
    d_nats: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, few: int
) -> Tensor:
    """The gradient of the head's weight where rows have different factors: the logits are computed once more."""
    d_weight = torch.zeros_like(weight)
    for rows, logits in _chunks_of_logits(hidden, weight.to(hidden.dtype), chunk_rows):
        _nats_and_gradient(logits, targets[rows], few, True)
        d_weight += logits.T @ (hidden[rows] * d_nats[rows, None]).to(hidden.dtype)
    return d_weight


def _nats_and_gradient(logits: Tensor, targets: Tensor, few: int, needs_gradient: bool) -> Tensor:
    """The nats of a chunk's rows; its logits are overwritten by their gradient, softmax minus the one-hot target.

    logits: (chunk, vocabulary), targets: (chunk,) -> (chunk,), in fp32 or wider
    """
    parts = zip(logits.split(few), targets.split(few), strict=True)
    return torch.cat([_nats_of_few(rows, target, needs_gradient) for rows, target in parts])


def _nats_of_few(logits: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
    """`_nats_and_gradient` of rows that are all converted to fp32 at once."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide -= wide.amax(-1, keepdim=True)
    wanted = wide.gather(1, targets[:, None])  # (rows, 1)
    total = wide.exp_().sum(-1, keepdim=True)  # (rows, 1)
    if needs_gradient:
        logits.copy_(wide.div_(total).scatter_add_(1, targets[:, None], torch.full_like(total, -1.0)))
    return (total.log() - wanted)[:, 0]


def _chunks_of_logits(hidden: Tensor, head: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits) of one chunk after the other, of nearly equal size. (chunk, vocabulary), in one buffer"""
    num_chunks = max(1, math.ceil(len(hidden) / chunk_rows))
    chunk_rows = max(1, math.ceil(len(hidden) / num_chunks))
    buffer = hidden.new_empty(min(chunk_rows, len(hidden)), len(head))  # reused: new pages cost a fifth more
    for start in range(0, len(hidden), chunk_rows):
        rows = slice(start, min(start + chunk_rows, len(hidden)))
        logits = buffer[: rows.stop - start]
        torch.mm(hidden[rows], head.T, out=logits)
        yield rows, logits
