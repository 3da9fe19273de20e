"""An adapter on a base that it was not trained on is refused, with both fingerprints; on the same base it never is.

The fingerprint covers the configuration, every tensor's name and shape, and 64 numbers of each tensor, evenly spaced,
rounded to bfloat16 (SAMPLES_PER_TENSOR). So it sees everything that reaches all of a tensor: another
training, a merged adapter, another seed, noise, another precision than bf16 and fp32. It cannot see

- a change of a few numbers, or of a run of them shorter than a 63rd of the tensor, that lies between the samples: one
  token's row in the embedding of a real vocabulary, one neuron, one planted weight;
- a change so small that none of the 64 numbers is rounded to another bfloat16 (less than 0.2 to 0.4 % of each).

`test_what_sampling_cannot_see` holds these words to the truth. Whoever needs more compares the files' sha256.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, save_random_adapter

from minilora import cli
from minilora.adapters import format as adapter_format
from minilora.errors import AdapterError
from minilora.lora import lora_layers
from minilora.models import load as loading
from minilora.models.fingerprint import SAMPLES_PER_TENSOR, fingerprint

TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tiny_folder):
    return loading.load_model(tiny_folder, torch.float32, CPU)


@pytest.fixture(scope="module")
def trained(base, tiny_folder, tmp_path_factory) -> Path:
    """An adapter trained, as it were, on the tiny base."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    save_random_adapter(copy.deepcopy(base), folder, tiny_folder, TARGETS, rank=2, alpha=4, prompt="", std=0.2)
    return folder


def scaled(name: str, factor: float = 1.02):
    """The base with one tensor changed throughout."""

    def build(base, trained):
        other = copy.deepcopy(base)
        with torch.no_grad():
            dict(other.named_parameters())[name].mul_(factor)
        return other

    return build


def rebuilt(**keys):
    """A model of this configuration, with the base's weights wherever their shapes are the same."""

    def build(base, trained):
        config = copy.deepcopy(base.config)
        for key, value in keys.items():
            setattr(config, key, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            other = type(base)(config).eval()
        ours = dict(base.named_parameters())
        with torch.no_grad():
            for name, param in other.named_parameters():
                if name in ours and ours[name].shape == param.shape:
                    param.copy_(ours[name])
        return other

    return build


def embedding_rows(base, trained):
    """A block of rows as long as the distance of two samples: the shortest that cannot slip between them."""
    other = copy.deepcopy(base)
    weight = other.get_input_embeddings().weight
    rows = len(weight) // (SAMPLES_PER_TENSOR - 1) + 2
    with torch.no_grad():
        weight[700 : 700 + rows].mul_(1.5)
    return other


def merged(base, trained):
    """The base with this very adapter folded in: on it the adapter would count twice."""
    other = copy.deepcopy(base)
    adapter_format.load(other, trained, fingerprint(other))
    for name, layer in lora_layers(other).items():
        with torch.no_grad():
            layer.base_layer.weight += layer.delta()
        parent, _, child = name.rpartition(".")
        setattr(other.get_submodule(parent), child, layer.base_layer)
    return other


def another_seed(base, trained):
    other = copy.deepcopy(base)
    torch.manual_seed(99)
    with torch.no_grad():
        for param in other.parameters():
            param.normal_(std=0.1)
    return other


def untied_with_another_head(base, trained):
    other = rebuilt(tie_word_embeddings=False)(base, trained)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.get_input_embeddings().weight * 1.01)
    return other


def noise(base, trained):
    """Half a per cent on every weight: what a short training leaves."""
    other = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1 + 0.005 * torch.randn_like(param))
    return other


WRONG = {  # name: (how it is made, whether the adapter's tensors fit it)
    "one layer's weight": (scaled("model.layers.1.mlp.up_proj.weight"), True),
    "one targeted weight": (scaled("model.layers.0.self_attn.q_proj.weight"), True),
    "a norm": (scaled("model.layers.1.input_layernorm.weight"), True),
    "the last norm": (scaled("model.norm.weight"), True),
    "a bias": (scaled("model.layers.0.self_attn.k_proj.bias"), True),
    "a block of embedding rows": (embedding_rows, True),
    "rope theta": (rebuilt(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}), True),
    "rope scaling": (rebuilt(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}), True),
    "rms eps": (rebuilt(rms_norm_eps=1e-5), True),
    "activation": (rebuilt(hidden_act="gelu"), True),
    "a layer more": (rebuilt(num_hidden_layers=3, layer_types=["full_attention"] * 3), False),
    "a layer less": (rebuilt(num_hidden_layers=1, layer_types=["full_attention"]), False),
    "more heads": (rebuilt(num_attention_heads=8), False),
    "more key and value heads": (rebuilt(num_key_value_heads=4), False),
    "a wider MLP": (rebuilt(intermediate_size=128), True),
    "a wider model": (rebuilt(hidden_size=128), False),
    "a larger vocabulary": (rebuilt(vocab_size=2048), True),
    "an untied head": (rebuilt(tie_word_embeddings=False), True),
    "an untied head that differs": (untied_with_another_head, True),
    "the adapter merged into it": (merged, True),
    "another seed": (another_seed, True),
    "a little more training": (noise, True),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_another_base_is_refused(base, trained, what):
    build, fits = WRONG[what]
    other = build(base, trained)
    ours, theirs = fingerprint(base), fingerprint(other)
    assert ours != theirs, "the fingerprint does not see it"
    before = {name: param.clone() for name, param in other.named_parameters()}
    with pytest.raises(AdapterError) as error:
        adapter_format.load(other, trained, theirs)
    assert ours[:12] in str(error.value)
    assert theirs[:12] in str(error.value)
    assert str(trained) in str(error.value)
    assert "allow_other_base" in str(error.value)
    assert not lora_layers(other)
    assert all(torch.equal(param, before[name]) for name, param in other.named_parameters())
    if fits:
        adapter_format.load(other, trained, theirs, allow_other_base=True)
        assert len(lora_layers(other)) == 2 * base.config.num_hidden_layers
    else:
        with pytest.raises(AdapterError, match=r"does not fit|match nothing|missing"):
            adapter_format.load(other, trained, theirs, allow_other_base=True)
        assert not lora_layers(other)


def saved_again(base, folder: Path, dtype) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(base.config._name_or_path) / name, folder)
    copy.deepcopy(base).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_the_same_base_is_accepted_in_any_precision(base, trained, tmp_path, stored, loaded):
    other = loading.load_model(saved_again(base, tmp_path, stored), loaded, CPU)
    assert fingerprint(other) == fingerprint(base)
    adapter_format.load(other, trained, fingerprint(other))
    assert lora_layers(other)


def test_the_same_base_is_accepted_whoever_wrote_its_config(base, trained, tmp_path):
    """The hub's Qwen2 has rope_theta and torch_dtype at the top of config.json; what transformers writes now differs.
    merge reads that file itself, training asks transformers: both must come to one fingerprint."""
    folder = saved_again(base, tmp_path, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "torch_dtype": config.pop("dtype"), "transformers_version": "4.40.1"}
    for key in ("layer_types", "rope_scaling"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(loading.load_model(folder, torch.float32, CPU)) == fingerprint(base)
    out = tmp_path / "merged"
    assert cli.main(["merge", "--adapter", str(trained), "--model", str(folder), "--output_dir", str(out)]) == 0


@pytest.mark.parametrize("verb", ["generate", "merge"])
def test_the_verbs_refuse_it_and_the_flag_overrides(base, trained, tmp_path, capsys, verb):
    folder = tmp_path / "other"
    folder.mkdir()
    saved_again(noise(base, trained), folder, torch.float32)
    argv = [verb, "--adapter", str(trained), "--model", str(folder)]
    argv += ["--output_dir", str(tmp_path / "merged")] if verb == "merge" else ["--max_new_tokens", "2", "hello"]
    capsys.readouterr()  # progress bars of saving the model
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("minilora: ")
    assert "another base" in message
    assert fingerprint(base)[:12] in message
    assert "--allow_other_base" in message
    assert not (tmp_path / "merged").exists()
    assert cli.main([*argv, "--allow_other_base"]) == 0


def test_what_sampling_cannot_see(base):
    """The docstring's exceptions are these, and they are as narrow as it says."""
    ours = fingerprint(base)
    name = "model.layers.0.mlp.down_proj.weight"
    size = base.get_parameter(name).numel()
    sampled = torch.linspace(0, size - 1, SAMPLES_PER_TENSOR, dtype=torch.float64).long().tolist()

    def changed(places, factor):
        other = copy.deepcopy(base)
        with torch.no_grad():
            flat = other.get_parameter(name).view(-1)
            flat[places] = flat[places] * factor
        return fingerprint(other)

    assert changed([sampled[5] + 1], 100.0) == ours  # one weight between two samples
    assert changed([sampled[5]], 1.02) != ours  # one that is a sample
    between = list(range(sampled[5] + 1, sampled[6]))
    assert changed(between, 2.0) == ours  # all between two samples
    assert changed([*between, sampled[6]], 2.0) != ours  # one more
    assert changed(list(range(size)), 1.0 + 1e-6) == ours  # less than bfloat16 tells apart
