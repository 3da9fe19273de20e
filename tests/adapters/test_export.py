"""Adapters for other programs; what `verify` finds; and, for each verb, paths and adapters that are wrong."""

import errno
import json
import shlex
import shutil

import pytest
import torch
from conftest import logits, save_random_adapter, write_jsonl
from safetensors.torch import load_file, save_file

from minilora import cli
from minilora.adapters import format as adapter_format
from minilora.adapters.export import export_portable, how_to_use
from minilora.config import TARGET_GROUPS
from minilora.errors import AdapterError
from minilora.lora import lora_layers
from minilora.models.fingerprint import fingerprint
from minilora.tools.verify import verify

ALL = TARGET_GROUPS["all"]


@pytest.fixture
def write(load_tiny, tiny_folder, tmp_path):
    """A function that saves a trained (as it were) adapter and returns (folder, model)."""

    def write(targets=ALL, rank=4, alpha=6, rslora=False):
        tiny = load_tiny()
        save_random_adapter(tiny, tmp_path / "adapter", tiny_folder, targets, rank, alpha, rslora=rslora)
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            shutil.copy(tiny_folder / name, tmp_path / "adapter")
        return tmp_path / "adapter", tiny

    return write


def change(folder, edit):
    """Rewrite the adapter's tensors, its metadata kept."""
    path, metadata = folder / adapter_format.WEIGHTS, adapter_format.read_metadata(folder)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


# ---------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    ("targets", "rank", "alpha", "rslora"),
    [(ALL, 4, 6, True), (ALL[:4], 2, 16, False), (ALL[4:], 3, 3, True)],
    ids=["all-rs", "attn", "mlp-rs"],
)
def test_a_portable_adapter_is_the_same_function_here_and_in_peft(
    targets, rank, alpha, rslora, write, load_tiny, tmp_path
):
    """Also for a reader that takes no notice of lora_alpha and use_rslora: B A alone is the update."""
    from peft import PeftModel

    folder, tuned = write(targets, rank, alpha, rslora)
    output = tmp_path / "portable"
    export_portable(folder, output)
    settings = json.loads((output / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (rank, rank, False)
    assert settings["target_modules"] == sorted(targets)
    assert adapter_format.read_metadata(output) == adapter_format.read_metadata(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (folder / name).read_bytes()

    expected = logits(tuned)
    assert (expected - logits(load_tiny())).abs().max() > 0.05
    ours = load_tiny()
    adapter_format.load(ours, output, fingerprint(ours))
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)
    theirs = PeftModel.from_pretrained(load_tiny(), output)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)

    tensors = load_file(output / adapter_format.WEIGHTS)
    for name, layer in lora_layers(tuned).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(B @ A, layer.delta().detach(), rtol=0, atol=1e-6)


def test_an_adapter_of_peft_becomes_portable_too(load_tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(load_tiny(), settings)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_" in name:
                param.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    export_portable(tmp_path / "theirs", tmp_path / "portable")
    ours = load_tiny()
    adapter_format.load(ours, tmp_path / "portable", fingerprint(ours))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop(next(name for name in t if "lora_B" in name)), "lora_B.weight"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(2)}), "embed_tokens"),
        (lambda t: next(iter(t.values())).fill_(float("nan")), "not finite"),
        (lambda t: t.update({name: torch.zeros(9, 9) for name in list(t)[:1]}), "shape of"),
        (lambda t: t.clear(), "match nothing"),
    ],
    ids=["missing", "extra", "nan", "shape", "empty"],
)
def test_what_is_not_a_whole_adapter_is_not_exported(edit, reason, write, tmp_path):
    folder, _ = write(ALL[:1])
    change(folder, edit)
    with pytest.raises(AdapterError, match=reason):
        export_portable(folder, tmp_path / "portable")
    assert not (tmp_path / "portable").exists()


def test_nothing_is_overwritten(write, tmp_path):
    folder, _ = write(ALL[:1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for output in (tmp_path / "full", tmp_path / "full" / "mine", folder):
        before = adapter_format.read_config(folder)
        with pytest.raises(AdapterError, match="--output_dir"):
            export_portable(folder, output)
        assert adapter_format.read_config(folder) == before


def test_export_without_the_flag_is_portable_too(write, tmp_path, capsys):
    """`--portable` was once required, although there is no other form."""
    folder, _ = write()
    assert cli.main(["export", "--adapter", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    assert adapter_format.read_config(tmp_path / "out").scale == 1


def test_a_full_disk_names_the_output_folder(write, tmp_path, capsys, monkeypatch):
    """The copy of the tokenizer once blamed its source."""
    folder, _ = write()

    def copyfile(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    assert cli.main(["export", "--adapter", str(folder), "--output_dir", str(tmp_path / "out")]) == 2
    message = f"minilora: {tmp_path / 'out'}: cannot be written: No space left on device.\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


def test_the_note_says_what_other_programs_take(write, tmp_path, capsys):
    folder, _ = write()
    argv = ["export", "--adapter", str(folder), "--output_dir", str(tmp_path / "out"), "--portable"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    for word in ("vllm serve", "--lora-modules", "convert_lora_to_gguf.py", "llama-cli", "Ollama", "Be brief."):
        assert word in printed
    assert "--max-lora-rank" not in printed  # vLLM's own limit is 16
    lines = printed.splitlines()
    assert any("llama-cli" in line and "--temp 0 --repeat-penalty 1 -sys 'Be brief.'" in line for line in lines)
    assert any('"role": "system", "content": "Be brief."' in line for line in lines)
    assert any("--override-generation-config '{\"temperature\": 0}'" in line for line in lines)
    for setting in ('SYSTEM "Be brief."', "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"):
        assert any(line.strip() == setting for line in lines)
    assert "a server inserts the one of its chat template" in printed
    for rank, flag in ((17, "--max-lora-rank 32"), (64, "--max-lora-rank 64")):
        config = adapter_format.AdapterConfig("base", rank, rank, 0.0, ("q_proj",), False)
        assert flag in dict(how_to_use(folder, config, ""))["vLLM"]
        assert "system" not in dict(how_to_use(folder, config, ""))
        assert "trained without a system turn" in dict(how_to_use(folder, config, ""))["no system"]
        assert not {"system", "no system"} & dict(how_to_use(folder, config, None)).keys()


def test_the_printed_commands_are_whole_whatever_the_prompt_is(tmp_path):
    """Quotes, lines and length of a system prompt once broke or cut what was printed."""
    prompt = 'It\'s "you".\n' + "Be brief. " * 200
    config = adapter_format.AdapterConfig("my base", 8, 8, 0.0, ("q_proj",), False)
    text = "\n".join(text for _, text in how_to_use(tmp_path / "my adapter", config, prompt))
    words = shlex.split(text[text.index("llama-cli") : text.index("reads no safetensors")])
    assert words[words.index("-sys") + 1] == prompt
    words = shlex.split(text[text.index("curl") : text.index("python convert")])
    assert json.loads(words[words.index("-d") + 1])["messages"][0] == {"role": "system", "content": prompt}
    words = shlex.split(text[text.index("vllm serve") : text.index("then curl")])
    assert words[words.index("--generation-config") + 1] == str(tmp_path / "my adapter")


# ---------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("rslora", [False, True])
def test_verify_says_what_it_checked(rslora, write, tiny_folder, capsys):
    folder, _ = write(rslora=rslora)
    verdict = verify(folder)
    assert (verdict.num_layers, verdict.same_base) == (14, True)
    assert 0 < verdict.max_logit_difference < 1e-4 < 0.01 < verdict.largest_effect
    assert cli.main(["verify", "--adapter", str(folder), "--model", str(tiny_folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(
        f"verified     {folder}: r 4 on 14 layers, all finite; the base it was trained on; moves"
    )
    assert f"{verdict.max_logit_difference:.2g}" in captured.out
    assert captured.out.count("\n") == 1
    assert captured.err == ""


def test_verify_sees_an_adapter_that_is_another_function_when_merged(write, monkeypatch, capsys):
    """A wrong scale in one of the two ways would be found; so would an update put into the wrong layer."""
    folder, _ = write()
    monkeypatch.setattr("minilora.lora.LoRALinear.delta", lambda self: 1.01 * self.scale * (self.lora_B @ self.lora_A))
    assert cli.main(["verify", "--adapter", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"minilora: {folder}: merged into the weights, its logits differ by ")
    assert captured.out == ""


def test_verify_says_when_the_adapter_does_not_name_its_base(write):
    folder, _ = write()
    save_file(load_file(folder / adapter_format.WEIGHTS), folder / adapter_format.WEIGHTS, {"format": "pt"})
    assert verify(folder).same_base is False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_verified(value, write, capsys):
    folder, _ = write()
    change(folder, lambda tensors: tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].fill_(value))
    assert cli.main(["verify", "--adapter", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message == (
        f"minilora: {folder / adapter_format.WEIGHTS}: not finite: 1 of its tensors, the first "
        "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight\n"
    )


# ---------------------------------------------------------------------------------------- wrong, for each verb


def test_verify_refuses_target_modules_of_other_layers(write, tmp_path, capsys):
    """PEFT reads target_modules first: it would put new, empty layers where this adapter has none."""
    folder, _ = write(ALL[:2])
    path = folder / adapter_format.CONFIG
    settings = json.loads(path.read_text())
    for targets, message in {
        ("q_proj", "v_proj"): "target_modules names q_proj, v_proj, but the tensors of adapter_model.safetensors are "
        "those of k_proj, q_proj: PEFT would load other layers. Correct target_modules.",
        ("q_proj",): "target_modules names q_proj, but the tensors of adapter_model.safetensors are those of k_proj, "
        "q_proj: PEFT would load other layers. Correct target_modules.",
        "q_proj": "target_modules = 'q_proj' is a text, which PEFT compares with whole names: it would find no layer. "
        'Write a list: ["q_proj"].',
    }.items():
        path.write_text(json.dumps(settings | {"target_modules": targets}))
        assert cli.main(["verify", "--adapter", str(folder)]) == 2
        assert capsys.readouterr().err == f"minilora: {path}: {message}\n"


@pytest.fixture
def verbs(tmp_path):
    """Arguments of each verb that takes an adapter; DIR stands for its folder."""
    rows = write_jsonl(tmp_path / "rows.jsonl", 2)
    out = ["--output_dir", tmp_path / "out"]
    return {
        "generate": ["generate", "--adapter", "DIR", "hello"],
        "generate file": [
            *("generate", "--adapter", "DIR", "--input_file", rows, "--output_file", tmp_path / "answers.jsonl")
        ],
        "chat": ["chat", "--adapter", "DIR"],
        "chat, second": ["chat", "--adapter", tmp_path / "adapter", "--adapter", "bad=DIR"],
        "eval": ["eval", "--adapter", "DIR", "--eval_file", rows],
        "merge": ["merge", "--adapter", "DIR", *out],
        "export": ["export", "--adapter", "DIR", "--portable", *out],
        "verify": ["verify", "--adapter", "DIR"],
    }


VERBS = ["generate", "generate file", "chat", "chat, second", "eval", "merge", "export", "verify"]


def refused(argv, folder, capsys):
    """The one message of a verb that must refuse this adapter folder."""
    assert cli.main([str(word).replace("DIR", str(folder)) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("minilora: ")
    assert "Traceback" not in captured.err + captured.out
    assert captured.out == ""
    return captured.err.removesuffix("\n")


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_without_an_adapter(verb, verbs, write, tmp_path, capsys, monkeypatch):
    write()
    monkeypatch.setattr("minilora.models.load.load_model", lambda *args: pytest.fail("a model was loaded before"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    for name in ("none", "empty", "file"):
        message = refused(verbs[verb], tmp_path / name, capsys)
        assert f"{tmp_path / name} is no adapter: adapter_config.json" in message
        assert "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_of_another_shape(verb, verbs, write, tmp_path, capsys):
    """Every tensor that does not fit is named, under one line that says where."""
    folder, _ = write(ALL[:1])
    shutil.copytree(folder, tmp_path / "bad")
    change(tmp_path / "bad", lambda tensors: tensors.update({name: torch.zeros(7, 5) for name in tensors}))
    first, *rest = refused(verbs[verb], tmp_path / "bad", capsys).splitlines()
    assert first == f"minilora: {tmp_path / 'bad' / adapter_format.WEIGHTS}: does not fit this model:"
    assert rest
    assert all(line.startswith("  shape of base_model.model.model.layers.") for line in rest)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "export"])
def test_an_adapter_of_another_base(verb, verbs, write, tmp_path, capsys):
    folder, _ = write(ALL[:1])
    shutil.copytree(folder, tmp_path / "bad")
    tensors, metadata = load_file(folder / adapter_format.WEIGHTS), adapter_format.read_metadata(folder)
    save_file(tensors, tmp_path / "bad" / adapter_format.WEIGHTS, metadata | {"base_fingerprint": "f" * 64})
    message = refused(verbs[verb], tmp_path / "bad", capsys)
    assert f"{tmp_path / 'bad'} was trained on another base: its fingerprint is ffffffffffff" in message
    assert "\n" not in message


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "export"])
def test_a_base_that_is_not_there(verb, verbs, write, tmp_path, capsys):
    folder, _ = write(ALL[:1])
    for path in (folder, tmp_path / "bad"):
        if path != folder:
            shutil.copytree(folder, path)
        settings = json.loads((path / adapter_format.CONFIG).read_text()) | {"base_model_name_or_path": "/nowhere/base"}
        (path / adapter_format.CONFIG).write_text(json.dumps(settings))
    message = refused(verbs[verb], tmp_path / "bad", capsys)
    assert message.startswith(
        "minilora: model '/nowhere/base': there is no such folder, and it is no hub name (OWNER/NAME)."
    )
    assert f"{adapter_format.CONFIG} names this base: give its new place as --model." in message


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["eval", "--adapter", "DIR", "--eval_file", "none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["eval", "--adapter", "DIR"], "--eval_file"),
        (["eval", "--eval_file", "ROWS"], "give --adapter DIR, or --model NAME"),
        (["eval", "--adapter", "DIR", "--eval_file", "ROWS", "--merged", "none"], "'none'"),
        (["eval", "--adapter", "DIR", "--eval_file", "ROWS", "--max_rows", "-1"], "--max_rows = -1 must be at least 0"),
        (
            ["eval", "--adapter", "DIR", "--eval_file", "ROWS", "--batch_size", "0"],
            "--batch_size = 0 must be at least 1",
        ),
        (["eval", "--adapter", "DIR", "--eval_file", "ROWS", "--json", "none/x.json"], "--json none/x.json"),
        (["generate", "--adapter", "DIR", "--input_file", "none.jsonl", "--output_file", "o"], "none.jsonl cannot be"),
        (["generate", "--adapter", "DIR", "--input_file", "ROWS"], "both --input_file and --output_file"),
        (["generate", "--adapter", "DIR", "--output_file", "o", "hello"], "both --input_file and --output_file"),
        (["generate", "--adapter", "DIR", "--input_file", "ROWS", "--output_file", "o", "hello"], "give one or more"),
        (["generate", "--adapter", "DIR"], "give one or more of PROMPT"),
        (["chat", "--adapter", "DIR", "--adapter", "DIR"], "are both named"),
        (["export", "--adapter", "DIR", "--portable"], "--output_dir"),
        (["verify"], "--adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_files_and_flags_that_are_wrong(argv, reason, write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = write(ALL[:1])
    monkeypatch.setattr("minilora.models.load.load_model", lambda *args: pytest.fail("a model was loaded before"))
    rows = write_jsonl(tmp_path / "rows.jsonl", 2)
    message = refused([word.replace("ROWS", str(rows)) for word in argv], folder, capsys)
    assert reason in message
    assert "\n" not in message
