"""The variants of LoRA: each knows its product, its merged weight, its own tensors, and its forward by itself.

LoRA is the plain one. PiSSA starts in the main singular directions of the weight. DoRA gives each row a magnitude.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.matmul import as_autocast, frozen_linears

NORM_ROWS = 1024  # rows of the weight that are converted to fp32 at a time
EXTRA_DIRECTIONS, POWER_ITERATIONS = 8, 4  # oversampling and power iterations of the randomised SVD


class Layer(Protocol):
    """What a variant uses of a LoRALinear, which holds the tensors of its variant under their names."""

    base_layer: nn.Linear
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    lora_A0: Tensor  # of PiSSA; otherwise None
    lora_B0: Tensor
    lora_magnitude_vector: nn.Parameter  # of DoRA; otherwise None


@dataclass(frozen=True)
class LoRA:
    """Plain LoRA: W = W0 + scale * B A."""

    alone: ClassVar[bool] = False  # whether a layer is computed by `forward` only, and not together with others
    trained: ClassVar[tuple[str, ...]] = ()  # vectors (out,) that are trained and saved beside A and B
    frozen: ClassVar[tuple[str, ...]] = ()  # buffers that a checkpoint holds

    def initialise(self, layer: Layer) -> None:
        """Set the variant's own tensors in a layer whose A and B are there."""

    def starting_at(self, product: "LoRA") -> "LoRA":
        """This variant with the product of another one."""
        return product

    def pair(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """An A (rank, in) and a B (out, rank) whose product is the update. Gradients reach the trained ones."""
        return layer.lora_A, layer.lora_B

    def forward(self, layer: Layer, x: Tensor, dropout: float) -> Tensor:
        """The output of one layer by its plain formula. Any base can be below it. (..., in) -> (..., out)"""
        return layer.base_layer(x) + plain_update(x, *self.pair(layer), layer.scale, dropout)

    def delta(self, layer: Layer) -> Tensor:
        """The merged weight minus W0. (out, in)"""
        A, B = self.pair(layer)
        return layer.scale * (B @ A)

    def merged(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, own: Mapping[str, Tensor]) -> Tensor:
        """The merged weight in fp32, from the tensors of an adapter's file. own: those of `trained`. (out, in)"""
        return weight.to(torch.float32, copy=True).addmm_(B, A, alpha=scale)


class PiSSA(LoRA):
    """PiSSA (arXiv:2404.02948) without a residual: W = W0 + scale * (B A - B0 A0).

    A0 and B0 are the largest singular directions of W0, where A and B start. W0 does not change.
    """

    frozen = ("lora_A0", "lora_B0")

    @torch.no_grad()
    def initialise(self, layer: Layer) -> None:
        """Put the start into A and B, and keep a copy of it."""
        layer.lora_A0, layer.lora_B0 = main_directions(layer.base_layer.weight, len(layer.lora_A), layer.scale)
        layer.lora_A.copy_(layer.lora_A0)
        layer.lora_B.copy_(layer.lora_B0)

    def pair(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """B A - B0 A0 = B (A - A0) + (B - B0) A0, a product of rank 2r.

        It is exactly zero at the start, without a rounded residual of W0. It is also good in bf16, where a difference
        of products is not.
        """
        A, B, A0, B0 = layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0
        return torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1)


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA (arXiv:2402.09353): the rows of W0 + scale * B A, each scaled to its trained magnitude.

    product: the variant whose product is the update
    """

    alone = True
    trained = ("lora_magnitude_vector",)
    product: LoRA = LoRA()

    def initialise(self, layer: Layer) -> None:
        """Let the magnitudes start as the norms of the rows, so that training starts at W0."""
        layer.lora_magnitude_vector = nn.Parameter(self.norm(layer))

    def starting_at(self, product: LoRA) -> LoRA:
        """DoRA over the product of another variant."""
        return DoRA(product)

    def pair(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The pair of the product."""
        return self.product.pair(layer)

    def norm(self, layer: Layer) -> Tensor:
        """The norm of each row of W0 + scale * B A. (out,)"""
        return weight_norm(layer.base_layer.weight, *self.pair(layer), layer.scale)

    def forward(self, layer: Layer, x: Tensor, dropout: float) -> Tensor:
        """`dora_linear` of the layer's tensors. (..., in) -> (..., out)"""
        base, (A, B) = layer.base_layer, self.pair(layer)
        return dora_linear(x, base.weight, base.bias, A, B, layer.lora_magnitude_vector, layer.scale, dropout)

    def delta(self, layer: Layer) -> Tensor:
        """The merged weight minus W0. (out, in)"""
        weight, gain = layer.base_layer.weight, layer.lora_magnitude_vector / self.norm(layer)
        return gain[:, None] * (weight + self.product.delta(layer)) - weight

    def merged(self, weight: Tensor, A: Tensor, B: Tensor, scale: float, own: Mapping[str, Tensor]) -> Tensor:
        """The merged weight in fp32, from the tensors of an adapter's file. (out, in)"""
        summed = self.product.merged(weight, A, B, scale, own)
        length = torch.linalg.vector_norm(summed, dim=1, keepdim=True).clamp_min_(torch.finfo(summed.dtype).tiny)
        return summed.mul_(own["lora_magnitude_vector"][:, None] / length)


def plain_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """What the low-rank path adds. x: (..., in) -> (..., out)"""
    return scale * F.linear(F.linear(F.dropout(x, dropout), lora_A.to(x.dtype)), lora_B.to(x.dtype))


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
    x = as_autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        gain = magnitude / weight_norm(weight, A, B, scale)  # (out,), fp32: bf16 rounds away a change below 0.4 %
    A, B = A.to(x.dtype), B.to(x.dtype)
    dropped = F.dropout(x, dropout) if dropout else x
    y = gain * (frozen_linears(dropped, [(weight, None)])[0] + F.linear(scale * F.linear(dropped, A), B))
    if dropout:
        y = y + frozen_linears(x - dropped, [(weight, None)])[0]
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
