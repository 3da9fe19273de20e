"""A base in 4 or 8 bits under LoRA: its maths, its run from beginning to end, and what is refused."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, IDS, random_examples, randomize_lora, relative_error
from torch import nn

import minilora
from minilora import cli
from minilora.adapters import format as adapter_format
from minilora.config import TrainConfig
from minilora.errors import AdapterError, CheckpointError, ConfigError, ModelError
from minilora.inference.multi_adapter import Adapters
from minilora.kernels import Policy
from minilora.loop import train
from minilora.lora import LoRALinear, inject, lora_layers, project
from minilora.models import quantize
from minilora.models.fingerprint import fingerprint
from minilora.models.load import load_model
from minilora.training.setup import parameter_counts

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None
needs_library = pytest.mark.skipif(bitsandbytes is None, reason="needs bitsandbytes (extra quant)")
both = pytest.mark.parametrize("bits", [4, 8])


def dequantised(layer) -> torch.Tensor:
    """The weight that a layer in 4 or 8 bits stands for, by bitsandbytes' own functions. (out, in), fp32"""
    if layer.weight.dtype == torch.uint8:
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.float() * scales[:, None] / 127


@torch.no_grad()
def logits(tiny):
    return tiny.eval()(IDS).logits.float()


# ---------------------------------------------------------------------------------------- maths


@needs_library
@both
def test_a_layer_is_its_dequantised_weight_plus_the_update(bits):
    """Forward and all gradients against dense maths on what the library says it holds; int8 rounds its input, too."""
    torch.manual_seed(0)
    base = nn.Linear(128, 96)
    layer = LoRALinear(quantize.held(bitsandbytes, base, bits, CPU), rank=4, alpha=8)
    assert layer.lora_A.dtype == torch.float32
    if bits == 4:
        held = layer.base_layer.weight.quant_state
        assert (held.quant_type, held.nested) == ("nf4", True)  # nested: double quantisation
    else:
        assert layer.base_layer.state.threshold == 6.0
    nn.init.normal_(layer.lora_B)
    weight = dequantised(layer.base_layer)
    assert 0 < relative_error(weight, base.weight) < {4: 0.12, 8: 0.02}[bits]
    x, dy = torch.randn(3, 5, 128, requires_grad=True), torch.randn(3, 5, 96)
    leaves = (x, layer.lora_A, layer.lora_B)
    expected = F.linear(x, weight, base.bias) + layer.scale * x @ layer.lora_A.T @ layer.lora_B.T
    wanted = torch.autograd.grad(expected, leaves, dy)
    y = layer(x)
    assert relative_error(y, expected) < {4: 1e-5, 8: 0.02}[bits]
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), wanted, strict=True):
        assert relative_error(ours, theirs) < {4: 1e-5, 8: 0.02}[bits]
    with torch.no_grad():
        layer.eval()
        assert relative_error(layer(x), y) < {4: 1e-6, 8: 0.02}[bits]  # answering; after it training is as before
        layer.train()
    repeated = layer(x)
    assert relative_error(repeated, y) < 1e-6
    assert relative_error(torch.autograd.grad(repeated, leaves, dy)[0], wanted[0]) < {4: 1e-5, 8: 0.02}[bits]


@needs_library
@both
def test_dropout_is_on_the_low_rank_path_only(bits):
    layer = LoRALinear(quantize.held(bitsandbytes, nn.Linear(64, 64), bits, CPU), rank=4, alpha=8, dropout=0.5)
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), layer.base_layer(x))  # B is 0
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


@needs_library
@both
def test_layers_side_by_side_go_their_own_ways(bits):
    """`project` computes floating-point layers together, by their weights; these have none to compute with."""
    layers = [LoRALinear(quantize.held(bitsandbytes, nn.Linear(64, out), bits, CPU), 4, 8) for out in (64, 32)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 64)
    for one, layer in zip(project(x, layers, Policy("cpu")), layers, strict=True):
        assert torch.equal(one, layer(x))
    mixed = [layers[0], LoRALinear(nn.Linear(64, 32), 4, 8)]
    assert torch.equal(project(x, mixed, Policy("cpu"))[1], mixed[1](x))


# ---------------------------------------------------------------------------------------- models


@pytest.fixture
def load_held(tiny_folder):
    """A function: the tiny model with its linear layers in so many bits."""
    return lambda bits, dtype=torch.float32: load_model(tiny_folder, dtype, CPU, bits)


@needs_library
@both
def test_all_linear_layers_but_the_head_are_held_and_nothing_is_trained(load_held, load_tiny, bits):
    tiny, whole = load_held(bits), load_tiny()
    kinds = {name: type(m) for name, m in tiny.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear
    assert len(kinds) == 14
    assert all(kind.__module__.startswith("bitsandbytes") for kind in kinds.values())
    assert not any(param.requires_grad for param in tiny.parameters())
    assert parameter_counts(tiny) == (0, parameter_counts(whole)[1])  # two numbers in each byte are two
    assert 0 < relative_error(logits(tiny), logits(whole)) < {4: 0.5, 8: 0.05}[bits]
    assert torch.equal(tiny.get_input_embeddings().weight, whole.get_input_embeddings().weight)


@needs_library
@both
def test_the_base_is_the_same_base_however_it_is_held(load_held, load_tiny, bits):
    assert fingerprint(load_held(bits)) == fingerprint(load_tiny())
    injected = load_held(bits, torch.bfloat16)
    inject(injected, ["q_proj", "down_proj"], 4, 8)
    assert fingerprint(injected) == fingerprint(load_tiny())


@needs_library
@both
def test_adapters_go_both_ways(load_held, load_tiny, tiny_folder, tmp_path, bits):
    """Trained on what is held, loaded on the plain base; and the other way round; several at once, too."""
    held = load_held(bits)
    inject(held, ["q_proj", "up_proj"], 4, 8)
    randomize_lora(held, std=0.1)
    settings = adapter_format.AdapterConfig(str(tiny_folder), 4, 8, 0.0, ("q_proj", "up_proj"), False)
    adapter_format.save(tmp_path / "adapter", held, settings, {"base_fingerprint": fingerprint(held)})
    plain = load_tiny()
    adapter_format.load(plain, tmp_path / "adapter", fingerprint(plain))
    for name, layer in lora_layers(plain).items():
        assert torch.equal(layer.delta(), lora_layers(held)[name].delta())
    assert relative_error(logits(held), logits(plain)) < {4: 0.5, 8: 0.05}[bits]
    reloaded = Adapters(load_held(bits))
    reloaded.load("it", tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded.model), logits(held), rtol=0, atol=1e-5)
    with reloaded.disabled():
        torch.testing.assert_close(logits(reloaded.model), logits(load_held(bits)), rtol=0, atol=1e-5)


@needs_library
@both
@pytest.mark.parametrize("known", [True, False])
def test_in_a_loop_of_ones_own(load_held, load_tiny, tmp_path, bits, known):
    """Loaded here, the base is known; loaded by transformers in few bits, nobody has seen its weights."""
    held = load_held(bits)
    if not known:
        del held.base_fingerprint
    config = minilora.add_adapter(held, "attn", lora_dropout=0.0)
    randomize_lora(held, std=0.05)
    with pytest.raises(AdapterError, match="load it on the plain base, and merge there"):
        minilora.merge_adapter(held)
    minilora.save_adapter(held, tmp_path / "adapter", config)
    assert ("base_fingerprint" in adapter_format.read_metadata(tmp_path / "adapter")) is known
    plain, reloaded = load_tiny(), load_held(bits)
    minilora.load_adapter(plain, tmp_path / "adapter")
    minilora.merge_adapter(plain)
    if not known:
        del reloaded.base_fingerprint
    minilora.load_adapter(reloaded, tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), logits(held), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="DoRA needs the base's weights in floating point"):
        minilora.add_adapter(load_held(bits), use_dora=True)


@needs_library
@both
def test_gradients_equal_those_of_the_dequantised_model(load_held, load_tiny, bits):
    """The whole model, in training's own form (packed, lean modules), against a dense model of the held weights."""
    from minilora.batching import collate
    from minilora.models.families import decoder_of
    from minilora.objectives.sft import SFT

    held, dense = load_held(bits), load_tiny()
    with torch.no_grad():
        for name, layer in held.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                dense.get_submodule(name).weight.copy_(dequantised(layer))
    batch, gradients = collate(random_examples([30, 20])), []
    for tiny in (held, dense):
        inject(tiny, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], 4, 8)
        randomize_lora(tiny, std=0.1)
        SFT().loss(decoder_of(tiny.train(), torch.float32, "cpu"), batch).backward()
        gradients.append([param.grad for param in tiny.parameters() if param.requires_grad])
    assert len(gradients[0]) == 24
    for ours, theirs in zip(*gradients, strict=True):
        assert relative_error(ours, theirs) < {4: 1e-5, 8: 0.2}[bits]


# ---------------------------------------------------------------------------------------- a run


@needs_library
@pytest.mark.parametrize(("bits", "dtype"), [(4, "float32"), (4, "bfloat16"), (8, "float32")])
def test_a_run_from_beginning_to_end(make_config, bare_run, capsys, bits, dtype):
    """It learns, is verified on the same base held the same way, says what it does not know, and goes on exactly."""
    config = make_config(**{f"load_in_{bits}bit": True}, dtype=dtype, lora_dropout=0.1, save_steps=2, max_steps=4)
    summary = train(config)
    printed = capsys.readouterr().out
    assert summary.last_loss < summary.first_loss - 0.1
    assert summary.verified_max_logit_difference == 0
    assert summary.predicted_peak_memory_bytes is None
    assert f"a base in {bits} bits takes is not predicted" in printed
    assert f"the base in {bits} bits" in printed
    folder = Path(config.output_dir)
    first = (folder / "adapter" / adapter_format.WEIGHTS).read_bytes()
    train(dataclasses.replace(config, resume=str(folder / "checkpoints" / "step-000002")))
    assert (folder / "adapter" / adapter_format.WEIGHTS).read_bytes() == first
    assert not [key for key in json.loads((folder / "adapter" / adapter_format.CONFIG).read_text()) if "bit" in key]
    capsys.readouterr()
    assert cli.main(["verify", "--adapter", str(folder / "adapter")]) == 0  # on the plain base
    assert "the base it was trained on" in capsys.readouterr().out


@needs_library
def test_a_run_in_4_bits_does_not_go_on_in_16(make_config, bare_run):
    """Another base function: the checkpoint says so."""
    config = make_config(load_in_4bit=True, max_steps=1)
    train(config)
    with pytest.raises(CheckpointError, match="load_in_4bit"):
        train(dataclasses.replace(config, load_in_4bit=False, resume="auto", max_steps=2))


# ---------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "two forms of one base"),
        ({"load_in_4bit": True, "method": "full"}, "load_in_4bit = True needs method = lora"),
        ({"load_in_8bit": True, "method": "full"}, "load_in_8bit = True needs method = lora"),
        ({"load_in_4bit": True, "use_dora": True}, "load_in_4bit and use_dora do not go together"),
        ({"load_in_8bit": True, "init_lora_weights": "pissa"}, "load_in_8bit and init_lora_weights"),
        ({"load_in_4bit": True, "fsdp": True}, "load_in_4bit and fsdp"),
    ],
)
def test_what_does_not_go_together(keys, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**keys)


def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # import raises ImportError


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_a_missing_library_is_one_line(make_config, monkeypatch, capsys, key):
    missing(monkeypatch)
    config = make_config()
    argv = ["train", "--model", config.model, "--train_file", config.train_file, "--output_dir", config.output_dir]
    assert cli.main([*argv, f"--{key}", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"need bitsandbytes .*: pip install bitsandbytes$", error)


@needs_library
def test_a_library_that_does_not_work_on_the_device_is_one_line(monkeypatch):
    """bitsandbytes without its CUDA part imports, and fails with many lines when it is first used on a card."""

    def fails(*_):
        raise RuntimeError("Error named symbol not found\nat line 449 in file ops.cu")

    monkeypatch.setattr(quantize, "held", fails)
    with pytest.raises(ConfigError, match=r"bitsandbytes [\d.]+ does not work on cpu: Error named symbol not found\. "):
        quantize.library(CPU)


def test_files_that_are_quantised_are_refused(tiny_folder, tmp_path):
    settings = json.loads((tiny_folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"weights are quantised\. Give the original model as --model"):
        load_model(tmp_path, torch.float32, CPU)


def test_plan_does_not_pretend_to_know(capsys):
    assert cli.main(["plan", "demo", "--load_in_4bit"]) == 2
    assert "plan cannot predict a base in 4 bits" in capsys.readouterr().err
