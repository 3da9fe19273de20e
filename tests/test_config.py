"""Settings: every key by flag and by TOML, the nearest name for a misspelling, all problems at once, no dead flags."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import minilora
from minilora import cli, loop
from minilora.adapters import format as adapter_format
from minilora.config import FIELDS, TARGET_GROUPS, TYPES, TrainConfig, choices, resolve
from minilora.errors import CheckpointError, ConfigError

PACKAGE = Path(minilora.__file__).parent
ATTN = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def called_with(monkeypatch):
    """A function: the TrainConfig that `python train.py ARGUMENTS` would train with."""
    seen = []
    monkeypatch.setattr("minilora.loop.train", seen.append)

    def call(*argv):
        seen.clear()
        assert cli.run(["train", *map(str, argv)]) == 0
        return seen[0]

    return call


def as_dict(config):
    return {name: getattr(config, name) for name in FIELDS}


def changed(config, before=None):
    """The keys in which a configuration differs from another, or from the defaults."""
    before = before or TrainConfig()
    return {name: value for name, value in as_dict(config).items() if value != getattr(before, name)}


def refused(source, flags):
    """The lines of the ConfigError."""
    with pytest.raises(ConfigError) as caught:
        resolve(source, flags)
    return str(caught.value).splitlines()


# -------------------------------------------------------------------------------- every key, by every way

# name: (words behind the flag, the same in TOML, the value, keys it needs beside it)
SAMPLES = {
    "model": ("some/where", '"some/where"', "some/where", {}),
    "train_file": ("mine.jsonl", '"mine.jsonl"', "mine.jsonl", {}),
    "train_weights": ("0.5", "0.5", (0.5,), {}),
    "deduplicate": ("true", "true", True, {}),
    "eval_file": ("v.jsonl", '"v.jsonl"', "v.jsonl", {}),
    "val_size": ("0.25", "0.25", 0.25, {}),
    "output_dir": ("runs/x y", '"runs/x y"', "runs/x y", {}),
    "resume": ("auto", '"auto"', "auto", {}),
    "method": ("full", '"full"', "full", {}),
    "lora_r": ("16", "16", 16, {}),
    "lora_alpha": ("64", "64", 64, {}),
    "lora_dropout": ("0.5", "0.5", 0.5, {}),
    "target_modules": ("mlp", '["mlp"]', MLP, {}),
    "use_rslora": ("true", "true", True, {}),
    "use_dora": ("true", "true", True, {}),
    "init_lora_weights": ("pissa", '"pissa"', "pissa", {}),
    "loraplus_lr_ratio": ("16", "16", 16.0, {}),
    "adapter": ("mine", '"mine"', "mine", {}),
    "load_in_4bit": ("true", "true", True, {}),
    "load_in_8bit": ("true", "true", True, {}),
    "per_device_train_batch_size": ("2", "2", 2, {}),
    "gradient_accumulation_steps": ("3", "3", 3, {}),
    "num_train_epochs": ("0.5", "0.5", 0.5, {}),
    "max_steps": ("7", "7", 7, {}),
    "learning_rate": ("3e-5", "3e-5", 3e-5, {}),
    "lr_scheduler_type": ("linear", '"linear"', "linear", {}),
    "warmup_ratio": ("0", "0", 0.0, {}),
    "weight_decay": ("0.2", "0.2", 0.2, {}),
    "max_grad_norm": ("1", "1", 1.0, {}),
    "early_stopping_patience": ("2", "2", 2, {"val_size": 0.1}),
    "neftune_noise_alpha": ("5", "5", 5.0, {}),
    "max_length": ("64", "64", 64, {}),
    "overlong": ("drop", '"drop"', "drop", {}),
    "on_bad_rows": ("skip", '"skip"', "skip", {}),
    "train_on_prompt": ("true", "true", True, {}),
    "system_prompt": ("Be brief.", '"Be brief."', "Be brief.", {}),
    "packing": ("false", "false", False, {}),
    "max_tokens_per_micro_batch": ("512", "512", 512, {}),
    "share_prefix": ("off", '"off"', "off", {}),
    "gradient_checkpointing": ("true", "true", True, {}),
    "dtype": ("float32", '"float32"', "float32", {}),
    "device": ("cuda:1", '"cuda:1"', "cuda:1", {}),
    "torch_compile": ("true", "true", True, {}),
    "fsdp": ("true", "true", True, {}),
    "seed": ("7", "7", 7, {}),
    "logging_steps": ("3", "3", 3, {}),
    "report_to": ("tensorboard", '"tensorboard"', "tensorboard", {}),
    "eval_steps": ("5", "5", 5, {}),
    "eval_samples": ("3", "3", 3, {"val_size": 0.1}),
    "save_steps": ("6", "6", 6, {}),
    "save_total_limit": ("0", "0", 0, {}),
}


def test_every_field_has_a_sample():
    assert SAMPLES.keys() == FIELDS.keys()
    for name, (_, _, value, _) in SAMPLES.items():
        assert value != FIELDS[name].default, f"the sample of {name} is its default: it would show nothing"


@pytest.mark.parametrize("name", SAMPLES)
def test_every_field_by_flag_and_by_toml(name, called_with, tmp_path, monkeypatch):
    word, toml, value, besides = SAMPLES[name]
    if name == "adapter":  # it is looked into: this one's shape is that of the defaults
        monkeypatch.chdir(tmp_path)
        default = TrainConfig()
        shape = (default.lora_r, default.lora_alpha, default.lora_dropout, default.target_modules, False)
        adapter_format.write(Path("mine"), {"x": torch.zeros(1)}, adapter_format.AdapterConfig("", *shape), {})
    expected = {name: value, **besides}
    if name == "adapter":
        expected["target_modules"] = tuple(sorted(ATTN))
    others = [f"--{key}={other}" for key, other in besides.items()]
    dashed = name.replace("_", "-")
    empty, full = tmp_path / "empty.toml", tmp_path / "full.toml"
    empty.write_text("")
    full.write_text("\n".join([f"{name} = {toml}", *(f"{key} = {other}" for key, other in besides.items())]))
    ways = [
        [empty, f"--{name}", word, *others],
        [empty, f"--{dashed}", word, *others],
        [empty, f"--{name}={word}", *others],
        [empty, f"--{dashed}={word}", *others],
        [*others, f"--{name}", word, "--", empty] if name == "target_modules" else [f"--{name}", word, *others, empty],
        [full],
    ]
    for arguments in ways:
        config = called_with(*arguments)
        assert changed(config) == expected, arguments
        assert type(getattr(config, name)) is type(value), arguments


def test_every_field_is_explained(capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(["train", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert f"--{name} " in text
        assert " ".join(field.metadata["help"].split()) in text
        assert all(option in text for option in choices(name))
    assert "(default: 0.0001)" in text


@pytest.mark.parametrize("name", [name for name, hint in TYPES.items() if hint is bool])
def test_booleans_take_nothing_or_true_or_false(name, called_with, tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    for words, expected in {
        (f"--{name}",): True,
        (f"--{name}", "true"): True,
        (f"--{name}", "True"): True,
        (f"--{name}=true",): True,
        (f"--{name}", "false"): False,
        (f"--{name}", "FALSE"): False,
        (f"--{name.replace('_', '-')}=false",): False,
        (f"--{name}", "false", f"--{name}"): True,
    }.items():
        assert getattr(called_with(empty, *words), name) is expected, words
    for word in ("yes", "1", "0", "", "none"):
        with pytest.raises(ConfigError, match=rf"{name} = '{word}' is not true or false"):
            called_with(empty, f"--{name}={word}")
    with pytest.raises(ConfigError, match=f"{name} = 1 is not true or false"):
        resolve(None, {name: 1})


@pytest.mark.parametrize("name", [name for name, hint in TYPES.items() if hint in (bool, bool | None)])
def test_a_boolean_key_takes_no_preset_for_its_value(name, called_with):
    flag = f"--{name}"
    config = called_with(flag, "quick")
    assert (config, config.num_train_epochs, getattr(config, name)) == (called_with("quick", flag), 2, True)
    config = called_with(flag, "false", "quick")
    assert (config.num_train_epochs, getattr(config, name)) == (2, False)
    for word in ("yes", "0", "None"):
        with pytest.raises(ConfigError, match=f"{name} = '{word}' is not true or false"):
            called_with("quick", flag, word)
    with pytest.raises(ConfigError, match=r"'quik' is no preset .* Did you mean quick"):
        called_with(flag, "quik")


def test_target_modules_take_no_preset_for_a_name(called_with, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("lora_r = 3")
    config = called_with("--target_modules", "q_proj", "v_proj", "quick")
    assert (config.target_modules, config.num_train_epochs) == (("q_proj", "v_proj"), 2)
    config = called_with("--target-modules", "mlp", path, "--seed", 1)
    assert (config.target_modules, config.lora_r, config.seed) == (MLP, 3, 1)
    config = called_with("--torch_compile", "--target_modules", "q_proj,k_proj", "--use_rslora", "quick")
    assert (config.target_modules, config.num_train_epochs) == (("q_proj", "k_proj"), 2)
    assert called_with("--target_modules=quick").target_modules == ("quick",)
    with pytest.raises(ConfigError, match="--target_modules: expected at least one argument"):
        called_with("--target_modules", "quick")


@pytest.mark.parametrize("key", ["preset", "presets"])
def test_a_preset_named_where_it_cannot_be(key, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(f'{key} = "demo"')
    (line,) = refused(str(path), {})
    assert line == (
        f"{path}: there is no key {key!r}: a file does not take over a preset. Copy the keys that you want from "
        f"{PACKAGE / 'presets' / 'demo.toml'}, or name the preset on the command line in place of the file."
    )
    with pytest.raises(ConfigError) as caught:
        cli.train_parser().parse([f"--{key}", "demo"])
    assert str(caught.value).startswith(
        f"unknown argument '--{key}'. A preset is named without a flag: minilora train demo."
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["attn"], ATTN),
        (["mlp"], MLP),
        (["all"], ATTN + MLP),
        (["q_proj"], ("q_proj",)),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["q_proj,v_proj"], ("q_proj", "v_proj")),
        (["attn,gate_proj"], (*ATTN, "gate_proj")),
        (["attn", "q_proj", "mlp,q_proj"], ATTN + MLP),
        (["v_proj,", "v_proj,,q_proj"], ("v_proj", "q_proj")),
        (["lm_head"], ("lm_head",)),
    ],
)
def test_target_modules(words, expected, called_with, tmp_path):
    listed, text = tmp_path / "listed.toml", tmp_path / "text.toml"
    listed.write_text(f"target_modules = {json.dumps(words)}")
    text.write_text(f"target_modules = {json.dumps(','.join(words))}")
    for config in (called_with(listed), called_with(text), called_with("lora", "--target_modules", *words)):
        assert config.target_modules == expected


@pytest.mark.parametrize("given", ['""', "[]", '","', "[1]", "7", "true", '[["q_proj"]]'])
def test_target_modules_that_are_none(given, tmp_path):
    (tmp_path / "c.toml").write_text(f"target_modules = {given}")
    (line,) = refused(str(tmp_path / "c.toml"), {})
    assert "target_modules" in line


def test_groups_are_the_seven_projections():
    assert TARGET_GROUPS == {"attn": ATTN, "mlp": MLP, "all": ATTN + MLP}


@pytest.mark.parametrize("word", ["none", "None", "NONE"])
def test_none_is_no_file(word, called_with):
    assert called_with("lora", "--eval_file", word).eval_file is None
    assert called_with("lora", "--output_dir", word).output_dir is None


# ------------------------------------------------------------------------------------------- misspellings

MISSPELT = {
    "learning_rat": "learning_rate",
    "learningrate": "learning_rate",
    "lora_rank": "lora_r",
    "lora_alfa": "lora_alpha",
    "num_epochs": "num_train_epochs",
    "target_module": "target_modules",
    "gradient_acumulation_steps": "gradient_accumulation_steps",
    "maxlength": "max_length",
    "overlength": "overlong",
    "warmup_rato": "warmup_ratio",
    "train_on_prompts": "train_on_prompt",
    "packed": "packing",
    "Seed": "seed",
}


@pytest.mark.parametrize("given", MISSPELT)
def test_a_misspelt_key_is_answered_with_the_nearest(given, tmp_path):
    (tmp_path / "c.toml").write_text(f"{given} = 1")
    (line,) = refused(str(tmp_path / "c.toml"), {})
    assert line == f"{tmp_path / 'c.toml'}: there is no key {given!r}. Did you mean {MISSPELT[given]}?"
    for flag in (f"--{given}", f"--{given.replace('_', '-')}"):
        for words in ([flag, "1"], [f"{flag}=1"]):
            with pytest.raises(ConfigError, match=f"Did you mean --{MISSPELT[given]}?"):
                cli.train_parser().parse(["lora", *words])


def test_no_abbreviations():
    """--lr or --learn would one day mean something else."""
    for flag in ("--learn", "--lora", "--max", "--model_", "--lr"):
        with pytest.raises(ConfigError, match=f"unknown argument '{flag}'"):
            cli.train_parser().parse([flag, "1"])


def test_every_unknown_flag_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        cli.train_parser().parse(["--learning_rat", "1", "--lora_q=2", "--zzz"])
    text = str(caught.value)
    assert all(word in text for word in ("'--learning_rat'", "--learning_rate?", "'--lora_q=2'", "'--zzz'", "--help"))


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("method", "lara", "Did you mean lora?"),
        ("lr_scheduler_type", "cosin", "Did you mean cosine?"),
        ("overlong", "truncat", "Did you mean truncate?"),
        ("on_bad_rows", "skp", "Did you mean skip?"),
        ("dtype", "bfloat", "Did you mean bfloat16?"),
        ("dtype", "float16", "is not one of auto, bfloat16, float32"),
    ],
)
def test_a_misspelt_value_is_answered_with_the_nearest(key, value, answer):
    (line,) = refused(None, {key: value})
    assert line.startswith(f"{key} = '{value}' is not one of {', '.join(choices(key))}.")
    assert answer in line


def test_presets_are_answered_with_the_nearest_too():
    presets = "demo, full, lora, qlora, quick"
    assert refused("lorra", {}) == [f"'lorra' is no preset ({presets}) and no .toml file. Did you mean lora?"]
    assert "is no preset" in refused("Lora.json", {})[0]


# ------------------------------------------------------------------------------------------------- limits

OUT_OF_LIMITS = {
    "val_size": [-0.1, 1, 1.5, "nan"],
    "lora_r": [0, -8, 4097],
    "lora_alpha": [0, -1],
    "lora_dropout": [-0.01, 1, 2, "nan"],
    "per_device_train_batch_size": [0, -1],
    "gradient_accumulation_steps": [0],
    "num_train_epochs": [0, -1, "inf", "nan"],
    "max_steps": [-1],
    "learning_rate": [-1e-4, "inf", "nan", "-inf"],
    "warmup_ratio": [-0.1, 1.01, "nan"],
    "weight_decay": [-0.1, "inf"],
    "max_grad_norm": [-1, "nan", "inf"],
    "early_stopping_patience": [-1],
    "neftune_noise_alpha": [-1, "nan", "inf"],
    "loraplus_lr_ratio": [0, -1, 10001, "nan"],
    "max_length": [1, 0],
    "max_tokens_per_micro_batch": [-1],
    "seed": [-1],
    "logging_steps": [0],
    "eval_steps": [-1],
    "eval_samples": [-1, 1001],
    "save_steps": [-1],
    "save_total_limit": [-1],
}


def test_every_number_has_limits():
    assert {name for name, hint in TYPES.items() if hint in (int, float)} == OUT_OF_LIMITS.keys()


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in OUT_OF_LIMITS.items() for v in values])
def test_limits(name, value, tmp_path):
    """By flag, by TOML and by constructor: the key, the value and the limit are named."""
    (tmp_path / "c.toml").write_text(f"{name} = {value}")
    for lines in (refused(None, {name: str(value)}), refused(str(tmp_path / "c.toml"), {})):
        limit = "a finite number" if str(value).lstrip("-") in ("inf", "nan") else r"(at least|more|at most|less).* \S+"
        assert re.match(rf"{name} = \S+ must be {limit}\.$", lines[0])
    with pytest.raises(ConfigError, match=rf"{name} = "):
        TrainConfig(**{name: TYPES[name](value)})


AT_THE_LIMIT = {"lora_r": [1, 4096], "max_length": [2], "warmup_ratio": [0, 1], "lora_dropout": [0, 0.999]}
AT_THE_LIMIT |= {"learning_rate": [0], "max_grad_norm": [0], "seed": [0, 2**63 - 1], "val_size": [0]}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in AT_THE_LIMIT.items() for v in values])
def test_at_the_limit(name, value):
    assert getattr(resolve(None, {name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 2**64), ("seed", 10**30), ("lora_alpha", 10**400), ("num_train_epochs", 1e308)],
    ids=["seed 2**64", "seed 10**30", "lora_alpha 10**400", "num_train_epochs 1e308"],
)
def test_numbers_that_nothing_can_count_with(name, value):
    """torch's generators, floats and step counts overflow on them, which would be 'a mistake of ours'."""
    (line,) = refused(None, {name: value})
    assert line.startswith(f"{name} = ")


NOT_NUMBERS = [
    *[("lora_r", value, "whole number") for value in ("8.5", "eight", "", "1e3", "0x8", 8.5, True, None, [8], "nan")],
    *[("learning_rate", value, "a number") for value in ("1e-4x", "", "1,5", "fast", True, None, [1e-4], {})],
]


@pytest.mark.parametrize(("name", "value", "kind"), NOT_NUMBERS)
def test_what_is_no_number(name, value, kind):
    (line,) = refused(None, {name: value})
    assert line == f"the command line: {name} = {value!r} is not {kind if kind[0] == 'a' else 'a ' + kind}."


@pytest.mark.parametrize(
    "name", ["model", "train_file", "eval_file", "output_dir", "resume", "system_prompt", "device"]
)
@pytest.mark.parametrize("value", ["7", "true", "[]", '["a"]', "1979-05-27", "{}"])
def test_what_is_no_text(name, value, tmp_path):
    if (name, value) == ("train_file", '["a"]'):
        return  # a list of files
    (tmp_path / "c.toml").write_text(f"{name} = {value}")
    (line,) = refused(str(tmp_path / "c.toml"), {})
    assert f"{name} = " in line
    assert line.endswith("is not a text.")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "mps", "", "cpu:0"])
def test_devices(device):
    (line,) = refused(None, {"device": device})
    assert line == f"device = {device!r} is not one of auto, cpu, cuda, cuda:N."


PYTHON_VALUES = [
    ("target_modules", "all", ATTN + MLP),
    ("target_modules", ["attn", "up_proj"], (*ATTN, "up_proj")),
    ("lora_r", "8", 8),
    ("lora_r", 8.0, 8),
    ("learning_rate", 1, 1.0),
    ("use_dora", "true", True),
    ("train_file", ["a.jsonl", "b.jsonl"], ("a.jsonl", "b.jsonl")),
    ("train_file", Path("a.jsonl"), "a.jsonl"),
    ("train_file", [Path("a.jsonl"), "b.jsonl"], ("a.jsonl", "b.jsonl")),
    ("train_file", ["b, c.jsonl"], ("b, c.jsonl",)),
    ("train_weights", [0.5], (0.5,)),
    ("gradient_checkpointing", "false", False),
    *((name, Path("some/where"), "some/where") for name in ("model", "eval_file", "output_dir", "resume", "adapter")),
    ("eval_file", "none", None),
]


@pytest.mark.parametrize(("name", "given", "value"), PYTHON_VALUES)
def test_python_values_are_read_as_flags_are(name, given, value):
    config = TrainConfig(**{name: given})
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert dataclasses.replace(config, seed=1) == dataclasses.replace(TrainConfig(**{name: value}), seed=1)


def test_python_values_are_checked_all_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(lora_r=8.5, target_modules=7, system_prompt=Path("x"), model=None, max_length=1, packing="yes")
    assert str(caught.value).splitlines() == [
        "model = None is not a text.",
        "lora_r = 8.5 is not a whole number.",
        "target_modules = 7 is not a list of names.",
        "system_prompt = PosixPath('x') is not a text.",
        "packing = 'yes' is not true or false.",
        "max_length = 1 must be at least 2.",
    ]


def test_whole_floats_are_whole_numbers():
    assert resolve(None, {"lora_r": 16.0}).lora_r == 16
    assert isinstance(resolve(None, {"num_train_epochs": 3}).num_train_epochs, float)


def test_all_problems_are_reported_at_once(tmp_path):
    """Of the file and of the command line, of names, types, choices, limits and combinations: mended in one go."""
    path = tmp_path / "c.toml"
    path.write_text('learning_rat = 1\nlora_alpha = "many"\nmethod = "lara"\n[train]\nx = 1\n')
    flags = {"lora_r": "0", "seed": "x", "eval_file": "v.jsonl", "val_size": "0.1", "device": "gpu", "warmup": 3}
    text = "\n".join(refused(str(path), flags))
    expected = [
        "'learning_rat'. Did you mean learning_rate?",
        "'train'",
        "'warmup'. Did you mean warmup_ratio?",
        "lora_alpha = 'many' is not a whole number",
        "method = 'lara' is not one of lora, full. Did you mean lora?",
        "lora_r = 0 must be at least 1",
        "seed = 'x' is not a whole number",
        "eval_file = 'v.jsonl' and val_size = 0.1 both set rows for evaluation",
        "device = 'gpu'",
    ]
    assert [part for part in expected if part not in text] == []
    assert len(text.splitlines()) == len(expected)
    assert text.count(str(path)) == 3
    assert text.count("the command line") == 2


def test_combinations():
    assert "both set rows for evaluation" in refused(None, {"eval_file": "v.jsonl", "val_size": 0.1})[0]
    assert "early_stopping_patience needs evaluations" in refused(None, {"early_stopping_patience": 2})[0]
    assert resolve(None, {"early_stopping_patience": 2, "eval_file": "v.jsonl"}).early_stopping_patience == 2


def test_a_config_cannot_be_changed_behind_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lora_r = 0


# ------------------------------------------------------------------------------------------------- layers


def test_flags_lie_over_toml_over_defaults(called_with, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('lora_r = 16\nlearning_rate = 5e-5\ntrain_file = "t.jsonl"\n')
    config = called_with(path, "--lora-r", 32)
    assert changed(config) == {"lora_r": 32, "learning_rate": 5e-5, "train_file": "t.jsonl"}
    assert changed(called_with("--lora_r", 32, path), config) == {}


def test_without_a_source_the_preset_is_lora(called_with):
    assert changed(called_with("--seed", 7), resolve("lora", {})) == {"seed": 7}


def test_a_presets_eval_file_belongs_to_its_train_file(called_with):
    """Else `--train_file mine.jsonl` would be evaluated on the preset's rows."""
    assert called_with("lora").eval_file == "data/valid.jsonl"
    assert called_with("lora", "--train_file", "mine.jsonl").eval_file is None
    assert called_with("--train_file", "mine.jsonl").eval_file is None
    assert called_with("lora", "--val_size", "0.1").eval_file is None
    assert called_with("lora", "--train_file", "mine.jsonl", "--eval_file", "v.jsonl").eval_file == "v.jsonl"
    assert called_with("lora", "--eval_file", "v.jsonl").eval_file == "v.jsonl"


def test_nothing_that_a_user_wrote_in_a_file_is_dropped(called_with, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('train_file = ["t.jsonl", "u.jsonl"]\ntrain_weights = [2, 1]\neval_file = "v.jsonl"\n')
    assert called_with(path, "--seed", 7).eval_file == "v.jsonl"
    config = called_with(path, "--train_file", "a.jsonl,b.jsonl")
    assert (config.train_file, config.train_weights) == (("a.jsonl", "b.jsonl"), (2.0, 1.0))
    assert config.eval_file == "v.jsonl"
    assert called_with(path, "--train_file", "mine.jsonl", "--train_weights=").eval_file == "v.jsonl"
    assert called_with(path, "--eval_file", "none", "--val_size", "0.1").eval_file is None
    (line,) = refused(str(path), {"val_size": 0.1})
    assert line == (
        "eval_file = 'v.jsonl' and val_size = 0.1 both set rows for evaluation: give one of them. "
        "eval_file = none or val_size = 0 removes the other."
    )
    (line,) = refused(str(path), {"train_file": "mine.jsonl"})
    assert line == (
        "train_weights has 2 numbers (2.0, 1.0), but train_file names 1: give one number for each file, "
        "or an empty train_weights."
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"lora_r = ", "not valid TOML"),
        (b"lora_r = 8\nlora_r = 9", "not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"model = 'a\x00b'", "not valid TOML"),
        (b"lora_r = " + b"9" * 5000, "c.toml"),
        (b"lora_r = " + b"[" * 100_000, "c.toml"),
    ],
    ids=["cut off", "twice", "not UTF-8", "NUL", "5,000 digits", "100,000 deep"],
)
def test_toml_that_cannot_be_read(content, reason, tmp_path):
    (tmp_path / "c.toml").write_bytes(content)
    assert reason in "\n".join(refused(str(tmp_path / "c.toml"), {}))


def test_toml_that_is_not_there(tmp_path):
    assert "cannot be read" in refused(str(tmp_path / "none.toml"), {})[0]
    (tmp_path / "folder.toml").mkdir()
    assert "cannot be read" in refused(str(tmp_path / "folder.toml"), {})[0]


# ------------------------------------------------------------------------------------------------ presets

SEED_RECIPE = {  # shared/seed, sections 5.1 and 5.2; r, alpha, dropout and targets from 5.2
    "model": "Qwen/Qwen2-0.5B-Instruct",
    "train_file": "data/train.jsonl",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 10,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 0.1,
    "logging_steps": 10,
    "max_steps": 0,
    "save_steps": 0,  # at each epoch's end
    "system_prompt": "你是一个AI助手",
    "dtype": "auto",  # bf16 where a GPU has it; a CPU takes the faster one
    "max_length": 1024,  # never the length of the first row, which cuts every longer one
    "seed": 42,
    "use_rslora": False,
    "train_on_prompt": False,  # only answers are learned
}
LORA_RECIPE = {
    "method": "lora",
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ATTN,
    "learning_rate": 1e-4,
}


def test_preset_lora_is_the_seeds_recipe():
    config = as_dict(resolve("lora", {}))
    for name, value in (SEED_RECIPE | LORA_RECIPE | {"eval_file": "data/valid.jsonl"}).items():
        assert config[name] == value, name
    assert resolve("lora", {}).examples_per_step == 32


def test_the_defaults_are_the_seeds_recipe_too():
    assert changed(resolve("lora", {})) == {"eval_file": "data/valid.jsonl"}


def test_preset_full_is_the_seeds_recipe():
    config = resolve("full", {})
    for name, value in SEED_RECIPE.items():
        assert getattr(config, name) == value, name
    assert changed(config, resolve("lora", {})) == {
        "method": "full",
        "learning_rate": 1e-5,
        "gradient_checkpointing": True,
        "save_total_limit": 1,
    }


def test_preset_demo_runs_offline_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = resolve("demo", {})
    for path in (config.train_file, config.eval_file, f"{config.model}/tokenizer.json"):
        assert Path(path).is_absolute()
        assert Path(path).is_file()
    assert config.method == "lora"


def test_presets_quick_and_qlora_are_lora_with_what_was_measured():
    assert changed(resolve("quick", {}), resolve("lora", {})) == {"learning_rate": 1e-3, "num_train_epochs": 2}
    assert resolve("qlora", {}).load_in_4bit
    assert resolve("qlora", {}).learning_rate == resolve("quick", {}).learning_rate


def test_an_at_sign_is_only_magic_in_presets(tmp_path):
    (tmp_path / "c.toml").write_text('model = "@demo/model"')
    assert resolve(str(tmp_path / "c.toml"), {}).model == "@demo/model"
    assert resolve(None, {"system_prompt": "@home"}).system_prompt == "@home"


def test_every_preset_is_good():
    presets = sorted((PACKAGE / "presets").glob("*.toml"))
    assert [path.stem for path in presets] == ["demo", "full", "lora", "qlora", "quick"]
    for path in presets:
        resolve(path.stem, {})


# ------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def old_run(tmp_path):
    """A run's folder with its config.json and the name of a checkpoint."""
    saved = as_dict(resolve("demo", {"lora_r": 4, "seed": 9, "target_modules": "mlp", "eval_file": "v.jsonl"}))
    saved["target_modules"] = list(saved["target_modules"])
    run = tmp_path / "old"
    (run / "checkpoints" / "step-000003").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": saved, "versions": {}}))
    return run


def test_resume_path_goes_on_with_the_runs_own_settings(called_with, old_run):
    expected = {"lora_r": 4, "seed": 9, "target_modules": MLP, "eval_file": "v.jsonl"}
    for path in (old_run, old_run / "checkpoints" / "step-000003"):
        config = called_with("--resume", path)
        assert changed(config, resolve("demo", {})) == {**expected, "resume": str(path)}


def test_flags_lie_over_the_settings_of_a_resumed_run(called_with, old_run):
    config = called_with("--resume", old_run, "--max_steps", 5, "--device", "cpu")
    assert (config.max_steps, config.device, config.lora_r) == (5, "cpu", 4)
    assert called_with("lora", "--resume", old_run).lora_r == 8  # a preset named explicitly is obeyed


def test_a_resumed_run_keeps_its_eval_file_where_its_train_file_has_moved(called_with, old_run):
    """Also under a preset, whose own eval_file belongs to another train_file."""
    for source in ([], ["lora"]):
        config = called_with(*source, "--resume", old_run, "--train_file", "moved.jsonl")
        assert (config.train_file, config.eval_file) == ("moved.jsonl", "v.jsonl")
    with pytest.raises(ConfigError, match=r"eval_file = 'v.jsonl' and val_size = .* both set rows"):
        called_with("--resume", old_run, "--val_size", "0.1")


def test_resume_auto_and_never_use_no_saved_settings(called_with, old_run):
    for word in ("auto", "never"):
        assert called_with("--resume", word, "--output_dir", old_run).lora_r == 8


def test_resume_of_what_is_no_run(called_with, old_run, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no run: .*config.json is missing"):
        called_with("--resume", tmp_path / "none")
    for content in ("", "[]", "{}", '{"config": 7}', '{"config": {'):
        (old_run / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config.json"):
            called_with("--resume", old_run)
    (old_run / "config.json").write_text('{"config": {"lora_r": "x", "lora_q": 1}}')
    with pytest.raises(ConfigError, match=r"the run's config.json: there is no key 'lora_q'. Did you mean lora_r?"):
        called_with("--resume", old_run)


# -------------------------------------------------------------------------------------------- no dead flags


def keys_used(tree):
    """The names N in config.N, run.config.N and self.config.N."""
    holders = {"config", "run.config", "self.config"}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if ast.unparse(node.value) in holders}


def test_every_field_has_an_effect():
    """Each is read somewhere outside config.py, directly or by a property of TrainConfig; a dead flag is a bug."""
    used, trees = set(), {}
    for path in PACKAGE.rglob("*.py"):
        trees[path.stem] = ast.parse(path.read_text("utf-8"))
        text = path.read_text("utf-8")  # adapter.py and others have configs of their own
        takes_it = "TrainConfig" in text or "import Run" in text
        if path.stem != "config" and takes_it:
            used |= keys_used(trees[path.stem])
    (cls,) = [n for n in trees["config"].body if isinstance(n, ast.ClassDef) and n.name == "TrainConfig"]
    for method in [node for node in cls.body if isinstance(node, ast.FunctionDef)]:
        if method.name in used:
            attributes = [node for node in ast.walk(method) if isinstance(node, ast.Attribute)]
            used |= {node.attr for node in attributes if ast.unparse(node.value) == "self"}
    assert FIELDS.keys() - used == set()


def test_train_takes_a_config_and_says_so():
    with pytest.raises(ConfigError, match=r"the settings are a dict: train takes a TrainConfig"):
        loop.train({"model": "demo"})
