"""Storages followed from their making to their end; FLOPs; the ways of a device that is not there."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from minilora import attention, decoder, lora, loss
from minilora.attention import Layout
from minilora.training import memory_trace
from minilora.training.memory_trace import Watch, as_on, patched, to_fake


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
    with FakeTensorMode(), as_on("cuda"):
        q = torch.empty(1, heads, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(1, 2, tokens, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        with Watch([q, k, v]) as seen:
            out, _ = decoder.packed_attention(None, q, k, v, None, layout=Layout((32, 32)))
            assert out.shape == (1, tokens, heads, dim)
            out.sum().backward()
    assert q.grad.shape == q.shape
    assert seen.flops == 7 * 2 * heads * tokens * (32 // 2) * dim


def test_the_ways_of_cuda_leave_nothing_behind():
    names = {(decoder, "packed_attention"), (lora, "Policy"), (decoder, "Policy"), (loss, "WIDE_ROWS")}
    names.add((attention, "_varlen_layout"))
    before = {key: getattr(*key) for key in names}
    with as_on("cuda"):
        assert all(getattr(*key) is not value for key, value in before.items())
    assert all(getattr(*key) is value for key, value in before.items())


def test_a_name_that_is_gone_is_no_silent_patch():
    with pytest.raises(AttributeError), patched(memory_trace, no_such_name=1):
        pass


def test_to_fake_keeps_what_is_tied(load_tiny):
    tiny = load_tiny()
    with FakeTensorMode():
        to_fake(tiny)
    assert tiny.lm_head.weight is tiny.model.embed_tokens.weight
    assert all(type(tensor).__name__ in ("FakeTensor", "Parameter") for tensor in tiny.parameters())
    assert all(hasattr(tensor, "fake_mode") for tensor in [*tiny.parameters(), *tiny.buffers()])
