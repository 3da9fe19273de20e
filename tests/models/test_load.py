"""What is loaded is a model of one kind with a pad token; others are refused by name before their weights are read."""

import json
import re
import shutil

import pytest

from minilora import cli, demo
from minilora.models import load as loading

# ---------------------------------------------------------------------------------------- models that are refused


@pytest.fixture
def composite(tiny_folder, tmp_path):
    """A function: the tiny model with a config.json as models of text and images have it."""

    def build(**keys):
        folder = tmp_path / "composite"
        shutil.copytree(tiny_folder, folder)
        (folder / "config.json").write_text(json.dumps(keys))
        return folder

    return build


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen2_5_vl"])
@pytest.mark.parametrize("verb", ["train", "plan", "generate", "eval", "preview", "doctor"])
def test_a_composite_model_is_refused_by_name_before_anything_is_loaded(
    kind, verb, composite, tiny_folder, tmp_path, monkeypatch, capsys
):
    """Qwen3.5 has text_config; the hub's Qwen2-VL has the text's keys on top and a vision_config."""
    config = json.loads((tiny_folder / "config.json").read_text())
    keys = {"text_config": config} if kind == "qwen3_5" else config | {"vision_config": {"depth": 2}}
    folder = str(composite(**(keys | {"model_type": kind})))

    def never(*args, **keys):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", never)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    own = {
        "train": ["--train_file", str(rows), "--output_dir", str(tmp_path / "run")],
        "plan": ["--train_file", str(rows)],
        "preview": [str(rows)],
        "generate": ["hello"],
        "eval": ["--eval_file", str(rows)],
        "doctor": [],
    }
    code = cli.main([verb, "--model", folder, *own[verb]])
    printed = capsys.readouterr()
    message = printed.out + printed.err
    assert code == (1 if verb == "doctor" else 2), message
    assert f"model type {kind} is not supported" in message
    assert "_config" in message
    assert "Qwen2, Qwen2.5 and Qwen3" in message
    assert "mistake of ours" not in message
    assert "report it" not in message


def test_a_quantised_model_is_no_composite_one(composite, tiny_folder, capsys):
    config = json.loads((tiny_folder / "config.json").read_text())
    folder = composite(**config, quantization_config={"quant_method": "gptq", "bits": 4})
    assert cli.main(["generate", "--model", str(folder), "hello"]) == 2
    assert "its weights are quantised" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- the pad token


def spell(folder, pad, instead):
    """Give <|endoftext|> another name in the tokenizer of a folder, whose settings name only the pad token."""
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", instead))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        settings.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": pad}))


@pytest.mark.parametrize(
    ("pad", "instead", "chosen"),
    [
        ("<|im_end|>", "<|endoftext|>", "<|endoftext|>"),
        ("<|im_end|>", "<|vision_pad|>", "<|vision_pad|>"),
        (None, "<pad>", "<pad>"),
        ("[PAD]", "<|endoftext|>", "<|endoftext|>"),  # named and not there: transformers adds it
        ("<|vision_pad|>", "<|vision_pad|>", "<|vision_pad|>"),
    ],
)
def test_the_pad_token_is_one_that_the_model_embeds(tiny_folder, tmp_path, pad, instead, chosen):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    spell(folder, pad, instead)
    tokenizer = loading.load_tokenizer(folder)
    assert tokenizer.pad_token == chosen
    assert tokenizer.pad_token_id < json.loads((folder / "config.json").read_text())["vocab_size"]


def test_a_tokenizer_without_any_pad_token_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    spell(folder, "<|im_end|>", "<|nothing|>")
    with pytest.raises(loading.ModelError, match=r"no pad token apart from its end token .*tokenizer_config.json"):
        loading.load_tokenizer(folder)


# ---------------------------------------------------------------------------------------- a broken config.json


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_act", None, "'hidden_act' expected str, got NoneType"),
        ("intermediate_size", 512, r"not match its config.json: \d+ tensors; the first: model\.layers\.\d+\.mlp\.\w+"),
    ],
)
def test_a_config_that_is_not_of_these_weights_gets_one_line(tiny_folder, tmp_path, capfd, key, value, said):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "input": "", "output": "b"}\n')
    argv = ["train", "--model", str(folder), "--train_file", str(rows), "--output_dir", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    printed = capfd.readouterr().err
    assert re.search(said, printed)
    assert "tokenizer" not in printed
    assert "REPORT" not in printed  # transformers' table of weights


@pytest.mark.parametrize("verb", ["train", "doctor"])
@pytest.mark.parametrize("name", ["@demo/model", "./nothing", "a/b/c"])
def test_what_is_no_folder_and_no_hub_name_is_refused_once(tmp_path, capsys, verb, name):
    own = ["--train_file", "rows.jsonl", "--output_dir", str(tmp_path)] if verb == "train" else []
    if own:
        (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n')
        own[1] = str(tmp_path / "rows.jsonl")
    assert cli.main([verb, "--model", name, *own]) == 2
    assert "no such folder, and it is no hub name (OWNER/NAME)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- the machine


def test_a_folder_for_compiled_code_that_cannot_be_made_is_named(tmp_path, monkeypatch, capsys):
    """torch makes it when transformers is imported, so that nothing can be loaded."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cli.main(["generate", "--model", str(demo.DEMO_DIR), "hello"]) == 2
    assert "TORCHINDUCTOR_CACHE_DIR" in capsys.readouterr().err
