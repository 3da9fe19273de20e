"""A second derivative through a hand-written backward pass is refused: it would be wrong without a word."""

import pytest
import torch

from minilora.attention import Layout, Placement, packed_attention
from minilora.kernels import _RMSNorm, _Rotary, _SwiGLU, eager
from minilora.lora import lora_linear, plain_lora_linear
from minilora.loss import plain_nats, token_nats

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W, A, B = X.new_ones(5, 6), X.new_ones(2, 6), X.new_full((5, 2), 0.1)
TARGETS = torch.tensor([0, 1, 2, 3])


def attention(x):
    q = x.reshape(4, 1, 6)
    return packed_attention(q, q, q, Placement(Layout((4,)), x.device), 0.3, "cpu")


FUNCTIONS = {
    "lora_linear": lambda x: lora_linear(x, W, None, A, B * x.sum(), 2.0, 0.0),
    "token_nats": lambda x: token_nats(x, W, TARGETS),
    "RMSNorm": lambda x: _RMSNorm.apply(x, X.new_ones(6), 1e-6, eager),
    "SwiGLU": lambda x: _SwiGLU.apply(x, 2 * x, eager),
    "rotary embedding": lambda x: _Rotary.apply(x.view(1, 4, 1, 6), X.view(1, 4, 6), X.view(1, 4, 6), eager),
    "attention": attention,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_an_error(name):
    """Also where x has another path to the result: a Hessian-vector product once lacked the function's own part."""
    x = X.clone().requires_grad_()
    y = FUNCTIONS[name](x).square().sum() + x.pow(3).sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(y, x, create_graph=True)
    assert torch.autograd.grad(FUNCTIONS[name](x).sum(), x)[0].isfinite().all()


def test_the_plain_formulas_have_second_derivatives():
    for function in (lambda x: plain_lora_linear(x, W, None, A, B, 2.0, 0.0), lambda x: plain_nats(x, W, TARGETS)):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(gradient.sum(), x)[0].abs().max() > 0
