"""Computes what DoRA and PiSSA add to LoRA: the magnitude of each row, and a start in the main singular directions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import ConfigError

NORM_ROWS = 1024  # rows of the weight that are converted to fp32 at a time
EXTRA_DIRECTIONS, POWER_ITERATIONS = 8, 4  # oversampling and power iterations of the randomised SVD


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """DoRA (arXiv:2402.09353): y = x W0^T + b + (g - 1) d W0^T + g * scale * d A^T B^T.

    x: (..., in), weight: (out, in), bias: (out,), A: (rank, in), B: (out, rank), magnitude: (out,) -> (..., out)
    d = dropout(x). g = magnitude / ||W0 + scale B A||, for each row. The norm gets no gradient (section 4.3).
    Without dropout, y = g x (W0 + scale B A)^T + b. PEFT computes the same function.
    This is the plain formula: autograd keeps d and a product of the output's width. The LoRA function keeps neither.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        gain = magnitude / weight_norm(weight, A, B, scale)  # (out,), fp32: bf16 rounds away a change below 0.4 %
    weight, A, B = weight.to(x.dtype), A.to(x.dtype), B.to(x.dtype)
    dropped = F.dropout(x, dropout) if dropout else x
    y = gain * (F.linear(dropped, weight) + F.linear(scale * F.linear(dropped, A), B))
    if dropout:
        y = y + F.linear(x - dropped, weight)
    return (y if bias is None else y + bias).to(x.dtype)


@torch.no_grad()
def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The norm of each row of W + scale * B A, in fp32 or wider. It does not compute this sum. (out,)

    For a row w of W and a row b of B: ||w + scale b A||^2 = ||w||^2 + 2 scale (w A^T) b^T + scale^2 (b A A^T) b^T.
    """
    if not weight.is_floating_point():
        raise ConfigError("DoRA needs the base's weights in floating point: this base is in 4 or 8 bits")
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    crossed = torch.cat([rows.to(wide) @ A.T for rows in weight.split(NORM_ROWS)])  # (out, rank)
    squared = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()  # (out,)
    squared += ((2 * scale) * crossed + scale**2 * (B @ (A @ A.T))).mul_(B).sum(1)
    return squared.clamp_min_(torch.finfo(wide).tiny).sqrt_()  # so that a row of zeros gives 0, not 0 / 0


@torch.no_grad()
def main_directions(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A: (rank, in) and B: (out, rank), where scale * B A is the part of W in its `rank` largest singular directions.

    PiSSA (arXiv:2404.02948, equations 2 and 3). Large weights use a randomised SVD (arXiv:0909.4061, algorithms 4.4 and
    5.1). Its random matrix is drawn on the CPU, so it is the same on every device.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    width = rank + EXTRA_DIRECTIONS
    if 4 * width >= min(wide.shape):
        U, S, V = torch.linalg.svd(wide, full_matrices=False)
    else:
        Q = wide @ torch.randn(wide.shape[1], width, dtype=wide.dtype).to(wide.device)  # (out, width)
        for _ in range(POWER_ITERATIONS):
            Q = wide @ torch.linalg.qr(wide.T @ torch.linalg.qr(Q).Q).Q
        Q = torch.linalg.qr(Q).Q
        U, S, V = torch.linalg.svd(Q.T @ wide, full_matrices=False)
        U = Q @ U
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root
