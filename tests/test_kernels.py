"""The leaner norm, MLP and attention beside the Hugging Face modules that they equal."""

import dataclasses
import shutil
import signal
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from conftest import relative_error

from minilora import kernels, loop
from minilora.errors import ConfigError, StoppedError
from minilora.models import families
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

TOKENS = 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.mlp"])
def test_norm_and_mlp_are_hugging_faces_to_the_bit(load_tiny, name, dtype):
    theirs = load_tiny(dtype).get_submodule(name).requires_grad_(True)
    policy = kernels.Policy("cpu")

    def norm(x):
        return policy.rms_norm(x, theirs.weight, theirs.variance_epsilon)

    def mlp(x):
        return theirs.down_proj(policy.swiglu(theirs.gate_proj(x), theirs.up_proj(x)))

    torch.manual_seed(0)
    x, dy = (torch.randn(1, TOKENS, 64).to(dtype) for _ in range(2))
    results = []
    for function in (theirs, norm if name.endswith("norm") else mlp):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, *theirs.parameters()], dy)))
    (expected, *wanted), (y, *found) = results
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.dtype == reference.dtype
        assert relative_error(gradient, reference) < (1e-6 if dtype == torch.float32 else 2e-2)


def test_gradcheck_of_the_norm():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: kernels._RMSNorm.apply(x, w, 1e-3, kernels.eager), (x, weight.requires_grad_())
    )


def test_gradcheck_of_the_mlps_product():
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: kernels._SwiGLU.apply(gate, up, kernels.eager), (gate, up))


def test_rotary_is_hugging_faces_and_so_is_its_gradient():
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    torch.manual_seed(0)
    angles = torch.rand(1, 7, 4, dtype=torch.float64)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    x = torch.randn(1, 7, 3, 8, dtype=torch.float64, requires_grad=True)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    y = kernels._Rotary.apply(x, cos, sin, kernels.eager)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(y)
    (found,), (wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------- torch.compile

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_chains_are_the_eager_ones_but_for_rounding(dtype):
    """For all numbers of tokens, with no kernel compiled again for each."""
    torch.manual_seed(0)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for tokens in (8, 24, 304):
        x, dy = torch.randn(2, 1, tokens, 64).to(dtype)
        gate, up, d_out = torch.randn(3, 1, tokens, 96).to(dtype)
        weight, rstd = torch.rand(64).to(dtype) + 0.5, torch.rand(1, tokens, 1) + 0.5
        query, (cos, sin) = torch.randn(1, tokens, 4, 16).to(dtype), torch.rand(2, 1, tokens, 16).to(dtype)
        for function, inputs in {
            kernels._norm: (x, weight, 1e-6),
            kernels._norm_backward: (dy, x, rstd, weight, False),
            kernels._swiglu: (gate, up),
            kernels._swiglu_backward: (d_out, gate, up),
            kernels._rotate: (query, cos, sin),
        }.items():
            expected, found = function(*inputs), kernels.compiled(function)(*inputs)
            pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
            for wanted, got in pairs:
                assert (wanted is None) == (got is None)
                assert got is None or (got.dtype == wanted.dtype and relative_error(got, wanted) < bound)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    kernels.compiled(kernels._swiglu)(*torch.randn(2, 1, 80, 96).to(dtype))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@needs_compiler
def test_a_run_with_compiled_chains_learns_the_same(start, tmp_path):
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain, quick = start(), start(torch_compile=True, output_dir=str(tmp_path / "quick"))
    compiled_before_the_first_step = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled_before_the_first_step > before
    called = []
    assert quick.decoder.policy.wrap is kernels.compiled
    wrap = lambda function: called.append(function) or kernels.compiled(function)  # noqa: E731
    quick.decoder.policy = dataclasses.replace(quick.decoder.policy, wrap=wrap)
    losses = [[loop.train_step(run)["loss"] for _ in range(3)] for run in (plain, quick)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_before_the_first_step
    names = {function.__name__ for function in called}
    assert names == {"_norm", "_norm_backward", "_swiglu", "_swiglu_backward", "_rotate"}


@needs_compiler
def test_the_result_of_a_compiled_run_is_verified_as_any_other(make_config, tmp_path):
    """Compiled kernels round otherwise than the fresh base that the result is loaded into."""
    plain = loop.train(make_config(dtype="bfloat16"))
    quick = loop.train(make_config(dtype="bfloat16", torch_compile=True, output_dir=str(tmp_path / "quick")))
    assert quick.verified_max_logit_difference == plain.verified_max_logit_difference


@pytest.fixture
def broken_compiler(monkeypatch):
    """torch.compile fails; returns a function that is called then."""
    on_failure = mock.Mock()

    def compiled(function):
        def fails(*_):
            on_failure()
            raise RuntimeError("no C++ compiler\nand more")

        return fails

    monkeypatch.setattr(families, "compiled", compiled)
    return on_failure


def test_without_a_compiler_the_key_is_refused_in_one_line(start, broken_compiler):
    with pytest.raises(ConfigError, match=r"^torch_compile: .*\(no C\+\+ compiler\). Leave it out.$"):
        start(torch_compile=True)
    broken_compiler.assert_called_once()


def test_a_signal_that_meets_the_compiler_is_told_as_a_signal(make_config, broken_compiler):
    with StopRequest() as stop, ExitStack() as held:
        broken_compiler.side_effect = lambda: setattr(stop, "signal_number", signal.SIGTERM)
        with pytest.raises(StoppedError, match="stopped by SIGTERM"):
            prepare(make_config(torch_compile=True), stop, held)
