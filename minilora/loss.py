"""Computes the summed loss of the supervised tokens from their hidden states, a chunk of logits at a time."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import first_derivative_only

CHUNK_ROWS = {"cpu": 256, "cuda": 768}  # positions whose logits exist at a time: 78 MB, 233 MB in bf16 for Qwen
WIDE_ROWS = {"cpu": 8, "cuda": 256}  # positions converted to fp32 at a time; on the CPU, as many as fit the cache


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain formula: the sum over rows of -log softmax(hidden @ weight.T)[target].

    The tests compare `token_loss` with it.
    hidden: (S, hidden), weight: (vocabulary, hidden), targets: (S,) -> nats, a scalar
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Summed nats of the supervised tokens, computed `chunk_rows` rows at a time. The default depends on the device.

    hidden: (S, hidden), weight: (vocabulary, hidden), targets: (S,) -> nats, an fp32 scalar
    The gradient of a chunk's logits is softmax - onehot. The forward pass computes it and its product d hidden (and
    d weight, if the weight is trained) while the chunk is in memory. So the backward pass needs no logits
    (arXiv:2410.10989, section 3.2).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    chunk_rows = chunk_rows or CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["cuda"])
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_rows, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, training: bool) -> Tensor:
        needs_hidden, needs_weight = (needed and training for needed in ctx.needs_input_grad[:2])
        head = weight.to(hidden.dtype)
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        nats = torch.zeros((), dtype=accumulate, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight) if needs_weight else None
        wide_rows = WIDE_ROWS.get(hidden.device.type, chunk_rows)
        num_chunks = max(1, math.ceil(len(hidden) / chunk_rows))
        chunk_rows = max(1, math.ceil(len(hidden) / num_chunks))  # chunks of nearly equal size
        buffer = hidden.new_empty(min(chunk_rows, len(hidden)), len(head))  # reused: new pages cost a fifth more
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, min(start + chunk_rows, len(hidden)))
            logits = buffer[: rows.stop - start]  # (chunk, vocabulary); d logits overwrite them
            torch.mm(hidden[rows], head.T, out=logits)
            for narrow, target in zip(logits.split(wide_rows), targets[rows, None].split(wide_rows), strict=True):
                wide = narrow.to(accumulate)
                wide -= wide.amax(-1, keepdim=True)
                nats -= wide.gather(1, target).sum()
                total = wide.exp_().sum(-1, keepdim=True)  # (wide_rows, 1)
                nats += total.log().sum()
                if d_hidden is not None or d_weight is not None:  # softmax minus the one-hot target
                    narrow.copy_(wide.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0)))
            if d_hidden is not None:
                torch.mm(logits, head, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        return nats

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of nats is one number (1 / N), so both gradients are only multiplied by it."""
        d_hidden, d_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            None if d_hidden is None else d_hidden * scale,  # scale has no dimension, so d_hidden keeps its dtype
            None if d_weight is None else d_weight * scale,
            *(None, None, None),
        )
