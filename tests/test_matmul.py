"""Products with frozen weights: equal to `F.linear`, in the dtype of x, and with nothing but the weights kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora.kernels import Policy
from minilora.lora import LoRALinear, linear, project
from minilora.lora_variants import dora_linear
from minilora.matmul import frozen_linears, products, products_backward

IN, OUTS = 12, (7, 4)
CPU = Policy("cpu")


def operands(dtype=torch.float64, shape=(2, 5)):
    """x, which requires a gradient, and two layers, the second without a bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = [torch.randn(out, IN, generator=generator, dtype=torch.float64).to(dtype) for out in OUTS]
    return x, [
        (weights[0], torch.randn(OUTS[0], generator=generator, dtype=torch.float64).to(dtype)),
        (weights[1], None),
    ]


@pytest.mark.parametrize("shape", [(), (4,), (2, 5), (0,)])
def test_they_are_those_of_linear(shape):
    x, layers = operands(shape=shape)
    expected = [F.linear(x, *layer) for layer in layers]
    dys = [torch.randn_like(y) for y in expected]
    (wanted,) = torch.autograd.grad(expected, x, dys)
    ys = frozen_linears(x, layers)
    (found,) = torch.autograd.grad(ys, x, dys)
    for ours, theirs in zip((*ys, found), (*expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert all(map(torch.equal, frozen_linears(x, layers), ys))


def test_gradcheck():
    x, layers = operands()
    assert torch.autograd.gradcheck(lambda x: frozen_linears(x, layers), (x,))


def test_a_product_has_the_dtype_of_x_whatever_the_weights_are():
    """A base in bf16 and products in fp32, both ways, and by way of each kind of layer."""
    x, layers = operands(torch.bfloat16, (9,))
    x = x.detach().float()
    wide = [(W.float(), None if b is None else b.float()) for W, b in layers]
    ys = products(x, layers)
    assert all(map(torch.equal, ys, products(x, wide)))
    dys = [torch.randn_like(y) for y in ys]
    expected = sum(dy @ W for dy, (W, _) in zip(dys, wide, strict=True))
    found = products_backward(dys, [W for W, _ in layers])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    for enabled, dora in ((False, False), (True, False), (True, True)):
        results = []
        for W, b in (layers[0], wide[0]):
            base = nn.Linear(IN, OUTS[0])
            base.weight, base.bias = nn.Parameter(W), nn.Parameter(b)
            torch.manual_seed(0)
            layer = LoRALinear(base, 3, 6, dora=dora)
            layer.enabled = enabled
            nn.init.normal_(layer.lora_B)
            given = x.clone().requires_grad_()
            y = linear(given, layer, CPU)
            results.append((y, *torch.autograd.grad(y, given, dys[0])))
        assert all(map(torch.equal, *results))
        assert {tensor.dtype for tensor in results[0]} == {torch.float32}


def test_under_autocast_a_product_has_its_dtype():
    x, layers = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ys = frozen_linears(x, layers)
        expected = [F.linear(x, *layer) for layer in layers]
    assert all(map(torch.equal, ys, expected))
    (dx,) = torch.autograd.grad(ys, x, [torch.ones_like(y) for y in ys])
    assert dx.dtype == torch.float32


def saved_by(function):
    """The tensors that the backward pass of what is computed in here keeps."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function()
    return saved


def test_nothing_is_kept_but_the_weights():
    """They are no saved tensors: a layer that checkpointing computes again would have to go through their products."""
    x, layers = operands(torch.bfloat16)
    x = x.detach().float().requires_grad_()
    outputs = []
    assert not saved_by(lambda: outputs.extend(frozen_linears(x, layers)))
    assert all(kept is weight for kept, (weight, _) in zip(outputs[0].grad_fn.weights, layers, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_keeps_no_converted_copy_of_the_weight(dropout):
    x, layers = operands(torch.bfloat16)
    (weight, bias), x = layers[0], x.detach().float().requires_grad_()
    A, B, magnitude = (torch.randn(size).requires_grad_() for size in ((3, IN), (OUTS[0], 3), (OUTS[0],)))
    saved = saved_by(lambda: dora_linear(x, weight, bias, A, B, magnitude, 2.0, dropout))
    as_large = [t for t in saved if t.shape == weight.shape]
    assert not as_large


def test_a_frozen_layer_gets_no_gradient_and_a_trained_one_does():
    x = torch.randn(4, IN, requires_grad=True)
    frozen, trained = nn.Linear(IN, 7).requires_grad_(False), nn.Linear(IN, 4)
    for layers in ([frozen, frozen], [frozen, trained], [trained, trained]):
        trained.zero_grad()
        ys = project(x, layers, CPU)
        for y, layer in zip(ys, layers, strict=True):
            torch.testing.assert_close(y, layer(x))
        sum(y.sum() for y in ys).backward()
        assert frozen.weight.grad is None
        assert frozen.bias.grad is None
        assert (trained.weight.grad is not None) == (trained in layers)


def test_frozen_layers_share_one_product_of_the_gradient():
    """Disabled LoRALinears are frozen layers, too."""
    x = torch.randn(4, IN, requires_grad=True)
    off = LoRALinear(nn.Linear(IN, 7), 3, 6)
    off.enabled = False
    one, other = project(x, (off, nn.Linear(IN, 4).requires_grad_(False)), CPU)
    assert one.grad_fn is other.grad_fn
    torch.testing.assert_close(one, off.base_layer(x))
