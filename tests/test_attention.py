"""Packed examples: each is seen as if it were alone."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Sizes, random_examples, randomize_lora, relative_error

from minilora import attention
from minilora.attention import Layout, Placement, plain_attention
from minilora.batching import collate
from minilora.data.dataset import IGNORE, Example
from minilora.lora import inject, lora_layers
from minilora.models.families import decoder_of
from minilora.objectives.sft import SFT

LENGTHS = [17, 2, 40, 9, 26]


def fp32_decoder(model, **keys):
    return decoder_of(model, torch.float32, "cpu", **keys)


def packed_attention(query, key, value, layout, scale=0.3):
    """The attention of the device that the operands are on."""
    device = query.device
    return attention.packed_attention(query, key, value, Placement(layout, device), scale, device.type)


def all_hidden(model, examples, device="cpu"):
    """Final hidden states at every position of packed examples, one tensor for each of them."""
    batch = collate(examples)
    everywhere = dataclasses.replace(batch, rows=torch.arange(batch.input_ids.numel())).to(torch.device(device))
    with torch.no_grad():
        hidden = decoder_of(model, next(model.parameters()).dtype, device)(everywhere)
    assert len(hidden) == sum(batch.layout.lengths) + batch.layout.padding
    return hidden[: sum(batch.layout.lengths)].split(batch.layout.lengths)


def test_packed_logits_are_those_of_each_example_alone(load_tiny):
    model = load_tiny()
    examples = random_examples(LENGTHS)
    together = all_hidden(model, examples)
    for example, hidden in zip(examples, together, strict=True):
        ids = torch.from_numpy(example.input_ids[None, :-1]).long()
        with torch.no_grad():
            alone = model(input_ids=ids).logits[0]
        torch.testing.assert_close(F.linear(hidden, model.lm_head.weight), alone, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_those_of_the_supervised_rows(load_tiny):
    model = load_tiny()
    examples = random_examples(LENGTHS)
    batch = collate(examples)
    with torch.no_grad():
        rows = fp32_decoder(model)(batch)
    torch.testing.assert_close(rows, torch.cat(all_hidden(model, examples))[batch.rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_no_example_sees_another(load_tiny, changed):
    """Other tokens in one example leave the hidden states of all others as they are, to the bit."""
    model = load_tiny()
    examples = random_examples(LENGTHS)
    before = all_hidden(model, examples)
    examples[changed] = random_examples([LENGTHS[changed]], seed=99)[0]
    after = all_hidden(model, examples)
    for index in range(len(LENGTHS)):
        assert torch.equal(before[index], after[index]) == (index != changed)


def test_no_token_sees_a_later_one(load_tiny):
    model = load_tiny()
    examples = random_examples(LENGTHS)
    before = all_hidden(model, examples)[2]
    ids = examples[2].input_ids.copy()
    ids[25] += 1
    after = all_hidden(model, [*examples[:2], Example(ids, ids), *examples[3:]])[2]
    assert torch.equal(before[:25], after[:25])
    assert not torch.equal(before[25:], after[25:])


def test_nobody_sees_the_padding_and_it_has_no_gradient(load_tiny):
    """Other tokens there leave loss and gradients of a step as they are, to the bit."""
    model = load_tiny()
    inject(model, ["q_proj", "k_proj", "v_proj", "o_proj"], rank=4, alpha=8)
    randomize_lora(model, std=0.05)
    batch = collate(random_examples(LENGTHS))
    assert batch.layout.padding > 0
    found = []
    for token in (0, 7):
        batch.input_ids[0, -batch.layout.padding :] = token
        model.zero_grad()
        nats = SFT().loss(fp32_decoder(model.train()), batch)
        nats.backward()
        found.append([nats, *(p.grad for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))])
    assert all(map(torch.equal, *found))


def test_nothing_quadratic_in_the_packed_length_is_made(load_tiny):
    """transformers' own packing by position_ids would build a dense (T, T) mask."""
    model = load_tiny()
    batch = collate(random_examples([13] * 60))
    total = sum(batch.layout.lengths)
    with Sizes() as seen, torch.no_grad():
        fp32_decoder(model)(batch)
    assert seen.largest < total * total


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(load_tiny, dropout):
    """Reentrant checkpointing over a frozen embedding silently gives none; a mask drawn anew gives other ones."""
    model = load_tiny()
    inject(model, ["q_proj", "v_proj", "down_proj"], rank=4, alpha=8, dropout=dropout)
    randomize_lora(model)
    batch = collate(random_examples(LENGTHS))
    found = []
    for checkpointing in (False, True):
        each = copy.deepcopy(model)
        torch.manual_seed(0)
        with Sizes() as seen:
            SFT().loss(fp32_decoder(each.train(), checkpointing=checkpointing), batch).backward()
        grads = [p.grad for layer in lora_layers(each).values() for p in (layer.lora_A, layer.lora_B)]
        assert all(grad.abs().max() > 0 for grad in grads)
        found.append((grads, sum("silu" in name for name, _, _ in seen.made)))
    (plain, plain_silu), (recomputed, twice_silu) = found
    assert all(map(torch.equal, plain, recomputed))
    assert twice_silu > plain_silu  # the layers did run again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_varlen_on_cuda_equals_sdpa_one_by_one():
    """bf16 outputs and gradients of the varlen path against SDPA of each example; both against fp64."""
    lengths, heads, kv_heads, size = (64, 1, 200, 33), 8, 2, 64
    total = sum(lengths)
    torch.manual_seed(0)
    shapes = [(total, heads, size), (total, kv_heads, size), (total, kv_heads, size)]
    draws = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    dy = torch.randn(total, heads, size, device="cuda", dtype=torch.bfloat16)

    def one_by_one(q, k, v):
        parts = zip(*(tensor.transpose(0, 1).split(lengths, 1) for tensor in (q, k, v)), strict=True)
        outputs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(outputs, 1).transpose(0, 1)

    def results(function, dtype):
        leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in draws]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dy.to(dtype))]

    scaling = size**-0.5
    exact = results(one_by_one, torch.float64)
    sdpa = results(one_by_one, torch.bfloat16)
    ours = results(lambda q, k, v: packed_attention(q, k, v, Layout(lengths), scaling), torch.bfloat16)
    for name, truth, theirs, found in zip(("out", "dq", "dk", "dv"), exact, sdpa, ours, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative_error(found, truth) <= 1.5 * relative_error(theirs, truth) + 1e-4, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_packed_bf16_model_on_cuda_equals_each_example_alone(load_tiny):
    model = load_tiny(torch.bfloat16).cuda()
    exact = load_tiny(torch.float32).cuda()
    examples = random_examples(LENGTHS)
    for example, part in zip(examples, all_hidden(model, examples, "cuda"), strict=True):
        ids = torch.from_numpy(np.asarray(example.input_ids)[None, :-1]).long().cuda()
        with torch.no_grad():
            alone = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
            truth = exact.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        assert relative_error(part, truth) <= 1.5 * relative_error(alone, truth) + 1e-3


# ---------------------------------------------------------------------------------------- the CPU's own attention


def qkv(total, dtype=torch.float64, heads=4, kv_heads=2, size=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, heads, size), (total, kv_heads, size), (total, kv_heads, size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention_results(function, operands, dy):
    leaves = [tensor.clone().requires_grad_() for tensor in operands]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


@pytest.mark.parametrize("prefix", [0, 1, 70, 100])
@pytest.mark.parametrize(("lengths", "padding"), [((1,), 0), ((5, 1, 9), 7), ((64, 130, 3), 2), ((97, 200), 0)])
def test_blocks_of_queries_are_one_masked_softmax(lengths, prefix, padding):
    """Forward and all gradients against SDPA with a mask, in fp64; examples and prefix longer than a block too."""
    layout = Layout(lengths, prefix, padding)
    total = prefix + sum(lengths) + padding
    operands = qkv(total)
    dy = torch.randn(total, 4, 8, dtype=torch.float64)
    exact = attention_results(lambda q, k, v: plain_attention(q, k, v, layout, 0.3), operands, dy)
    ours = attention_results(lambda q, k, v: packed_attention(q, k, v, layout), operands, dy)
    for theirs, found in zip(exact, ours, strict=True):
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 20])
def test_blocks_in_bf16_are_as_exact_as_sdpa(prefix):
    layout = Layout((70, 33, 100), prefix)
    total = prefix + sum(layout.lengths)
    operands, dy = qkv(total, torch.bfloat16), torch.randn(total, 4, 8).bfloat16()

    def plain(q, k, v):
        return plain_attention(q, k, v, layout, 0.3)

    exact = attention_results(plain, [tensor.double() for tensor in operands], dy)
    sdpa = attention_results(plain, operands, dy)

    def packed_under_autocast(q, k, v):  # the backward runs outside, as in the loop
        with torch.autocast("cpu", torch.bfloat16):
            return packed_attention(q, k, v, layout)

    ours = attention_results(packed_under_autocast, operands, dy)
    for name, truth, theirs, found in zip(("out", "dq", "dk", "dv"), exact, sdpa, ours, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative_error(found, truth) <= 1.5 * relative_error(theirs, truth), name


def test_a_shared_prefix_gives_the_same_states_and_gradients(load_tiny):
    """Computed once it stands for its copy in every example, and collects the gradients of all of them."""
    model = load_tiny()
    inject(model, ["q_proj", "k_proj", "v_proj", "down_proj"], rank=4, alpha=8)
    randomize_lora(model, std=0.05)
    shared = random_examples([30], seed=5)[0].input_ids[:9]
    examples = []
    for example in random_examples(LENGTHS):
        ids = np.concatenate([shared, example.input_ids])
        examples.append(Example(ids, np.concatenate([np.full(9, IGNORE, np.int32), example.labels])))
    found = []
    for share in (False, True):
        batch = collate(examples, share)
        assert batch.layout.prefix == (9 if share else 0)
        model.zero_grad()
        hidden = fp32_decoder(model.train())(batch)
        SFT().loss(fp32_decoder(model), batch).backward()
        grads = [p.grad for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
        found.append((hidden, batch.targets, grads))
    (alone, targets, expected), (together, same_targets, grads) = found
    assert torch.equal(targets, same_targets)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_backward_under_autocast_is_the_same():
    """A loop of one's own may call backward inside autocast, which once took the fp32 scores there to bf16."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(40, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2))
    found = []
    for enabled in (False, True):
        out = packed_attention(query, key, value, Layout((30, 10)))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out.sum(), (query, key, value)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------- the call of CUDA


def by_segment(q, k, v, cu_q, cu_k, scale):
    """What FlashAttention computes of segments end to end, causal from the lower right corner; heads are equal."""
    parts = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", q[a:b], k[c:d])
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(parts)


def of_torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert k.shape[1] == q.shape[1], "no grouped queries"
    assert window_size == (-1, 0), "causal"
    return by_segment(q, k, v, cu_q, cu_k, scale)


def of_torch_2_13(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return of_torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("varlen_attn", [of_torch_2_11, of_torch_2_13])
@pytest.mark.parametrize("prefix", [0, 5])
def test_the_call_of_cuda_fits_both_signatures(monkeypatch, varlen_attn, prefix):
    """torch 2.11, the declared floor, has no `enable_gqa`: the first step on a card once failed there."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    layout = attention.Layout((7, 3), prefix, padding=2)
    tokens = prefix + 12
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    expected = attention.plain_attention(q, k, v, layout, 0.3)
    assert torch.allclose(attention._varlen(q, k, v, Placement(layout, q.device), 0.3), expected)
