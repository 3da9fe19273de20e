"""Storages followed from their making to their end; FLOPs; the ways of a device that is not there."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from minilora.attention import Layout, Placement, packed_attention
from minilora.training.memory_trace import Watch, policy_as_on, to_fake


def test_bytes_alive_and_at_the_peak():
    known = torch.zeros(1000)
    with Watch([known]) as seen:
        a = torch.zeros(100)  # 400 bytes
        view = a[:50]
        seen.mark()
        b = torch.zeros(200) + known[:200]  # twice 800, half of it gone
        del a
        assert seen.alive_bytes == 400 + 800, "a view keeps its storage alive"
        del view
        assert seen.alive_bytes == 800
        seen.mark()
    assert seen.peaks_bytes == [400, 400 + 800 + 800, 800]
    assert seen.peak_bytes == 2000
    assert b.untyped_storage().nbytes() == seen.alive_bytes


def test_what_autograd_saves_is_alive():
    x = torch.zeros(256, requires_grad=True)
    with Watch([x]) as seen:
        y = x.exp().exp()  # each keeps its result
        total = y.sum()
        del y
        assert seen.alive_bytes == 2 * 1024 + 4
        total.backward()
        del total
    assert seen.alive_bytes == 1024, "only the gradient is left"
    assert x.grad is not None


def products(causal: bool) -> int:
    """FLOPs of a linear layer and of attention, forward and backward, by our count."""
    x, weight = torch.randn(2, 64, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    with Watch([x, weight]) as seen:
        q = F.linear(x, weight).view(2, 64, 3, 16).transpose(1, 2)
        F.scaled_dot_product_attention(q, q, q, is_causal=causal).sum().backward()
    return seen.flops


def test_flops_of_products_are_torchs_own_and_attention_counts_what_is_not_masked():
    x, weight = torch.randn(2, 64, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:  # it does not know attention on a CPU
        F.linear(x, weight).sum().backward()
    square = 7 * 2 * 2 * 3 * 64 * 64 * 16  # 2 products forward, 5 backward; batch, heads, length, length, head_dim
    assert products(causal=False) == counter.get_total_flops() + square
    assert products(causal=True) == counter.get_total_flops() + square // 2


def test_packed_attention_as_on_cuda_counts_the_causal_half():
    heads, tokens, dim = 4, 64, 16
    with FakeTensorMode():
        q = torch.empty(tokens, heads, dim, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(tokens, 2, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        with Watch([q, k, v]) as seen:
            out = packed_attention(q, k, v, Placement(Layout((32, 32)), q.device), dim**-0.5, "cuda")
            assert out.shape == (tokens, heads, dim)
            out.sum().backward()
    assert q.grad.shape == q.shape
    assert seen.flops == 7 * 2 * heads * tokens * (32 // 2) * dim


@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.int64), ("cuda", torch.bool)])
def test_dropout_on_fake_tensors_has_the_form_of_the_device(device_type, dtype):
    with FakeTensorMode():
        dropped = policy_as_on(device_type).draw(torch.empty(40, 50), 0.05)
    assert dropped.dtype == dtype
    assert dropped.numel() == (2000 if device_type == "cuda" else 100)


def test_to_fake_keeps_what_is_tied(load_tiny):
    tiny = load_tiny()
    with FakeTensorMode():
        to_fake(tiny)
    assert tiny.lm_head.weight is tiny.model.embed_tokens.weight
    assert all(type(tensor).__name__ in ("FakeTensor", "Parameter") for tensor in tiny.parameters())
    assert all(hasattr(tensor, "fake_mode") for tensor in [*tiny.parameters(), *tiny.buffers()])
