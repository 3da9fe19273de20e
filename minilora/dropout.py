"""Dropout as a list of the elements it drops: little to draw, little to save, the same ones going backward."""

import math

import torch
from torch import Tensor


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
