"""What every result holds besides its weights: an adapter, best/, a model, a merged folder, an exported adapter."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import IDS, bare_runs, save_random_adapter, small_config, write_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minilora import cli, loop
from minilora.adapters import format as adapter_format
from minilora.adapters.export import export_portable
from minilora.adapters.merge import merge
from minilora.config import TrainConfig
from minilora.errors import CheckpointError, ModelError
from minilora.inference.evaluate import Request, evaluate
from minilora.inference.generate import load_chat_model
from minilora.inference.multi_adapter import load_several
from minilora.models import load as loading
from minilora.models import trained
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

PROMPT = "Answer in one word."
THETA = 500_000.0
RESULTS = ["adapter", "best of lora", "exported", "merged", "model", "best of full"]
MODELS = RESULTS[3:]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def base(tiny_folder, tmp_path_factory):
    """A base as transformers 5 saves one that is no chat model: sampling, a repetition penalty, another end token."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("base") / "base")
    config = json.loads((folder / "config.json").read_text())
    end = loading.load_tokenizer(folder).convert_tokens_to_ids("<|endoftext|>")
    rope = {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | rope | {"eos_token_id": end}))
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(sampling | {"eos_token_id": end, "max_new_tokens": 512}))
    return folder


@pytest.fixture(scope="module")
def results(base, tmp_path_factory):
    """The folder of each kind of result, all of them trained with PROMPT."""
    found = {}
    with bare_runs():
        for method in ("lora", "full"):
            folder = tmp_path_factory.mktemp(method)
            keys = {"method": method, "system_prompt": PROMPT, "eval_file": str(write_jsonl(folder / "valid", 4, 3))}
            config = small_config(base, folder, **keys)
            summary = loop.train(config)
            run = Path(config.output_dir)
            found |= {summary.result: run / summary.result, f"best of {method}": run / "best"}
    found |= {name: tmp_path_factory.mktemp("others") / name for name in ("merged", "exported")}
    merge(found["adapter"], found["merged"])
    export_portable(found["adapter"], found["exported"])
    return found


def read(path):
    return json.loads(path.read_text("utf-8"))


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", RESULTS)
def test_the_tokenizer_is_the_bases_own(kind, results, base):
    """It was saved anew, in a form that transformers 4 does not load."""
    for name in TOKENIZER_FILES:
        assert (results[kind] / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("kind", RESULTS)
def test_the_generation_config_says_what_was_trained(kind, results, base):
    """Greedy, to the trained end: a base's repetition penalty and sampling once travelled along."""
    from transformers import GenerationConfig

    tokenizer = loading.load_tokenizer(base)
    end, text_end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    expected = {"do_sample": False, "eos_token_id": [end, text_end], "pad_token_id": text_end, "max_new_tokens": 512}
    assert read(results[kind] / "generation_config.json") == expected
    GenerationConfig.from_pretrained(results[kind]).validate(strict=True)


@pytest.mark.parametrize("kind", MODELS)
def test_the_config_is_spelled_for_transformers_4_and_5(kind, results, base):
    """Without a root rope_theta transformers 4 takes 10,000."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, before = read(results[kind] / "config.json"), read(base / "config.json")
    end = loading.load_tokenizer(base).convert_tokens_to_ids("<|im_end|>")
    added = {"rope_theta": THETA, "torch_dtype": config["dtype"], "dtype": config["dtype"], "eos_token_id": end}
    assert config == before | added
    theirs, own = AutoConfig.from_pretrained(results[kind]), AutoConfig.from_pretrained(base)
    assert theirs.rope_parameters == own.rope_parameters
    plain = AutoModelForCausalLM.from_pretrained(results[kind], dtype=torch.float32).eval()
    ours = load_chat_model(str(results[kind]), None, "float32", "cpu").model
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, ours(IDS).logits)


def test_a_scaled_rotary_embedding_is_spelled_both_ways_too(base):
    rope = {"rope_theta": THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    tokenizer = loading.load_tokenizer(base)
    made = trained.model_config({"model_type": "qwen2", "rope_parameters": rope}, tokenizer)
    assert made["rope_theta"] == THETA
    assert made["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert trained.model_config(made, tokenizer) == made


def test_a_base_of_transformers_4_keeps_its_config_byte_for_byte(tiny_folder, tmp_path, load_tiny):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    config = read(base / "config.json")
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    (base / "config.json").write_text(json.dumps(config, indent=1))
    save_random_adapter(load_tiny(), tmp_path / "adapter", base, ["q_proj"])
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_merging_in_another_dtype_names_it_in_both_spellings_and_counts_anew(tiny_folder, tmp_path, load_tiny):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    with safe_open(base / "model-00001-of-00001.safetensors", "pt") as file:
        names = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "adapter_config.json").write_text("{}")  # transformers would put that adapter on the merged model
    save_random_adapter(load_tiny(), tmp_path / "adapter", base, ["q_proj"])
    merge(tmp_path / "adapter", tmp_path / "merged", dtype="bfloat16")
    config = read(tmp_path / "merged" / "config.json")
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    found = read(tmp_path / "merged" / "model.safetensors.index.json")
    assert found["metadata"]["total_size"] == sum(2 * param.numel() for param in load_tiny().parameters())
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_changed_tokenizer_is_saved_and_not_copied(base, tmp_path):
    tokenizer = loading.load_tokenizer(base)
    for name in ("same", "changed"):
        (tmp_path / name).mkdir()
    trained.save_tokenizer(tmp_path / "same", tokenizer)
    assert (tmp_path / "same" / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    tokenizer.add_tokens(["<mine>"])
    trained.save_tokenizer(tmp_path / "changed", tokenizer)
    assert "<mine>" in loading.load_tokenizer(tmp_path / "changed").get_vocab()
    assert not isinstance(read(tmp_path / "changed" / "tokenizer_config.json").get("extra_special_tokens"), list)


# ---------------------------------------------------------------------------------------- the system prompt


@pytest.mark.parametrize("kind", RESULTS)
def test_every_result_is_asked_as_it_was_trained(kind, results):
    """A merged model and one of method full kept no system prompt: 0.178 nats became 1.757."""
    where = ("adapter" if (results[kind] / "adapter_config.json").is_file() else "model", str(results[kind]))
    model, adapter = (where[1], None) if where[0] == "model" else (None, where[1])
    assert load_chat_model(model, adapter, "float32", "cpu").system_prompt == PROMPT
    assert load_chat_model(model, adapter, "float32", "cpu", "").system_prompt == ""


def test_eval_asks_a_merged_model_as_it_was_trained(results, tmp_path):
    rows = str(write_jsonl(tmp_path / "rows.jsonl", 3))
    alone, both = (
        evaluate(Request(rows, dtype="float32", device="cpu", **which))
        for which in ({"model": str(results["merged"])}, {"adapter": str(results["adapter"])})
    )
    assert alone.system_prompt == both.system_prompt == PROMPT
    assert alone.scores["base"].loss == pytest.approx(both.scores["adapter"].loss, rel=1e-5)
    assert evaluate(Request(rows, model=str(results["model"]), system_prompt="")).system_prompt == ""


def test_eval_asks_a_plain_model_with_trainings_default(base, tmp_path):
    rows = str(write_jsonl(tmp_path / "rows.jsonl", 2))
    assert evaluate(Request(rows, model=str(base), device="cpu")).system_prompt == TrainConfig.system_prompt


@pytest.mark.parametrize("content", ["[]", "{", '{"system_prompt": 3}'])
def test_a_damaged_record_is_named(content, base, tmp_path, capsys):
    model = shutil.copytree(base, tmp_path / "model")
    (model / "minilora.json").write_text(content)
    with pytest.raises(ModelError, match=r"minilora\.json: .* give --system_prompt\."):
        trained.trained_system_prompt(model)
    assert cli.main(["generate", "--model", str(model), "hello"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_of_0_1_is_asked_as_its_run_says(results, tmp_path):
    """0.1 wrote no record beside the model of method full."""
    run = shutil.copytree(results["model"].parent, tmp_path / "run")
    (run / "model" / "minilora.json").unlink()
    assert trained.trained_system_prompt(run / "model") == PROMPT
    (run / "config.json").write_text("{}")
    assert trained.trained_system_prompt(run / "model") is None


def rows_with_systems(path, systems):
    rows = [
        {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}
        for system, turns in zip(
            systems,
            [
                [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]
                for i in range(len(systems))
            ],
            strict=True,
        )
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("systems", "expected"),
    [
        (['你很 "terse"。\n <|im_end|>'] * 8, '你很 "terse"。\n <|im_end|>'),
        (["You are terse."] * 7 + ["You are long."], PROMPT),
        (["You are terse."] * 7 + [""], PROMPT),
        ([""] * 8, PROMPT),
    ],
    ids=["one", "two", "some", "none"],
)
def test_a_system_turn_that_all_rows_bring_is_what_was_trained(systems, expected, base, tmp_path):
    """The setting was recorded in place of what was trained."""
    config = small_config(
        base, tmp_path, train_file=rows_with_systems(tmp_path / "rows.jsonl", systems), system_prompt=PROMPT
    )
    with bare_runs(), ExitStack() as held:
        run = prepare(config, StopRequest(), held, header=False)
        assert run.system_prompt == expected


def test_no_system_turn_is_what_was_trained_where_there_is_none(base, tmp_path, bare_run, capsys):
    config = small_config(base, tmp_path, system_prompt="", method="full", max_steps=1)
    loop.train(config)
    assert trained.trained_system_prompt(Path(config.output_dir) / "model") == ""
    printed = capsys.readouterr().out
    assert "trained without a system turn" in printed
    assert "other programs insert 'You are a helpful assistant.' if a request has no system turn" in printed


def test_an_adapter_of_other_programs_is_asked_with_the_templates_system_turn(base, load_tiny, tmp_path):
    """TRL renders its rows with the chat template, which inserts one; the merged folder keeps it."""
    save_random_adapter(load_tiny(), tmp_path / "adapter", base, ["q_proj"])
    weights = tmp_path / "adapter" / adapter_format.WEIGHTS
    save_file(load_file(weights), weights, {"format": "pt"})
    inserted = "You are a helpful assistant."
    assert load_chat_model(None, str(tmp_path / "adapter"), "float32", "cpu").system_prompt == inserted
    assert load_several({"theirs": tmp_path / "adapter"}, None, "float32", "cpu")[0].system_prompt == inserted
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert trained.trained_system_prompt(tmp_path / "merged") == inserted


# ---------------------------------------------------------------------------------------- what the end of a run says


def test_the_end_names_the_system_prompt(base, tmp_path, bare_run, capsys):
    loop.train(small_config(base, tmp_path, system_prompt=PROMPT, max_steps=1))
    printed = capsys.readouterr().out
    assert f"these commands use it: {PROMPT!r}" in printed
    assert "other programs insert 'You are a helpful assistant.'" in printed
    assert "nothing is left to train" not in printed


def test_a_finished_run_that_is_resumed_says_that_no_step_was_left(base, tmp_path, bare_run, capsys):
    keys = {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    loop.train(small_config(base, tmp_path, **keys))
    capsys.readouterr()
    loop.train(small_config(base, tmp_path, **keys, resume="auto"))
    printed = capsys.readouterr().out
    assert printed.count("nothing is left to train") == 1
    assert "all 1 steps are done: nothing is left to train; a larger --max_steps" in printed


@pytest.mark.parametrize(("method", "result"), [("lora", "adapter"), ("full", "model")])
def test_other_rows_for_a_finished_run_name_the_way_to_go_on(method, result, base, tmp_path, bare_run):
    keys = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "method": method}
    loop.train(small_config(base, tmp_path, **keys))
    other = str(write_jsonl(tmp_path / "other.jsonl", 32, seed=5))
    with pytest.raises(CheckpointError, match=f"on other rows, .*: --{result} {tmp_path}/run/{result}$"):
        loop.train(small_config(base, tmp_path, **keys, resume="auto", train_file=other))


def test_no_evaluation_is_no_evaluation_that_was_not_better(base, tmp_path, bare_run, capsys, monkeypatch):
    """It was said where none took place after the first step."""
    rows = str(write_jsonl(tmp_path / "valid.jsonl", 4, seed=3))
    real = loop.record_evaluation
    monkeypatch.setattr(loop, "record_evaluation", lambda run, loss: run.state.step or real(run, loss))
    loop.train(small_config(base, tmp_path, eval_file=rows, max_steps=2, eval_steps=1))
    assert "no evaluation was better" not in capsys.readouterr().out
