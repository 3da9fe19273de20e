"""The package's own names: lazy, typed, stable; and the README's example of a loop of one's own."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import IDS, logits, randomize_lora
from torch import nn

import minilora
from minilora import cli, demo
from minilora.adapters import format as adapter_format
from minilora.errors import AdapterError, ConfigError, DivergedError
from minilora.lora import lora_layers

USAGE = (Path(__file__).parent.parent.parent / "docs" / "usage.md").read_text("utf-8")


@pytest.fixture
def plain(tiny_folder):
    """A function that loads the tiny model as a user of transformers does."""
    from transformers import AutoModelForCausalLM

    return lambda dtype=torch.float32: AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)


def train_a_little(model, steps=3):
    """A loop that knows nothing of minilora; the losses before each step."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(steps):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------------------------------- names


def test_every_name_is_there_and_none_is_a_room():
    """A room of the same name would take its place once it is imported."""
    rooms = {path.stem for path in Path(minilora.__file__).parent.glob("*.py")}
    for name in minilora.__all__:
        assert getattr(minilora, name).__name__ == name
        assert name not in rooms
        assert name in dir(minilora)
    with pytest.raises(AttributeError, match="no attribute 'add_adaptor'"):
        _ = minilora.add_adaptor


def test_type_checkers_see_the_names():
    """What is imported for them only, from where the names come at run time; and the marker that they may look."""
    tree = ast.parse(Path(minilora.__file__).read_text("utf-8"))
    (seen,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    homes = {alias.name: node.module for node in seen.body for alias in node.names}
    assert sorted(homes) == minilora.__all__
    assert homes == {name: f"minilora.{room}" for room, names in minilora._HOMES.items() for name in names}
    assert (Path(minilora.__file__).parent / "py.typed").exists()


# ---------------------------------------------------------------------------------------- the usage page


def test_the_loop_of_the_usage_page(tmp_path, monkeypatch):
    """The page's own lines, on the built-in model; the adapter then answers through the command line, and in PEFT."""
    (code,) = [block for block in re.findall(r"^```python\n(.*?)^```", USAGE, re.M | re.S) if "add_adapter" in block]
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 16
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace("Qwen/Qwen2-0.5B-Instruct", str(demo.DEMO_DIR)), names)
    merged, base = names["model"], adapter_format.read_config(tmp_path / "my-adapter").base_model
    assert not lora_layers(merged)
    assert cli.main(["verify", "--adapter", "my-adapter"]) == 0

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    untouched = AutoModelForCausalLM.from_pretrained(base)
    ids = names["batch"]["input_ids"]
    with torch.no_grad():
        assert names["loss"] < untouched(ids, labels=ids).loss - 0.5
    theirs = PeftModel.from_pretrained(untouched, "my-adapter")
    reloaded = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        expected = merged.eval()(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=0.3)  # weights in bf16: one rounding
        assert torch.equal(reloaded(ids).logits, expected)


# ---------------------------------------------------------------------------------------- add, save, load, merge


def test_from_one_loop_to_the_next(plain, tmp_path):
    """Train, save, load into a fresh base: the same function; train on from there as if nothing had happened."""
    model = plain()
    before = logits(model)
    config = minilora.add_adapter(model, "all", lora_r=4, lora_alpha=10, lora_dropout=0.0, use_rslora=True)
    assert torch.equal(logits(model), before)
    losses = train_a_little(model)
    assert losses[-1] < losses[0] - 0.05
    minilora.save_adapter(model, tmp_path / "deep" / "down", config, system_prompt="Be kind.")
    reloaded = plain()
    assert minilora.load_adapter(reloaded, str(tmp_path / "deep" / "down")).rslora
    assert torch.equal(logits(reloaded), logits(model))
    assert train_a_little(reloaded) == train_a_little(model)
    metadata = adapter_format.read_metadata(tmp_path / "deep" / "down")
    assert metadata["system_prompt"] == "Be kind."
    assert sorted(path.name for path in (tmp_path / "deep" / "down").iterdir()) == [
        adapter_format.CONFIG,
        adapter_format.WEIGHTS,
    ]


def test_the_base_is_frozen_and_kept(plain):
    model, untouched = plain(), plain()
    minilora.add_adapter(model, ["q_proj"], lora_r=2)
    train_a_little(model)
    for name, param in untouched.named_parameters():
        own = model.get_parameter(name.replace("q_proj.", "q_proj.base_layer."))
        assert torch.equal(own, param)
        assert not own.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_function_and_leaves_plain_layers(plain, dtype):
    model = plain(dtype)
    minilora.add_adapter(model, "all", lora_r=4, lora_alpha=8)
    randomize_lora(model, std=0.05)
    layer = next(iter(lora_layers(model).values()))
    rounded_once = (layer.base_layer.weight.float() + layer.delta()).to(dtype)
    before, name = logits(model), next(iter(lora_layers(model)))
    minilora.merge_adapter(model)
    assert not lora_layers(model)
    merged = model.get_submodule(name)
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, rounded_once)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
    minilora.merge_adapter(model)  # nothing to fold in: nothing happens
    minilora.add_adapter(model, "attn")  # and the next one may come


def test_merging_leaves_out_what_is_disabled(plain):
    """With several adapters on a base, layers which the active one does not change hold another's A and B."""
    model = plain()
    minilora.add_adapter(model, "attn")
    randomize_lora(model)
    layers = list(lora_layers(model).values())
    layers[0].enabled = False
    before = logits(model)
    minilora.merge_adapter(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-3)


def test_dropout_is_only_there_in_training_mode(plain, tmp_path):
    """A base comes in evaluation mode, and fresh modules in training mode: once, answers had dropout in them."""
    model = plain()
    config = minilora.add_adapter(model, "attn", lora_dropout=0.5)
    randomize_lora(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        minilora.save_adapter(model, tmp_path / "adapter", config)
        reloaded = plain()
        minilora.load_adapter(reloaded, tmp_path / "adapter")
        assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
        assert not torch.equal(reloaded.train()(IDS).logits, reloaded(IDS).logits)
    training = plain().train()
    minilora.add_adapter(training, "attn", lora_dropout=0.5)
    assert all(layer.training for layer in lora_layers(training).values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": "qproj"}, r"target_modules \['qproj'\] match nothing; .* q_proj, k_proj"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": 3}, "target_modules = 3 is not a list of names"),
        ({"lora_r": 0}, "lora_r = 0 must be at least 1"),
        ({"lora_alpha": -1}, "lora_alpha = -1 must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0 must be less than 1"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_values_that_cannot_be_are_named_and_change_nothing(plain, keys, message):
    model = plain()
    with pytest.raises(ConfigError, match=message):
        minilora.add_adapter(model, **keys)
    assert not lora_layers(model)
    assert all(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: minilora.add_adapter(model, "attn"),
        lambda model: minilora.load_adapter(model, "folder"),
        lambda model: minilora.save_adapter(model, "folder", None),
        lambda model: minilora.merge_adapter(model),
    ],
)
def test_a_name_in_place_of_a_model(call):
    """It was once "'str' object has no attribute 'named_modules'"."""
    with pytest.raises(AdapterError, match=r"^'x' is not a model: AutoModelForCausalLM.from_pretrained makes one$"):
        call("x")


def test_wrong_order_and_wrong_base_are_named(plain, tmp_path):
    model = plain()
    config = minilora.add_adapter(model)
    for twice in (minilora.add_adapter, lambda m: minilora.load_adapter(m, tmp_path)):
        with pytest.raises(AdapterError, match="there is an adapter on this model"):
            twice(model)
    minilora.save_adapter(model, tmp_path / "adapter", config)
    with pytest.raises(AdapterError, match="there is no adapter on this model"):
        minilora.save_adapter(plain(), tmp_path / "none", config)
    other = plain()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    with pytest.raises(AdapterError, match="another base"):
        minilora.load_adapter(other, tmp_path / "adapter")
    assert not lora_layers(other)
    minilora.load_adapter(other, tmp_path / "adapter", allow_other_base=True)
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B.fill_(torch.nan)
    with pytest.raises(DivergedError, match="not finite"):
        minilora.save_adapter(model, tmp_path / "spoilt", config)
