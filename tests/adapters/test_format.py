"""PEFT's file format, exactly, both ways; and files that are not what they claim."""

import json
import os

import pytest
import torch
from conftest import logits, save_random_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minilora import cli
from minilora.adapters import format as adapter_format
from minilora.config import TARGET_GROUPS as TARGETS
from minilora.errors import AdapterError, DivergedError
from minilora.lora import lora_layers
from minilora.models.fingerprint import fingerprint


@pytest.fixture
def write(load_tiny, tiny_folder, tmp_path):
    """A function that trains (as it were) an adapter and saves it: returns (folder, model)."""

    def write(targets=TARGETS["attn"], rslora=False, name="adapter"):
        model = load_tiny()
        identity = fingerprint(model)
        save_random_adapter(model, tmp_path / name, tiny_folder, targets, alpha=10, prompt="你好", rslora=rslora)
        assert fingerprint(model) == identity  # what is wrapped around the layers does not change who they are
        return tmp_path / name, model

    return write


def change(folder, edit):
    """Rewrite the adapter's tensors, its metadata kept."""
    path, metadata = folder / adapter_format.WEIGHTS, adapter_format.read_metadata(folder)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


def configure(folder, **keys):
    path = folder / adapter_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---------------------------------------------------------------------------------------- the format


def test_the_file_is_the_one_of_the_design(write, tiny_folder):
    """Names and shapes of PEFT's format, spelled out: other tools read them."""
    folder, model = write(("q_proj", "down_proj"))
    expected = {}
    for layer in (0, 1):
        attention = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        mlp = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        expected |= {f"{attention}.lora_A.weight": (4, 64), f"{attention}.lora_B.weight": (64, 4)}
        expected |= {f"{mlp}.lora_A.weight": (4, 96), f"{mlp}.lora_B.weight": (64, 4)}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == expected  # noqa: SIM118
        metadata = file.metadata()
        for name, layer in lora_layers(model).items():
            assert torch.equal(file.get_tensor(f"base_model.model.{name}.lora_A.weight"), layer.lora_A)
            assert torch.equal(file.get_tensor(f"base_model.model.{name}.lora_B.weight"), layer.lora_B)
    assert metadata["format"] == "pt"
    assert metadata["system_prompt"] == "你好"
    assert len(metadata["base_fingerprint"]) == 64

    settings = json.loads((folder / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny_folder),
        "r": 4,
        "lora_alpha": 10,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    assert {key: settings.get(key) for key in wanted} == wanted
    assert type(settings["lora_alpha"]) is int


def test_there_are_no_private_keys(write):
    """Every key of adapter_config.json is a field of PEFT's own LoraConfig: older readers refuse unknown ones."""
    import dataclasses

    from peft import LoraConfig

    folder, _ = write()
    assert set(json.loads((folder / adapter_format.CONFIG).read_text())) <= {
        f.name for f in dataclasses.fields(LoraConfig)
    }


@pytest.mark.parametrize(("targets", "rslora"), [("attn", False), ("all", False), ("attn", True)])
def test_peft_reads_ours(write, load_tiny, targets, rslora):
    from peft import PeftModel

    folder, model = write(TARGETS[targets], rslora)
    base = logits(load_tiny())
    theirs = PeftModel.from_pretrained(load_tiny(), folder)
    ours = logits(model)
    assert (ours - base).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("targets", "rslora"), [("attn", False), ("all", False), ("attn", True)])
def test_we_read_pefts(load_tiny, tmp_path, targets, rslora):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=4, lora_alpha=10, target_modules=list(TARGETS[targets]), use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(load_tiny(), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_" in name:
                param.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    model = load_tiny()
    before = logits(model)
    config = adapter_format.load(model, tmp_path, fingerprint(model))
    assert (config.rank, config.alpha, config.rslora) == (4, 10, rslora)
    assert set(config.target_modules) == set(TARGETS[targets])
    assert (logits(model) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_is_what_is_loaded(write, load_tiny, rslora):
    folder, model = write(rslora=rslora)
    fresh = load_tiny()
    config = adapter_format.load(fresh, folder, fingerprint(fresh))
    assert torch.equal(logits(fresh), logits(model))
    assert config.dropout == 0.05
    assert all(layer.dropout == 0.05 for layer in lora_layers(fresh).values())
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_an_adapter_in_bf16_is_read_too(write, load_tiny):
    folder, model = write()
    change(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    fresh = load_tiny()
    adapter_format.load(fresh, folder, fingerprint(fresh))
    for name, layer in lora_layers(fresh).items():
        assert layer.lora_A.dtype == torch.float32
        assert torch.equal(layer.lora_A, lora_layers(model)[name].lora_A.bfloat16().float())


# ---------------------------------------------------------------------------------------- adapters of others


def by_peft(model, folder, dtype=torch.float32, **keys):
    """An adapter of PEFT's with random weights, saved; returns its model."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"} | keys)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                param.normal_(std=0.1)
                param.copy_(param.to(dtype))
    theirs.save_pretrained(folder)
    change(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    return theirs


SPELLINGS = [  # (target_modules as PEFT takes them, the layers' names)
    (r".*\.self_attn\.(q|v)_proj", ("q_proj", "v_proj")),
    (r"(?:.*?(?:model|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)", ("down_proj", "q_proj")),
    ("all-linear", TARGETS["all"]),
    (["self_attn.q_proj", "mlp.up_proj"], ("q_proj", "up_proj")),
    (["q_proj", "self_attn.q_proj"], ("q_proj",)),
    ("q_proj|.*o_proj", ("o_proj",)),
]


@pytest.mark.parametrize(("spelling", "names"), SPELLINGS)
def test_pefts_spellings_of_the_targets_are_read(load_tiny, tmp_path, spelling, names):
    theirs = by_peft(load_tiny(), tmp_path, target_modules=spelling)
    model = load_tiny()
    config = adapter_format.load(model, tmp_path, fingerprint(model))
    assert set(config.target_modules) == set(names)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    assert adapter_format.keys_to_go_on(tmp_path)["target_modules"] == config.target_modules


@pytest.mark.parametrize(
    "spelling", [r".*\.1\.self_attn\.q_proj", ["model.layers.0.self_attn.q_proj"], ["0.self_attn.q_proj", "v_proj"]]
)
def test_an_adapter_on_some_layers_of_a_name_is_refused_truly(load_tiny, tmp_path, spelling):
    """Its target_modules stand in the message as the file has them, and PEFT can merge it."""
    by_peft(load_tiny(), tmp_path, target_modules=spelling)
    model = load_tiny()
    with pytest.raises(AdapterError) as error:
        adapter_format.load(model, tmp_path, fingerprint(model))
    assert "leaves out 1 of the" in str(error.value)
    assert (repr(spelling) if isinstance(spelling, str) else "self_attn.q_proj") in str(error.value)
    assert "merge_and_unload" in str(error.value)
    assert not lora_layers(model)


def test_names_that_are_not_the_files_layers_are_refused(load_tiny, tmp_path):
    by_peft(load_tiny(), tmp_path, target_modules=["q_proj", "v_proj"])
    for targets in (["self_attn.q_proj"], ["q_proj", "v_proj", "self_attn.x"], ["../q_proj", "v_proj"]):
        configure(tmp_path, target_modules=targets)
        with pytest.raises(AdapterError, match="do not match the layers of its adapter_model"):
            adapter_format.read_config(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.1}])
def test_pefts_adapters_in_16_bits_are_read(load_tiny, tmp_path, dtype, keys):
    theirs = by_peft(load_tiny(), tmp_path, dtype, target_modules=["q_proj"], **keys)
    model = load_tiny()
    adapter_format.load(model, tmp_path, fingerprint(model))
    atol = 1e-5 if "use_dora" not in keys else 5e-2  # the magnitudes are rounded too
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=0, atol=atol)


def test_numbers_and_nulls_as_others_write_them(write, load_tiny):
    folder, tuned = write()
    configure(folder, r=4.0, lora_alpha=10.0, use_rslora=None, use_dora=None, lora_dropout=None, lora_bias=None)
    model = load_tiny()
    config = adapter_format.load(model, folder, fingerprint(model))
    assert (config.alpha, type(config.alpha), config.rank, type(config.rank)) == (10, int, 4, int)
    assert torch.equal(logits(model), logits(tuned))


def test_settings_of_the_wrong_kind_say_what_is_possible(write):
    """They were once "r = '8' is not usable; lora_alpha = None is not usable"."""
    folder, _ = write()
    path = folder / adapter_format.CONFIG
    settings = json.loads(path.read_text()) | {"r": "8", "use_dora": 1}
    del settings["lora_alpha"]
    path.write_text(json.dumps(settings))
    with pytest.raises(AdapterError) as caught:
        adapter_format.read_config(folder)
    assert str(caught.value) == (
        f"{path}: r = '8' is not a whole number from 1 to 65536; lora_alpha is missing: it is a whole number; "
        "use_dora = 1 is not true or false."
    )


def test_a_pickled_adapter_is_named_and_never_loaded(write, load_tiny, monkeypatch):
    folder, _ = write()
    monkeypatch.setattr(torch, "load", None)
    (folder / adapter_format.WEIGHTS).rename(folder / "adapter_model.bin")
    model = load_tiny()
    with pytest.raises(
        AdapterError, match=r"adapter_model.bin: this is a pickle.* never loads.* save_pretrained writes"
    ):
        adapter_format.load(model, folder, fingerprint(model))


@pytest.mark.parametrize("keys", [{"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 2}}, {"bias": "all"}])
def test_what_cannot_be_represented_has_a_way_out(load_tiny, tmp_path, keys):
    by_peft(load_tiny(), tmp_path, target_modules=["q_proj", "v_proj"], **keys)
    (name,) = keys
    with pytest.raises(AdapterError, match=rf"{name} = .* is not supported here .*merge_and_unload.* --model"):
        adapter_format.read_config(tmp_path)


def test_an_adapter_on_the_output_head_is_refused_by_name(load_tiny, tmp_path):
    by_peft(load_tiny(), tmp_path, target_modules=["q_proj", "lm_head"])
    model = load_tiny()
    with pytest.raises(AdapterError, match=r"target_modules names lm_head.*merge_and_unload"):
        adapter_format.load(model, tmp_path, fingerprint(model))


def test_every_field_of_pefts_config_is_known():
    """A new field of LoraConfig may change what an adapter means: this test asks for a decision."""
    import dataclasses

    from peft import LoraConfig

    read = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "base_model_name_or_path"}
    harmless = {"auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "ensure_weight_tying"}
    of_refused = {"layers_pattern", "megatron_core", "qalora_group_size", "loftq_config", "corda_config", "eva_config"}
    of_refused |= {"lora_ga_config"}  # they say nothing where the key that they belong to is refused or not there
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert not fields - read - harmless - of_refused - set(adapter_format.NEUTRAL)


# ---------------------------------------------------------------------------------------- strict


def test_every_wrong_tensor_is_in_one_error(write, load_tiny):
    folder, _ = write()
    missing = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    misshapen = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    extra = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"

    def edit(tensors):
        tensors[extra] = tensors.pop(missing)
        tensors[misshapen] = torch.zeros(5, 3)

    change(folder, edit)
    model = load_tiny()
    before = logits(model)
    with pytest.raises(AdapterError) as error:
        adapter_format.load(model, folder, fingerprint(model))
    text = str(error.value)
    assert f"missing: {missing}" in text
    assert f"not of this model: {extra}" in text
    assert f"shape of {misshapen}: (5, 3), this model needs (32, 4)" in text
    assert str(folder / adapter_format.WEIGHTS) in text
    assert not lora_layers(model)  # nothing was put in
    assert torch.equal(logits(model), before)


def test_a_rank_that_the_tensors_do_not_have_is_refused(write, load_tiny):
    folder, _ = write()
    configure(folder, r=8)
    model = load_tiny()
    with pytest.raises(AdapterError, match=r"shape of .*lora_A.weight: \(4, 64\), this model needs \(8, 64\)"):
        adapter_format.load(model, folder, fingerprint(model))


def test_targets_that_this_model_lacks_are_refused(write, load_tiny):
    folder, _ = write()
    configure(folder, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "c_attn"])
    model = load_tiny()
    with pytest.raises((AdapterError, ValueError), match="c_attn"):
        adapter_format.load(model, folder, fingerprint(model))
    assert not lora_layers(model)


@pytest.mark.parametrize(
    "which", ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj", "model.embed_tokens"]
)
def test_another_base_is_refused_by_its_fingerprint(write, load_tiny, which):
    folder, tuned = write()
    other = load_tiny()
    with torch.no_grad():
        other.get_submodule(which).weight.mul_(1.5)
    with pytest.raises(AdapterError) as error:
        adapter_format.load(other, folder, fingerprint(other))
    assert "another base" in str(error.value)
    assert fingerprint(load_tiny())[:12] in str(error.value)
    assert fingerprint(other)[:12] in str(error.value)
    assert "allow_other_base" in str(error.value)
    assert not lora_layers(other)
    adapter_format.load(other, folder, fingerprint(other), allow_other_base=True)
    assert len(lora_layers(other)) == len(lora_layers(tuned))


def test_the_fingerprint_is_the_same_in_bf16_and_whatever_was_loaded_before(load_tiny):
    narrow = load_tiny(torch.bfloat16)
    found = fingerprint(narrow)
    assert found == fingerprint(load_tiny()) == fingerprint(narrow.to(torch.float32))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", "yes"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("exclude_modules", ["k_proj"]),
        ("lora_bias", True),
        ("target_parameters", ["experts"]),
        ("trainable_token_indices", [1, 2]),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_dropout", 1.0),
        ("target_modules", ""),
        ("target_modules", []),
        ("target_modules", ["q_proj", 3]),
        ("lora_alpha", 16.5),
        ("arrow_config", {"top_k": 2}),
        ("use_rslora", "yes"),
        ("base_model_name_or_path", 3),
    ],
)
def test_what_is_not_supported_is_refused_by_name(write, load_tiny, key, value):
    folder, _ = write()
    configure(folder, **{key: value})
    model = load_tiny()
    with pytest.raises(AdapterError) as error:
        adapter_format.load(model, folder, fingerprint(model))
    assert f"{key} = {value!r}" in str(error.value)
    assert not lora_layers(model)


def test_all_that_is_not_supported_is_said_at_once(write):
    folder, _ = write()
    configure(folder, lora_bias=True, bias="all", r=-1)
    with pytest.raises(AdapterError) as error:
        adapter_format.read_config(folder)
    assert all(word in str(error.value) for word in ("lora_bias = True", "bias = 'all'", "r = -1"))


# ---------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_never_written(write, tiny_folder, value):
    folder, model = write()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    layer = next(iter(lora_layers(model).values()))
    with torch.no_grad():
        layer.lora_B[3, 1] = value
    settings = adapter_format.read_config(folder)
    with pytest.raises(DivergedError, match="not finite") as error:
        adapter_format.save(folder, model, settings, {})
    assert error.value.exit_code == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(DivergedError):
        adapter_format.save(folder.parent / "new", model, settings, {})
    assert not (folder.parent / "new").exists()


def attempt(folder, load_tiny):
    """Load; the only error that may come is an AdapterError, and then nothing was put into the model."""
    model, refused = load_tiny(), None
    try:
        adapter_format.load(model, folder, fingerprint(model))
    except AdapterError as error:
        refused = str(error)
    assert refused is None or str(folder) in refused
    assert bool(lora_layers(model)) == (refused is None)
    return refused is None


def test_a_truncated_file_is_one_clear_error(write, load_tiny):
    folder, _ = write(("q_proj",))
    path = folder / adapter_format.WEIGHTS
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not attempt(folder, load_tiny), size
    path.write_bytes(whole + b"\0")
    assert not attempt(folder, load_tiny)
    path.write_bytes(whole)
    assert attempt(folder, load_tiny)


def test_random_bytes_are_one_clear_error(write, load_tiny):
    folder, _ = write(("q_proj",))
    path = folder / adapter_format.WEIGHTS
    generator = torch.Generator().manual_seed(0)
    for size in (8, 64, 5000):
        path.write_bytes(bytes(torch.randint(256, (size,), generator=generator).tolist()))
        assert not attempt(folder, load_tiny)


def test_a_changed_header_never_gives_another_error(write, load_tiny):
    """One byte of the header at a time: it loads (a letter of the metadata) or it is an AdapterError."""
    folder, _ = write(("q_proj",))
    path = folder / adapter_format.WEIGHTS
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(0, header, 17):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        refused += not attempt(folder, load_tiny)
    assert refused > 10


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'"r"', b"{}"])
def test_a_config_that_is_none_is_one_clear_error(write, load_tiny, content):
    folder, _ = write(("q_proj",))
    (folder / adapter_format.CONFIG).write_bytes(content)
    assert not attempt(folder, load_tiny)


def test_files_that_are_not_there_are_one_clear_error(write, load_tiny, tmp_path):
    folder, _ = write(("q_proj",))
    for name in (adapter_format.WEIGHTS, adapter_format.CONFIG):
        os.rename(folder / name, folder / "aside")
        assert not attempt(folder, load_tiny)
        (folder / name).mkdir()
        assert not attempt(folder, load_tiny)
        (folder / name).rmdir()
        os.rename(folder / "aside", folder / name)
    assert not attempt(tmp_path / "nowhere", load_tiny)


# ---------------------------------------------------------------------------------------- the base that it names


@pytest.mark.parametrize("name", ["/gone/base", "gone/base"])
@pytest.mark.parametrize("verb", ["verify", "generate", "merge", "train", "plan"])
def test_a_base_that_is_gone_is_named_with_the_file_that_names_it(write, tmp_path, monkeypatch, capsys, name, verb):
    monkeypatch.setattr("minilora.models.load.hub_answers", lambda name: "the hub answered with status 404")
    monkeypatch.setattr("minilora.models.load.cached_model", lambda name: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder, _ = write()
    configure(folder, base_model_name_or_path=name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    own = {
        "generate": ["hello"],
        "merge": ["--output_dir", str(tmp_path / "merged")],
        "train": ["--train_file", str(rows), "--output_dir", str(tmp_path / "run")],
        "plan": ["--train_file", str(rows)],
        "verify": [],
    }
    assert cli.main([verb, "--adapter", str(folder), *own[verb]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(name) in line
    assert f"{folder / adapter_format.CONFIG} names this base: give its new place as --model." in line
    assert cli.main([verb, "--adapter", str(folder), "--model", "/elsewhere", *own[verb]]) == 2
    assert "names this base" not in capsys.readouterr().err, "that name was given"


@pytest.mark.parametrize("trained", [False, True])
def test_an_adapter_that_changes_nothing_is_reported_as_such(load_tiny, tiny_folder, tmp_path, capsys, trained):
    settings = {"rank": 2, "alpha": 4, "prompt": ""}
    save_random_adapter(load_tiny(), tmp_path / "adapter", tiny_folder, ("q_proj", "v_proj"), **settings)
    if not trained:
        change(tmp_path / "adapter", lambda ts: [t.zero_() for name, t in ts.items() if "lora_B" in name])
    assert cli.main(["verify", "--adapter", str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert ("it changes nothing" in printed) == (not trained)
    assert printed.startswith("verified" if trained else "no effect")
