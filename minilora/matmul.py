"""Computes the products with frozen weights: the output of a frozen linear layer, and the gradient of its input."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.kernels import first_derivative_only

FrozenLinear = tuple[Tensor, Tensor | None]  # W (out, in), b (out,)


def products(x: Tensor, layers: Sequence[FrozenLinear]) -> list[Tensor]:
    """y = x W^T + b of each layer, in x's dtype. The outputs are new tensors. x: (tokens, in) -> (tokens, out) of each

    A weight of another dtype is converted for its product only.
    """
    return [F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) for weight, bias in layers]


def products_backward(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The gradient of the x that layers share: the sum of dy W. dys: (tokens, out) of each layer -> (tokens, in)"""
    dx = dys[0] @ weights[0].to(dys[0].dtype)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight.to(dy.dtype))
    return dx


def frozen_linears(x: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    """The outputs of frozen linear layers that read the same x. (..., in) -> (..., out) of each

    The backward pass keeps only the weights: no x, and no converted copy of a weight.
    """
    x = as_autocast(x)
    if not torch.is_grad_enabled():
        return _outputs(x, layers)
    weights, biases = zip(*layers, strict=True)
    return _FrozenLinears.apply(x, biases, *weights)


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch.autocast sets for its device. Without autocast, x itself."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _outputs(x: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in products(flat, layers))


class _FrozenLinears(torch.autograd.Function):
    """y = x W^T + b of each layer, and dx = sum of dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, biases: Sequence[Tensor | None], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.weights = weights  # not saved tensors: a layer that is computed again can stop before these products
        return _outputs(x, list(zip(weights, biases, strict=True)))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grad_outputs]  # (tokens, out) of each
        dx = products_backward(dys, ctx.weights)  # (tokens, in)
        return dx.view(*grad_outputs[0].shape[:-1], dx.shape[-1]), None, *([None] * len(dys))
