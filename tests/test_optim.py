"""The learning rate as a function of the step, and AdamW's groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minilora.lora import inject, lora_layers
from minilora.optim import learning_rate, make_optimizer

SHAPES = ("cosine", "linear", "constant")


@settings(max_examples=100)
@given(st.integers(1, 300), st.sampled_from(SHAPES), st.floats(0, 1))
def test_the_rate_rises_to_the_peak_and_falls_and_is_never_zero(num_steps, shape, warmup_ratio):
    peak = 1.0  # so that peak * k / k is the peak to the bit
    rates = [learning_rate(step, num_steps, peak, shape, warmup_ratio) for step in range(num_steps)]
    assert all(0 < rate <= peak for rate in rates)
    assert max(rates) == peak
    warmup = math.ceil(warmup_ratio * num_steps)
    assert rates[max(0, warmup - 1)] == peak  # the last step of the warm-up
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(set(rising))  # strictly
    assert falling == sorted(falling, reverse=True)
    if shape != "constant":
        assert len(set(falling)) == len(falling)
    else:
        assert set(falling) <= {peak}
    reversed_rates = [learning_rate(step, num_steps, peak, shape, warmup_ratio) for step in reversed(range(num_steps))]
    assert reversed_rates[::-1] == rates
    halved = [learning_rate(step, num_steps, peak / 2, shape, warmup_ratio) for step in range(num_steps)]
    assert halved == [rate / 2 for rate in rates]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("num_steps", "warmup_ratio"), [(40, 0.1), (40, 0.0), (7, 0.3), (100, 1.0), (1, 0.1)])
def test_against_hugging_faces_schedule(shape, num_steps, warmup_ratio):
    """The warm-up is theirs a step later (their first step has rate 0 and learns nothing), the decay is theirs."""
    import transformers

    make = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
        "constant": lambda optimizer, warmup, _: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    }[shape]
    peak, warmup = 2e-4, math.ceil(num_steps * warmup_ratio)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = make(optimizer, warmup, num_steps)
    theirs = []
    for _ in range(num_steps + 1):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    for step in range(num_steps):
        expected = theirs[step + 1] if step < warmup else theirs[step]
        if step + 1 == warmup == num_steps:  # they decay from the peak and fall to 0 at once; their run is over
            expected = peak
        ours = learning_rate(step, num_steps, peak, shape, warmup_ratio)
        assert ours == pytest.approx(expected, rel=1e-12), step


def test_matrices_are_decayed_and_vectors_are_not(load_tiny):
    model = load_tiny().requires_grad_(True)
    optimizer = make_optimizer(model, weight_decay=0.3)
    decay = {id(param): group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, param in model.named_parameters():
        assert decay[id(param)] == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name


def test_only_what_is_trained_is_optimized(load_tiny):
    model = load_tiny()
    inject(model, ["q_proj"], rank=2, alpha=2)
    optimizer = make_optimizer(model, weight_decay=0.1)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    assert held == {id(param) for layer in lora_layers(model).values() for param in (layer.lora_A, layer.lora_B)}
    assert all(group["params"] for group in optimizer.param_groups)


def test_the_groups_of_lora_plus(load_tiny):
    """B's rate alone is multiplied (arXiv:2402.12354, section 4.1), not A's and not that of DoRA's magnitudes."""
    model = load_tiny()
    inject(model, ["q_proj", "up_proj"], rank=2, alpha=2, dora=True)
    optimizer = make_optimizer(model, weight_decay=0.1, loraplus_lr_ratio=16.0)
    found = {
        id(param): (group["weight_decay"], group["lr_ratio"])
        for group in optimizer.param_groups
        for param in group["params"]
    }
    expected = {}
    for layer in lora_layers(model).values():
        expected |= {id(layer.lora_A): (0.1, 1.0), id(layer.lora_B): (0.1, 16.0)}
        expected |= {id(layer.lora_magnitude_vector): (0.0, 1.0)}
    assert found == expected
    plain = make_optimizer(load_tiny().requires_grad_(True), weight_decay=0.1)
    assert {group["lr_ratio"] for group in plain.param_groups} == {1.0}


def test_a_step_is_adamw_by_the_paper():
    """arXiv:1711.05101, algorithm 2, in fp64 by hand, over three steps; the vector is not decayed."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = make_optimizer(model, weight_decay=0.1)
    mine = {
        name: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for step in range(1, 4):
        rate = 0.01 * step
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, param in model.named_parameters():
            param.grad = torch.randn_like(param)
            value, first, second = mine[name]
            first = 0.9 * first + 0.1 * param.grad
            second = 0.999 * second + 0.001 * param.grad**2
            value = value * (1 - rate * (0.1 if name == "weight" else 0.0))
            value = value - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            mine[name] = (value, first, second)
        optimizer.step()
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.detach(), mine[name][0], rtol=0, atol=1e-12)
