"""What DoRA and PiSSA add to LoRA: a length for each row of the weight, a start along the weight's main directions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import ConfigError

NORM_ROWS = 1024  # of the weight, widened to fp32 at once
EXTRA_DIRECTIONS, POWER_ITERATIONS = 8, 4  # of the randomised SVD


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
    """DoRA (arXiv:2402.09353): y = x W0^T + b + (g - 1) d W0^T + g * scale * d A^T B^T; without dropout g (W0 + ...).

    x: (..., in), weight: (out, in), bias: (out,), A: (rank, in), B: (out, rank), magnitude: (out,) -> (..., out)
    d = dropout(x); g = magnitude / ||W0 + scale B A||, of each row, with a norm that gets no gradient (section 4.3).
    As PEFT computes it. This is the plain formula: autograd keeps d and an output-wide product, which LoRA's does not.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        gain = magnitude / weight_norm(weight, A, B, scale)  # (out,), fp32: bf16 would lose a change of less than 0.4 %
    weight, A, B = weight.to(x.dtype), A.to(x.dtype), B.to(x.dtype)
    dropped = F.dropout(x, dropout) if dropout else x
    y = gain * (F.linear(dropped, weight) + F.linear(scale * F.linear(dropped, A), B))
    if dropout:
        y = y + F.linear(x - dropped, weight)
    return (y if bias is None else y + bias).to(x.dtype)


@torch.no_grad()
def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The length of each row of W + scale * B A, at least in fp32, without forming that sum. (out,)

    With a row w of W and b of B: ||w + scale b A||^2 = ||w||^2 + 2 scale (w A^T) b^T + scale^2 (b A A^T) b^T.
    """
    if not weight.is_floating_point():
        raise ConfigError("DoRA needs the base's weights in floating point: this base is in 4 or 8 bits")
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    crossed = torch.cat([rows.to(wide) @ A.T for rows in weight.split(NORM_ROWS)])  # (out, rank)
    squared = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()  # (out,)
    squared += ((2 * scale) * crossed + scale**2 * (B @ (A @ A.T))).mul_(B).sum(1)
    return squared.clamp_min_(torch.finfo(wide).tiny).sqrt_()  # a row of zeros has magnitude 0: 0, not 0 / 0


@torch.no_grad()
def main_directions(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B), (rank, in) and (out, rank), whose scale * B A is the part of W along its `rank` largest directions.

    PiSSA (arXiv:2404.02948, equations 2 and 3). Large weights by a randomised SVD (arXiv:0909.4061, algorithms 4.4 and
    5.1), whose random matrix is drawn on the CPU: the same on every device.
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
