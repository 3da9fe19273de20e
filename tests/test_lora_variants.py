"""DoRA, LoRA+, PiSSA, and going on from an adapter: against dense maths, against PEFT, and through whole runs."""

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import IDS, Sizes, logits, random_examples, randomize_lora, relative_error
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import cli, loop, lora_variants
from minilora.adapters import format as adapter_format
from minilora.adapters.export import export_portable
from minilora.adapters.merge import merge
from minilora.batching import collate
from minilora.config import TARGET_GROUPS
from minilora.errors import AdapterError, ConfigError
from minilora.inference.multi_adapter import Adapters
from minilora.kernels import Policy
from minilora.lora import LoRALinear, inject, lora_layers, project
from minilora.lora_variants import dora_linear, main_directions, weight_norm
from minilora.models import trainable
from minilora.models.families import decoder_of
from minilora.models.fingerprint import fingerprint
from minilora.objectives.sft import SFT
from minilora.tools.verify import verify
from minilora.training import checkpoint, memory_estimate, setup
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

pytestmark = pytest.mark.usefixtures("bare_run")
IN, OUT, RANK = 12, 7, 3
ALL = TARGET_GROUPS["all"]


def draws(seed=0, shape=(2, 5), bias=True):
    """x, W, b, A, B, magnitude in fp64; all but W and b require gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(*shape, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK), (OUT,)]
    x, W, b, A, B, m = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return x.requires_grad_(), W, b if bias else None, A.requires_grad_(), B.requires_grad_(), m.requires_grad_()


# ---------------------------------------------------------------------------------------- DoRA, the maths


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_norm_of_the_sum_is_found_without_the_sum(dtype, wide, monkeypatch):
    monkeypatch.setattr(lora_variants, "NORM_ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(size, generator=generator) for size in ((70, 50), (4, 50), (70, 4)))
    W, A, B = W.to(dtype), A.to(wide), B.to(wide)
    W[3], B[3] = 0, 0
    expected = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    with Sizes() as sizes:
        found = weight_norm(W, A, B, 0.7)
    assert found.dtype == wide
    torch.testing.assert_close(found.double(), expected, rtol=1e-6 if wide == torch.float32 else 1e-12, atol=1e-15)
    assert sizes.largest < W.numel()
    assert found[3] > 0  # a row of zeros is divided by it


def dense_dora(x, W, b, A, B, m, scale, dropped):
    """The formula of the paper on a dense weight, with the norm as a constant; x as the base sees it, and dropped."""
    V = W + scale * B @ A
    gain = m / V.detach().norm(dim=1)
    y = F.linear(x, W) + F.linear(dropped, gain[:, None] * V - W)
    return y if b is None else y + b


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_the_dense_formula_and_its_norm_gets_no_gradient(bias, dropout, monkeypatch):
    x, W, b, A, B, m = draws(bias=bias)
    mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > dropout) / (1 - dropout)
    monkeypatch.setattr(F, "dropout", lambda x, p: x * mask)
    expected = dense_dora(x, W, b, A, B, m, 1.7, x * mask)
    dy = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, A, B, m), dy)
    y = dora_linear(x, W, b, A, B, m, 1.7, dropout)
    found = torch.autograd.grad(y, (x, A, B, m), dy)
    for ours, theirs in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_dora(dropout, monkeypatch):
    """With the norm held, as the gradient holds it."""
    x, W, b, A, B, m = draws()
    norm = weight_norm(W, A, B, 1.7)
    monkeypatch.setattr(lora_variants, "weight_norm", lambda *_: norm)

    def function(x, A, B, m):
        torch.manual_seed(3)  # the same mask at every evaluation
        return dora_linear(x, W, b, A, B, m, 1.7, dropout)

    assert torch.autograd.gradcheck(function, (x, A, B, m))


def dora_layer(seed=0, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(IN, OUT, dtype=dtype), RANK, alpha=5, dropout=dropout, dora=True)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.linspace(0.5, 1.5, OUT))
    return layer


def test_a_dora_layer_is_a_dense_one_whose_weight_is_the_merged_one():
    layer = dora_layer(dropout=0.5).eval()
    x = torch.randn(4, IN, dtype=torch.float64)
    dense = layer.base_layer.weight + layer.delta()
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.base_layer.bias), rtol=0, atol=1e-12)
    torch.testing.assert_close(dense.norm(dim=1), layer.lora_magnitude_vector, rtol=0, atol=1e-12)
    assert not torch.equal(layer.train()(x), layer(x))  # dropout
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_layer_is_its_base_and_says_so_without_gradients_too(dtype):
    layer = LoRALinear(nn.Linear(64, 48, dtype=dtype), RANK, alpha=5, dropout=0.5, dora=True)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    x = torch.randn(9, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), layer(x))
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer.base_layer(x), rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_a_runs_autocast_rounds_neither_norm_nor_gain():
    """Both are numbers of which bf16 would keep two digits: each row of the output would be wrong by as much."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 48, bias=False, dtype=torch.bfloat16), RANK, alpha=5, dora=True)
    nn.init.normal_(layer.lora_B)
    W, _, A, B = layer.weights()
    x = torch.randn(200, 64).bfloat16()
    layer.lora_magnitude_vector.data = (W.float() + layer.scale * B @ A).detach().norm(dim=1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = F.linear(x, W) + F.linear(layer.scale * F.linear(x, A), B)
        ratios = []
        for factor in (1.0, 1.003):
            layer.lora_magnitude_vector.mul_(factor)
            ratios.append((layer(x).double() * plain.double()).sum(0) / plain.double().square().sum(0))
    assert (ratios[0] - 1).abs().max() < 1e-5
    assert (ratios[1] - 1.003).abs().max() < 1.5e-3  # 200 outputs, each of which is rounded to bf16


def test_dora_layers_that_read_the_same_input_go_alone():
    """`project` computes plain layers together; one with magnitudes among them once lost them there."""
    layers = [dora_layer(0), dora_layer(1)]
    plain = LoRALinear(nn.Linear(IN, OUT, dtype=torch.float64), RANK, alpha=5)
    x = torch.randn(4, IN, dtype=torch.float64)
    for group in (layers, [plain, layers[0]]):
        for found, layer in zip(project(x, group, Policy("cpu")), group, strict=True):
            assert torch.equal(found, layer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_model_with_dora_equals_pefts_forward_and_gradients(load_tiny, rslora, dropout):
    """Biases of q, k and v included; with dropout both draw the same masks, layer by layer."""
    from peft import LoraConfig, get_peft_model

    ours, theirs = load_tiny(torch.float64), load_tiny(torch.float64)
    inject(ours, ALL, 4, 10, dropout, rslora, dora=True)
    randomize_lora(ours)
    settings = LoraConfig(
        r=4, lora_alpha=10, lora_dropout=dropout, target_modules=list(ALL), use_rslora=rslora, use_dora=True
    )
    peft_model = get_peft_model(theirs, settings)
    pairs = []
    with torch.no_grad():
        for number, (name, layer) in enumerate(lora_layers(ours).items()):
            other = peft_model.base_model.model.get_submodule(name)
            magnitude = other.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(layer.lora_magnitude_vector, magnitude, rtol=0, atol=1e-12)
            layer.lora_magnitude_vector.mul_(1 + 0.1 * math.sin(number))
            magnitude.copy_(layer.lora_magnitude_vector)
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
            pairs += [(layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight)]
            pairs.append((layer.lora_magnitude_vector, magnitude))
    found = []
    for model in (ours, peft_model):
        torch.manual_seed(7)
        found.append(model.train()(IDS).logits)
        F.cross_entropy(found[-1][0, :-1], IDS[0, 1:]).backward()
    torch.testing.assert_close(*found, rtol=0, atol=1e-8)
    for mine, other in pairs:
        assert relative_error(mine.grad, other.grad) < 1e-6


# ---------------------------------------------------------------------------------------- PiSSA, the maths


@pytest.mark.parametrize(("shape", "rank"), [((30, 20), 4), ((200, 300), 6), ((300, 200), 6)])
def test_the_main_directions_are_those_of_the_svd(shape, rank):
    """Small weights exactly, large ones by random projection, whose error is a thousandth above the least."""
    U, S, V = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    S = 1 / torch.arange(1, len(S) + 1) ** 0.5  # a few large values, a long tail, as trained weights have
    W = U * S @ V
    least = S[rank:].norm()

    def drawn(seed):
        torch.manual_seed(seed)
        return main_directions(W, rank, scale=2.5)

    A, B = drawn(1)
    assert (W - 2.5 * B @ A).norm() < 1.001 * least
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # each takes the root of the singular value
    assert all(map(torch.equal, (A, B), drawn(1)))  # the same seed, the same start
    assert relative_error(B[:, :1] @ A[:1], (S[0] / 2.5) * torch.outer(U[:, 0], V[0])) < 1e-4


def pissa_layer(dtype=torch.float64, shape=(IN, OUT), rank=RANK, seed=1, drawn_before=0):
    """A layer at PiSSA's start, in a model of its own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(*shape, dtype=dtype)})
    inject(model, ["q_proj"], rank, alpha=5)
    torch.rand(drawn_before)
    state = torch.get_rng_state()
    trainable.start_at_main_directions(model, seed)
    assert torch.equal(torch.get_rng_state(), state)  # the draws after it do not depend on it
    return model["q_proj"]


def test_pissas_start_depends_on_the_seed_alone():
    one, same, other = (
        pissa_layer(torch.float32, (96, 80), 2, seed, drawn_before) for seed, drawn_before in ((1, 0), (1, 5), (2, 0))
    )
    assert torch.equal(one.lora_A, same.lora_A)
    assert torch.equal(one.lora_B, same.lora_B)
    assert not torch.equal(one.lora_A, other.lora_A)


def test_pissa_trains_the_product_over_the_rest_of_the_weight():
    """y = x (W0 - s B0 A0 + s B A)^T + b, equations 4 and 5 of the paper; the gradients are those of A and B alone."""
    layer = pissa_layer()
    W, b, A0, B0 = layer.base_layer.weight, layer.base_layer.bias, layer.lora_A0, layer.lora_B0
    before = W.clone()
    residual = W - layer.scale * B0 @ A0
    assert residual.norm() < 0.9 * W.norm()  # the start is no small part of it
    with torch.no_grad():
        layer.lora_A.add_(0.1 * torch.randn_like(A0))
        layer.lora_B.add_(0.1 * torch.randn_like(B0))
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    A, B = (part.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    expected = F.linear(x, residual + layer.scale * B @ A, b)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, A, B), dy)
    y = layer(x)
    found = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)
    for ours, theirs in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(W + layer.delta(), residual + layer.scale * B @ A, rtol=0, atol=1e-12)
    assert torch.equal(W, before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_starts_at_the_base_to_the_bit(load_tiny, dtype, dora):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model, base = load_tiny(dtype), load_tiny(dtype)
        inject(model, ALL, 4, 10, dropout=0.1, dora=dora)
        with torch.no_grad():
            fresh = model.train()(IDS).logits if not dora else base(IDS).logits
            trainable.start_at_main_directions(model, seed=3)
            assert all(layer.lora_B.any() for layer in lora_layers(model).values())
            started = model.eval()(IDS).logits
    if dora:  # the magnitudes are norms, computed in another order than the weight is
        torch.testing.assert_close(started, fresh, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
    else:
        assert torch.equal(started, fresh)


def test_in_bf16_a_small_step_from_pissas_start_is_not_lost():
    """B A - B0 A0 in bf16 is a difference of rounded numbers, where a step of 1e-4 vanishes, or is much too large."""
    layer = pissa_layer(torch.float32, (256, 192), 8)
    with torch.no_grad():
        layer.lora_A.add_(1e-4 * torch.randn_like(layer.lora_A))
        layer.lora_B.add_(1e-4 * torch.randn_like(layer.lora_B))
    exact = layer.scale * (
        layer.lora_B.double() @ layer.lora_A.double() - layer.lora_B0.double() @ layer.lora_A0.double()
    )
    _, _, A, B = layer.weights()
    rounded = layer.scale * B.bfloat16().double() @ A.bfloat16().double()
    assert relative_error(rounded, exact) < 0.01


def test_pissas_first_gradient_is_that_of_pefts(load_tiny, monkeypatch):
    """Singular vectors have no sign: what is compared is each gradient times the factor of the other's sign."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(lora_variants, "EXTRA_DIRECTIONS", 64)  # the exact way: random weights have no main directions
    ours = load_tiny(torch.float32)
    theirs = get_peft_model(
        load_tiny(torch.float32), LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    inject(ours, ["q_proj"], 4, 10)
    trainable.start_at_main_directions(ours, seed=0)
    found = []
    for model in (ours, theirs):
        found.append(model(IDS).logits)
        F.cross_entropy(found[-1][0, :-1], IDS[0, 1:]).backward()
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    for name, layer in lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        assert relative_error(layer.lora_B.detach() @ layer.lora_A.grad, B.detach() @ A.grad) < 1e-3
        assert relative_error(layer.lora_B.grad @ layer.lora_A.detach(), B.grad @ A.detach()) < 1e-3


def test_a_rank_beyond_the_weights_directions_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"'pissa': model.layers.0.self_attn.k_proj has 32 directions, lora_r is 33"):
        loop.train(make_config(init_lora_weights="pissa", lora_r=33))


# ---------------------------------------------------------------------------------------- whole runs

VARIANTS = {  # the first one saves a plain adapter, the last ones a converted one
    "lora+": {"loraplus_lr_ratio": 16.0},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ALL},
    "pissa-rs": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True, "target_modules": ALL},
}


@pytest.fixture
def start(make_config, monkeypatch, tmp_path):
    """A function: a run of these keys, prepared and not yet begun."""
    monkeypatch.chdir(tmp_path)
    with ExitStack() as held:
        yield lambda **keys: prepare(make_config(**keys), StopRequest(), held)


@pytest.fixture
def trained(make_config, tmp_path):
    """A function: the adapter folder of a short run in a variant, and the run's summary."""

    def trained(name, **keys):
        config = make_config(**({"max_steps": 2, "lora_r": 4, "lora_alpha": 10} | VARIANTS[name] | keys))
        return tmp_path / "run" / "adapter", loop.train(config)

    return trained


@pytest.mark.parametrize("name", VARIANTS)
def test_the_memory_of_each_variant_is_predicted(name, make_config, monkeypatch):
    """Shapes without weights go through it, too."""
    monkeypatch.setattr(setup, "choose_cut", memory_estimate.choose_cut)
    with StopRequest() as stop, ExitStack() as held:
        assert prepare(make_config(**VARIANTS[name]), stop, held).predicted_peak_bytes is not None


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_the_same_function_wherever_it_goes(name, trained, load_tiny, tmp_path):
    """Reloaded after training, in PEFT, merged, exported: golden, on the original base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, summary = trained(name)
    assert summary.verified_max_logit_difference < 1e-4
    base, ours = load_tiny(), load_tiny()
    config = adapter_format.load(ours, folder, fingerprint(ours))
    expected = logits(ours)
    assert (expected - logits(base)).abs().max() > 0.02  # it does something
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load_tiny(), folder)), expected, rtol=0, atol=1e-4)

    settings = json.loads((folder / adapter_format.CONFIG).read_text())
    shapes = {"rslora": (4, 10, True), "pissa-rs": (8, 8, False), "pissa-dora": (8, 20, False)}
    shape = (settings["r"], settings["lora_alpha"], settings["use_rslora"])
    assert shape == shapes.get(name, (4, 10, False))
    assert settings["use_dora"] == ("dora" in name)
    assert config.scale == {"rslora": 5.0, "pissa-rs": 1.0}.get(name, 2.5)
    names = set(load_file(folder / adapter_format.WEIGHTS))
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    assert (f"{q_proj}.lora_magnitude_vector" in names) == ("dora" in name)
    assert {f"{q_proj}.lora_A.weight", f"{q_proj}.lora_B.weight"} <= names

    assert verify(folder).largest_effect > 0.02
    agreement = merge(folder, tmp_path / "merged")
    assert agreement.max_logit_difference < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    if "dora" in name:
        with pytest.raises(AdapterError, match=r"use_dora = True: .* minilora merge"):
            export_portable(folder, tmp_path / "portable")
        return
    export_portable(folder, tmp_path / "portable")
    reloaded = load_tiny()
    adapter_format.load(reloaded, tmp_path / "portable", fingerprint(reloaded))
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rslora", "targets"), [(False, ALL[:4]), (True, ALL)])
def test_we_read_what_peft_writes_with_dora(rslora, targets, load_tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=4, lora_alpha=10, target_modules=list(targets), use_rslora=rslora, use_dora=True, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(load_tiny(), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "magnitude" in name:
                param.mul_(1 + 0.2 * torch.rand(param.shape))
            elif "lora_" in name:
                param.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    model = load_tiny()
    before = logits(model)
    config = adapter_format.load(model, tmp_path, fingerprint(model))
    assert (config.dora, config.rslora) == (True, rslora)
    assert (logits(model) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)
    ours = {name: tuple(tensor.shape) for name, tensor in adapter_format.tensors(model, config.scale).items()}
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / adapter_format.WEIGHTS).items()}
    assert ours == written  # keys and shapes, to the letter


def test_a_dora_adapter_without_its_magnitudes_is_refused(load_tiny, tmp_path):
    model = load_tiny()
    inject(model, ["up_proj"], 4, 8, dora=True)
    adapter_format.save(tmp_path, model, adapter_format.AdapterConfig("", 4, 8, 0.0, ("up_proj",), False, True), {})
    tensors = load_file(tmp_path / adapter_format.WEIGHTS)
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
    tensors.pop(lost)
    save_file(tensors, tmp_path / adapter_format.WEIGHTS)
    model = load_tiny()
    with pytest.raises(AdapterError, match=f"missing: {lost}"):
        adapter_format.load(model, tmp_path, fingerprint(model))
    assert not lora_layers(model)


def test_adapters_of_several_variants_are_switched(load_tiny, tiny_folder, tmp_path):
    """A layer that DoRA has given magnitudes loses them with the next adapter, and gets them back."""
    expected, several = {}, Adapters(load_tiny())
    for seed, (name, dora) in enumerate({"plain": False, "dora": True, "other": False}.items()):
        model = load_tiny()
        identity = fingerprint(model)
        inject(model, ALL[:4], 4, 8, dora=dora)
        randomize_lora(model, seed)
        for layer in lora_layers(model).values():
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.data.mul_(1.3)
        settings = adapter_format.AdapterConfig(str(tiny_folder), 4, 8, 0.0, ALL[:4], False, dora)
        adapter_format.save(tmp_path / name, model, settings, {"base_fingerprint": identity})
        expected[name] = logits(model)
        several.load(name, tmp_path / name)
    for name in ("plain", "dora", "other", "dora", "plain"):
        several.use(name)
        assert torch.equal(logits(several.model), expected[name]), name
    several.use(None)
    assert torch.equal(logits(several.model), logits(load_tiny()))


def test_activations_computed_again_change_nothing(load_tiny, make_config):
    """They draw the same dropout again: DoRA's comes from torch's generator."""
    found = []
    for checkpointing in (False, True):
        model = load_tiny()
        trainable.make_trainable(model, make_config(use_dora=True, lora_dropout=0.2))
        torch.manual_seed(0)
        decoder = decoder_of(model.train(), torch.float32, "cpu", checkpointing=checkpointing)
        SFT().loss(decoder, collate(random_examples([30, 20]))).backward()
        found.append([param.grad for param in model.parameters() if param.requires_grad])
    assert len(found[0]) == 3 * len(lora_layers(model))
    assert all(map(torch.equal, *found))


def test_a_resumed_run_goes_on_to_the_bit(make_config, tmp_path, monkeypatch):
    """Also where the machine would find other singular vectors than the one that began: the start is saved."""
    keys = VARIANTS["pissa-dora"] | {"lora_dropout": 0.1, "max_steps": 3, "save_steps": 2, "save_total_limit": 0}
    loop.train(make_config(**keys))
    original = tmp_path / "run"
    folder = tmp_path / "again"
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("step-000003", "adapter", ".lock"))
    real = lora_variants.main_directions
    monkeypatch.setattr(lora_variants, "main_directions", lambda *args: tuple(1.5 * part for part in real(*args)))
    loop.train(make_config(**keys, output_dir=str(folder), resume="auto"))
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step-000003/{checkpoint.WEIGHTS}"):
        assert (folder / file).read_bytes() == (original / file).read_bytes()


def test_the_rate_of_B_is_a_multiple_of_the_rate_of_A(start):
    """After one step from B = 0, AdamW has moved B by its rate in each element; A, whose gradient was 0, decayed."""
    found = {}
    for ratio in (1.0, 16.0):
        run = start(loraplus_lr_ratio=ratio, max_steps=1, learning_rate=1e-3, output_dir=f"run-{ratio}")
        assert loop.train_step(run)["learning_rate"] == 1e-3  # A's; the warm-up is over
        found[ratio] = checkpoint.trainable(run.model)
    for name, param in found[1.0].items():
        factor = 16 if name.endswith("lora_B") else 1
        torch.testing.assert_close(found[16.0][name], factor * param, rtol=1e-5, atol=1e-9)
        assert param.any()


# ---------------------------------------------------------------------------------------- going on from an adapter


def peft_adapter(folder, model, steps=1, **keys):
    """An adapter that PEFT has trained a little and written; returns the PEFT model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(**({"r": 4, "lora_alpha": 10, "target_modules": list(ALL[:4])} | keys), task_type="CAUSAL_LM")
    theirs = get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([param for param in theirs.parameters() if param.requires_grad], lr=1e-2)
    for _ in range(steps):
        theirs.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("variant", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora-rs"])
def test_from_peft_to_here_and_back(variant, start, make_config, load_tiny, tmp_path):
    """A run begins with the adapter to the bit and goes on, and PEFT agrees with what comes out."""
    from peft import PeftModel

    theirs = peft_adapter(tmp_path / "theirs", load_tiny(), **variant)
    keys = {"adapter": str(tmp_path / "theirs"), "lora_r": 4, "lora_alpha": 10, "max_steps": 2} | variant
    initial = load_file(tmp_path / "theirs" / adapter_format.WEIGHTS)
    found = adapter_format.tensors(
        start(**keys, output_dir="begun").model, adapter_format.read_config(tmp_path / "theirs").scale
    )
    assert found.keys() == initial.keys()
    assert all(torch.equal(found[key], initial[key]) for key in initial)

    loop.train(make_config(**keys))
    ours = load_tiny()
    adapter_format.load(ours, tmp_path / "run/adapter", fingerprint(ours))
    assert (logits(ours) - logits(theirs)).abs().max() > 0.01
    back = PeftModel.from_pretrained(load_tiny(), tmp_path / "run/adapter", is_trainable=True)
    torch.testing.assert_close(logits(back), logits(ours), rtol=0, atol=1e-4)
    assert any(param.requires_grad for param in back.parameters())


def called(argv, capsys):
    """(exit code, stdout, stderr) of `minilora train` with these words."""
    code = cli.main(["train", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def argv(make_config, tmp_path):
    """The flags of a small run that goes on from the adapter in tmp_path / "theirs", without its shape."""
    config = make_config()
    names = ("train_file", "output_dir", "max_tokens_per_micro_batch", "dtype", "device")
    given = [word for name in names for word in (f"--{name}", getattr(config, name))]
    return [*given, "--max_steps", 1, "--adapter", tmp_path / "theirs"]


def test_what_is_not_given_is_the_adapters(argv, load_tiny, tiny_folder, tmp_path, capsys):
    """Shape, variant, base and system prompt, over those of the preset; dropout and rate are the run's."""
    peft_adapter(tmp_path / "theirs", load_tiny(), use_dora=True, target_modules=["v_proj", "up_proj"], lora_alpha=6)
    tensors = load_file(tmp_path / "theirs" / adapter_format.WEIGHTS)
    save_file(tensors, tmp_path / "theirs" / adapter_format.WEIGHTS, {"format": "pt", "system_prompt": "Be brief."})
    code, out, err = called(argv, capsys)
    assert (code, err) == (0, "")
    assert "r 4, alpha 6, dropout 0.05, DoRA on up_proj, v_proj" in out
    assert f"going on from {tmp_path / 'theirs'}" in out
    config = adapter_format.read_config(tmp_path / "run/adapter")
    assert (config.rank, config.alpha, config.dora, config.base_model) == (4, 6, True, str(tiny_folder))
    assert set(config.target_modules) == {"v_proj", "up_proj"}
    assert adapter_format.read_metadata(tmp_path / "run/adapter")["system_prompt"] == "Be brief."


def test_in_a_file_of_keys_too(argv, load_tiny, tmp_path, capsys):
    peft_adapter(tmp_path / "theirs", load_tiny())
    rows = Path(__file__).parent.parent / "data" / "train.jsonl"
    (tmp_path / "my.toml").write_text(f'adapter = "{tmp_path / "theirs"}"\nuse_rslora = true\ntrain_file = "{rows}"\n')
    code, _, err = called(["--output_dir", tmp_path / "x", tmp_path / "my.toml"], capsys)
    assert code == 2
    assert "use_rslora is False there and True here" in err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lora_r", "16"], "lora_r is 4 there and 16 here"),
        (["--lora_alpha", "32"], "lora_alpha is 10 there and 32 here"),
        (["--target_modules", "q_proj"], "target_modules is k_proj,o_proj,q_proj,v_proj there and q_proj here"),
        (["--use_rslora"], "use_rslora is False there and True here"),
        (["--use_dora", "--lora_r", "5"], "lora_r is 4 there and 5 here; use_dora is False there and True here"),
        (["--init_lora_weights", "pissa"], "init_lora_weights = 'pissa': with adapter, A and B begin as its own"),
        (["--method", "full"], "needs method = lora"),
        (["--adapter", "none/there"], "none/there is no adapter: adapter_config.json"),
        (["--adapter", ""], "adapter = '' names nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_given_must_be_the_adapters(flags, reason, argv, load_tiny, tmp_path, capsys, monkeypatch):
    peft_adapter(tmp_path / "theirs", load_tiny())
    monkeypatch.setattr("minilora.training.setup.load_model", lambda *args: pytest.fail("a model was loaded before"))
    code, _, err = called([*argv, *flags], capsys)
    assert code == 2
    assert reason in err
    assert err.startswith("minilora: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_not_gone_on_from(make_config, load_tiny, tiny_folder, tmp_path):
    model = load_tiny()
    inject(model, ALL[:4], 4, 10)
    settings = adapter_format.AdapterConfig(str(tiny_folder), 4, 10, 0.0, ALL[:4], False)
    adapter_format.save(tmp_path / "theirs", model, settings, {"base_fingerprint": "f" * 64})
    with pytest.raises(AdapterError, match="was trained on another base") as error:
        loop.train(make_config(adapter=str(tmp_path / "theirs"), lora_r=4, lora_alpha=10))
    assert "allow_other_base" not in str(error.value)  # train has no such flag


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = "),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(keys, reason, argv, load_tiny, tmp_path, capsys):
    """PEFT changes the base when it loads an unconverted PiSSA adapter: read as plain LoRA it is another function."""
    peft_adapter(tmp_path / "theirs", load_tiny(), steps=0, **keys)
    code, _, err = called(argv, capsys)
    assert code == 2
    assert reason in err
    assert err.count("\n") == 1


def test_a_run_that_went_on_is_resumed_without_the_adapter(make_config, load_tiny, tmp_path):
    """Its checkpoint holds all that there is; the folder it began with may be gone."""
    peft_adapter(tmp_path / "theirs", load_tiny())
    keys = {"adapter": str(tmp_path / "theirs"), "lora_r": 4, "lora_alpha": 10, "lora_dropout": 0.1}
    keys |= {"max_steps": 3, "save_steps": 2, "save_total_limit": 0}
    loop.train(make_config(**keys))
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "run", folder, ignore=shutil.ignore_patterns("step-000003", "adapter", ".lock"))
    shutil.rmtree(tmp_path / "theirs")
    loop.train(make_config(**keys, output_dir=str(folder), resume="auto"))
    file = "adapter/adapter_model.safetensors"
    assert (folder / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


# ---------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    "keys",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"loraplus_lr_ratio": 4.0}, {"use_rslora": True}],
    ids=lambda keys: next(iter(keys)),
)
def test_variants_belong_to_lora(keys, make_config):
    make_config(**keys)
    ((name, value),) = keys.items()
    with pytest.raises(ConfigError, match=f"{name} = {value!r} needs method = lora"):
        make_config(method="full", **keys)
