"""Whole steps and whole runs: what is trained is the formula, however it is cut, stopped, resumed or disturbed."""

import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    bare_runs,
    first_step,
    flat,
    gradients_of,
    lines,
    randomize_lora,
    relative_error,
    small_config,
    trained,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from minilora import batching, cli, loop, lora
from minilora.adapters import format as adapter_format
from minilora.data import cache
from minilora.data.dataset import IGNORE
from minilora.errors import AdapterError, ConfigError, DivergedError, OutOfMemoryError, StoppedError
from minilora.lora import lora_layers
from minilora.models.fingerprint import base_tensors
from minilora.objectives import sft
from minilora.training import checkpoint, finish, recovery, report, setup
from minilora.training.signals import StopRequest
from minilora.utils import device

pytestmark = pytest.mark.usefixtures("bare_run")
WHOLE_STEP = 10**6  # a token budget that holds a step at once


def digest(tensors) -> str:
    """One number for the bits of named tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(dict(tensors).items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def same_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert relative_error(found[name], grad) < tolerance, name


# ---------------------------------------------------------------------------------------- the gradient of a step


def in_groups_of(count):
    """A cut that puts so many examples into each micro-batch, whatever their lengths."""
    return lambda lengths, budget: [list(range(len(lengths)))[i : i + count] for i in range(0, len(lengths), count)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_how_a_step_is_cut_does_not_change_its_gradient(start, method, monkeypatch):
    """A mean of micro-batch means would weigh short answers more: lengths here are very unequal."""
    run = start(method=method, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    randomize_lora(run.model)
    counts = {len(example.input_ids) for example in first_step(run)[0]}
    assert max(counts) > 1.5 * min(counts)
    whole = gradients_of(run, WHOLE_STEP)
    for budget in (1, 70, 100, 150, 333):
        same_gradients(gradients_of(run, budget), whole)
    for count in (1, 2, 4, 8):
        monkeypatch.setattr(batching, "pack", in_groups_of(count))
        same_gradients(gradients_of(run), whole)


def plain_gradients(oracle, examples, supervised, autocast=False):
    """Hugging Face's logits of each example alone, their cross entropies summed, divided by the step's tokens."""
    total = torch.zeros(())
    for example in examples:
        ids, labels = (torch.from_numpy(array).long() for array in (example.input_ids, example.labels))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = oracle(input_ids=ids[None]).logits[0]
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    (total / supervised).backward()


@pytest.mark.parametrize(("method", "share_prefix"), [("lora", "on"), ("lora", "off"), ("full", "on")])
def test_the_gradient_is_that_of_the_plain_formula(start, load_tiny, method, share_prefix, monkeypatch):
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    run = start(method=method, target_modules=targets, lora_r=4, share_prefix=share_prefix)
    randomize_lora(run.model, std=0.05)  # at 0.2 the model is so sharp that fp32 alone, in any order, errs by 5e-5
    found = gradients_of(run)

    oracle = load_tiny()
    if method == "lora":
        lora.inject(oracle, targets, rank=4, alpha=32)
        randomize_lora(oracle, std=0.05)
        monkeypatch.setattr(lora, "lora_linear", lora.plain_lora_linear)
    else:
        oracle.requires_grad_(True)
    exact = oracle.double()
    plain_gradients(exact, *first_step(run))
    same_gradients(found, {name: param.grad for name, param in trained(exact).items()})


def test_bf16_gradients_are_as_exact_as_the_plain_ones(start, load_tiny, tmp_path, monkeypatch):
    """Both against the gradient in fp32: the plain path is Hugging Face's logits and loss under autocast."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = start(dtype=dtype, output_dir=str(tmp_path / dtype))
        randomize_lora(run.model)
        found[dtype] = gradients_of(run)
    assert {grad.dtype for grad in found["bfloat16"].values()} == {torch.float32}

    oracle = load_tiny(torch.bfloat16)
    lora.inject(oracle, run.config.target_modules, run.config.lora_r, run.config.lora_alpha)
    randomize_lora(oracle)
    monkeypatch.setattr(lora, "lora_linear", lora.plain_lora_linear)
    plain_gradients(oracle, *first_step(run), autocast=True)
    plain = {name: param.grad for name, param in trained(oracle).items()}
    exact = flat(found["float32"])
    assert relative_error(flat(found["bfloat16"]), exact) <= 1.5 * relative_error(flat(plain), exact)


def test_dropout_is_a_function_of_seed_and_step(start):
    run = start(lora_dropout=0.3)
    randomize_lora(run.model)
    one = gradients_of(run)
    torch.manual_seed(12345)
    assert digest(gradients_of(run)) == digest(one)
    examples, supervised = first_step(run)
    run.state.step = 1  # the same examples in another step
    run.optimizer.zero_grad(set_to_none=True)
    loop.gradients(run, examples, supervised)
    assert digest({name: param.grad for name, param in trained(run.model).items()}) != digest(one)
    seeds = {loop.step_seed(seed, step) for seed in range(30) for step in range(30)}
    assert len(seeds) == 900


def test_the_step_clips_to_max_grad_norm(start, monkeypatch):
    """The gradient that AdamW gets has the norm asked for; the one that is logged is that before clipping."""
    run = start(max_grad_norm=1e-3)
    full = torch.stack([grad.norm() for grad in gradients_of(run).values()]).norm()
    run.optimizer.zero_grad(set_to_none=True)
    seen = []
    step = run.optimizer.step

    def watched():
        seen.append(torch.stack([param.grad.norm() for param in trained(run.model).values()]).norm())
        step()

    monkeypatch.setattr(run.optimizer, "step", watched)
    record = loop.train_step(run)
    assert record["grad_norm"] == pytest.approx(float(full), rel=1e-5)
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)
    assert all(param.grad is None for param in run.model.parameters())


def test_evaluation_is_the_mean_over_tokens_however_it_is_cut(start, load_tiny):
    run = start(lora_dropout=0.5)
    randomize_lora(run.model, std=0.05)  # with B = 0 a dropout left on would not show
    oracle = load_tiny()
    lora.inject(oracle, run.config.target_modules, run.config.lora_r, run.config.lora_alpha)
    randomize_lora(oracle, std=0.05)
    nats, count = 0.0, 0
    for example in (run.data.train[i] for i in range(len(run.data.train))):
        ids, labels = (torch.from_numpy(array).long() for array in (example.input_ids, example.labels))
        with torch.no_grad():
            logits = oracle(input_ids=ids[None]).logits[0, :-1]
        nats += F.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] != IGNORE).sum())
    for budget in (1, 100, WHOLE_STEP):
        run.state.max_tokens = budget
        assert loop.evaluate(run, run.data.train) == pytest.approx(nats / count, rel=1e-6)


# ---------------------------------------------------------------------------------------- a run


def test_a_run_lowers_the_loss_and_leaves_its_folder(make_config, tmp_path, tiny_folder):
    base_file = tiny_folder / "model.safetensors"
    before = base_file.read_bytes()
    valid = write_jsonl(tmp_path / "valid.jsonl", 6, seed=9)
    config = make_config(num_train_epochs=3, eval_file=str(valid), lora_dropout=0.05, save_total_limit=2)
    summary = loop.train(config)
    folder = Path(config.output_dir)

    assert summary.last_loss < summary.first_loss - 1
    assert summary.best_eval_loss == summary.last_eval_loss < summary.first_eval_loss - 1
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} >= {
        *("config.json", "metrics.jsonl", "summary.json", "adapter", "best", "checkpoints")
    }
    assert not list(folder.rglob("*.partial"))
    assert base_file.read_bytes() == before

    steps, evals = lines(folder)
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert [record["step"] for record in evals] == [0, 4, 8, 12]
    for record in steps:
        assert set(record) == {
            *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens"),
            *("tokens_per_second", "peak_memory_bytes", "time"),
        }
        assert record["epoch"] == record["step"] / 4
    assert [record["time"] for record in steps] == sorted(record["time"] for record in steps)

    written = json.loads((folder / "summary.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(summary)))
    assert written["stop_reason"] == "completed"
    for key in ("tokens", "supervised_tokens"):
        assert written[key] == sum(record[key] for record in steps)
    assert written["seconds"] == pytest.approx(sum(record["tokens"] / record["tokens_per_second"] for record in steps))
    assert written["tokens_per_second"] == pytest.approx(written["tokens"] / written["seconds"])
    assert (written["first_loss"], written["last_loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    assert (written["first_eval_loss"], written["last_eval_loss"]) == (evals[0]["eval_loss"], evals[-1]["eval_loss"])
    shapes = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert written["trainable_parameters"] == sum(tensor.numel() for tensor in shapes.values())
    assert written["verified_max_logit_difference"] <= 1e-5

    for name in ("adapter", "best"):
        assert {path.name for path in (folder / name).iterdir()} >= {
            *("adapter_model.safetensors", "adapter_config.json"),
            *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        }
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-000012", "step-000008"]
    described = json.loads((folder / "config.json").read_text())
    assert described["config"]["lora_alpha"] == 32
    assert described["versions"]["torch"] == torch.__version__
    hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (config.train_file, config.eval_file)]
    assert described["dataset_sha256"] == "".join(hashes)
    metadata = adapter_format.read_metadata(folder / "adapter")
    assert metadata["base_fingerprint"] == described["base_fingerprint"]
    assert metadata["system_prompt"] == config.system_prompt


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_the_first_loss_is_the_bases_and_counts_its_tokens(start, load_tiny, train_on_prompt):
    """Rendered by the tokenizer's own template; supervised are the answers, or everything but the first token."""
    run = start(train_on_prompt=train_on_prompt)
    record = loop.train_step(run)
    rows = [json.loads(line) for line in Path(run.config.train_file).read_text().splitlines()]
    oracle, tokenizer, nats, supervised, tokens = load_tiny(), run.tokenizer, 0.0, 0, 0
    for line in run.data.train.lines[run.schedule.examples_of(0)]:
        row = rows[line - 1]
        asked = [
            {"role": "system", "content": run.config.system_prompt},
            {"role": "user", "content": row["instruction"]},
        ]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text)["input_ids"]
        answer = [*tokenizer(row["output"])["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
        trailing = tokenizer("\n")["input_ids"] if train_on_prompt else []
        ids = torch.tensor(prompt + answer + trailing)
        start_of_loss = 1 if train_on_prompt else len(prompt)
        with torch.no_grad():
            logits = oracle(input_ids=ids[None]).logits[0]
        nats += F.cross_entropy(logits[start_of_loss - 1 : -1], ids[start_of_loss:], reduction="sum").item()
        supervised += len(ids) - start_of_loss
        tokens += len(ids)
    assert record["supervised_tokens"] == supervised
    assert record["tokens"] == tokens
    assert record["loss"] == pytest.approx(nats / supervised, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_never_touched(start, dtype):
    run = start(dtype=dtype, lora_dropout=0.1, weight_decay=0.5)
    before, adapters = digest(base_tensors(run.model)), digest(trained(run.model))
    for _ in range(3):
        loop.train_step(run)
    assert digest(base_tensors(run.model)) == before
    assert digest(trained(run.model)) != adapters
    assert all(param.grad is None for param in run.model.parameters())


def test_every_step_has_its_rate_and_its_examples(start, monkeypatch):
    """The rate in the optimizer is the logged one; after an epoch every example was seen once."""
    run = start(num_train_epochs=2, warmup_ratio=0.5)
    used, seen = [], []
    step = run.optimizer.step

    def watched():
        used.append({group["lr"] for group in run.optimizer.param_groups})
        step()

    monkeypatch.setattr(run.optimizer, "step", watched)
    original = loop.gradients
    monkeypatch.setattr(
        loop,
        "gradients",
        lambda run, examples, count: (
            seen.append([e.input_ids.tolist() for e in examples]),
            original(run, examples, count),
        )[1],
    )
    records = [loop.train_step(run) for _ in range(8)]
    assert used == [{record["learning_rate"]} for record in records]
    assert records[3]["learning_rate"] == pytest.approx(run.config.learning_rate)
    for epoch in (seen[:4], seen[4:]):
        taken = sorted(ids for step in epoch for ids in step)
        assert taken == sorted(run.data.train[i].input_ids.tolist() for i in range(len(run.data.train)))


def test_looking_does_not_change_what_is_trained(make_config, tmp_path):
    """Evaluations between the steps draw no dropout and leave the model in training mode."""
    found = []
    for eval_steps in (1, 100):
        config = make_config(
            lora_dropout=0.2, val_size=0.2, eval_steps=eval_steps, output_dir=str(tmp_path / str(eval_steps))
        )
        loop.train(config)
        found.append((Path(config.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_method_full_leaves_a_model_that_plain_transformers_loads(make_config):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config(method="full", learning_rate=3e-3)
    summary = loop.train(config)
    assert summary.last_loss < summary.first_loss - 0.5
    folder = Path(config.output_dir)
    assert not (folder / "adapter").exists()
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert theirs.dtype == torch.float32
    weights = load_file(checkpoint.checkpoint_path(folder, 4) / checkpoint.WEIGHTS)
    oracle = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    named = dict(oracle.named_parameters())
    assert weights.keys() == named.keys()
    with torch.no_grad():
        for name, param in named.items():
            assert not torch.equal(param, weights[name]), name
            param.copy_(weights[name])
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "model")("red stone 大")["input_ids"]])
    assert torch.equal(theirs(ids).logits, oracle(ids).logits)


def test_a_result_that_is_not_what_was_trained_is_not_called_verified(make_config, monkeypatch):
    save = adapter_format.save

    def save_something_else(folder, *args):
        save(folder, *args)
        path, metadata = folder / adapter_format.WEIGHTS, adapter_format.read_metadata(folder)
        tensors = load_file(path)
        name = next(name for name in tensors if "lora_B" in name)
        save_file(tensors | {name: tensors[name] * 1.5}, path, metadata)

    monkeypatch.setattr(adapter_format, "save", save_something_else)
    with pytest.raises(AdapterError, match="logits of the reloaded result differ"):
        loop.train(make_config())


def test_early_stopping(make_config, monkeypatch):
    """Evaluations of 5, 4, 4.5, 4.2: the best was after step 1, two without a new best are after step 3."""
    losses = iter([5.0, 4.0, 4.5, 4.2])
    monkeypatch.setattr(loop, "evaluate", lambda run, dataset: next(losses))
    config = make_config(
        num_train_epochs=5, val_size=0.1, eval_steps=1, save_steps=1, save_total_limit=0, early_stopping_patience=2
    )
    summary = loop.train(config)
    assert (summary.stop_reason, summary.steps) == ("early stopping", 3)
    assert (summary.best_eval_loss, summary.last_eval_loss, summary.first_eval_loss) == (4.0, 4.2, 5.0)
    folder = Path(config.output_dir)
    for name, step in (("best", 1), ("adapter", 3)):
        saved = load_file(folder / name / "adapter_model.safetensors")
        expected = load_file(checkpoint.checkpoint_path(folder, step) / checkpoint.WEIGHTS)
        assert digest(
            {key.removeprefix("base_model.model.").removesuffix(".weight"): t for key, t in saved.items()}
        ) == (digest(expected))


@pytest.mark.parametrize(("eval_steps", "evaluated"), [(3, [0, 3, 4]), (1000, [0, 4])])
def test_the_last_step_is_evaluated(make_config, eval_steps, evaluated):
    """With --eval_steps 100 the result of 240 steps once got the held-out loss of step 200."""
    config = make_config(val_size=0.1, eval_steps=eval_steps)
    summary = loop.train(config)
    evaluations = lines(config.output_dir)[1]
    assert [line["step"] for line in evaluations] == evaluated
    assert summary.last_eval_loss == evaluations[-1]["eval_loss"]
    best = Path(config.output_dir) / "best"
    assert checkpoint.saved_step(best) == summary.steps == 4
    state = checkpoint.read_state(checkpoint.checkpoint_path(Path(config.output_dir), 4))
    assert (state.best_step, state.evaluated_step) == (4, 4)


# ---------------------------------------------------------------------------------------- a run and its process


def process_settings() -> dict:
    """Settings of the whole process that a run could change."""
    matmul, handlers = torch.backends.cuda.matmul, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {
        "precision of products": (torch.get_float32_matmul_precision(), matmul.allow_tf32, matmul.fp32_precision),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "environment": dict(os.environ),
        "progress bars": transformers_logging.is_progress_bar_enabled(),
        "loggers": {name: logging.getLogger(name).level for name in ("", "bitsandbytes", "transformers")},
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": str(np.random.get_state()),
        "Python's random state": random.getstate(),
        "signals": [signal.getsignal(number) for number in handlers],
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "warnings": list(warnings.filters),
        "folder": os.getcwd(),
    }


@pytest.mark.parametrize("ending", ["as it ends", "after an error", "in 8 bits"])
def test_a_run_leaves_the_settings_of_the_process_as_they_were(make_config, monkeypatch, ending):
    """A notebook that trained once had TF32 products, other random numbers and no progress bars afterwards."""
    keys = {"load_in_8bit": True} if ending == "in 8 bits" else {}
    if keys:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(cache, "CACHE_FROM_BYTES", 1)  # a cached file raises the limit of open files
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for name in (*device.PRODUCT_CACHES, "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    config = make_config(max_steps=1, **keys)
    changed = {}
    real = loop.train_step

    def train_step(run):
        changed.update(process_settings())
        if ending == "after an error":
            raise OSError("no disk")
        return real(run)

    monkeypatch.setattr(loop, "train_step", train_step)
    shows = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most[1] - 1 if most[1] > 1 else most[1], most[1]))
        before = process_settings()
        with pytest.raises(OSError, match="no disk") if ending == "after an error" else nullcontext():
            loop.train(config)
        after = process_settings()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
        if not shows:
            transformers_logging.disable_progress_bar()
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
    assert changed["environment"] != before["environment"]  # the test sees what is put back
    assert changed["precision of products"] != before["precision of products"]
    assert changed["open files"] != before["open files"]


def test_a_quiet_run_prints_nothing_and_writes_the_same_files(make_config, tmp_path, capfd, monkeypatch):
    config = make_config(val_size=0.1, eval_steps=2, eval_samples=1)
    loop.train(config)
    assert "loss" in capfd.readouterr().out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # where a progress bar would be shown
    loop.train(dataclasses.replace(config, output_dir=str(tmp_path / "quiet")), quiet=True)
    assert capfd.readouterr() == ("", "")
    found = [sorted(p.relative_to(top) for p in top.rglob("*")) for top in (tmp_path / "run", tmp_path / "quiet")]
    assert found[0] == found[1]
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "quiet")]
    assert weights[0] == weights[1]


def test_a_run_in_another_thread(make_config):
    """`signal` works in the main thread only; a run in another one once ended in its ValueError."""
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(loop.train, make_config(max_steps=1), quiet=True).result().steps == 1


def test_a_finished_run_that_is_resumed_says_that_it_trains_nothing(make_config, capsys):
    config = make_config(max_steps=2)
    loop.train(config)
    assert "nothing is left to train" not in capsys.readouterr().out
    assert loop.train(dataclasses.replace(config, resume=config.output_dir, output_dir=None)).steps == 2
    assert "all 2 steps are done: nothing is left to train" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "shown"), [("auto", True), ("cpu", False)])
def test_the_header_says_why_the_cpu_was_taken(make_config, monkeypatch, capsys, asked, shown):
    """With a driver too old for torch's CUDA a run once took the CPU without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(setup, "why_cpu", lambda: "torch is built for CUDA 13.0; update the driver")
    with ExitStack() as held:
        setup.prepare(make_config(device=asked), StopRequest(), held)
    assert ("torch is built for CUDA 13.0; update the driver" in capsys.readouterr().out) == shown


def test_a_run_that_early_stopping_ended_says_that_it_trains_nothing(make_config, monkeypatch, capsys):
    monkeypatch.setattr(loop, "evaluate", lambda run, dataset: 5.0 + run.state.step)
    config = make_config(val_size=0.1, eval_steps=1, early_stopping_patience=1)
    assert loop.train(config).stop_reason == "early stopping"
    capsys.readouterr()
    assert loop.train(dataclasses.replace(config, resume="auto")).steps == 1
    assert "early stopping has ended this run at step 1: nothing is left to train" in capsys.readouterr().out


def test_a_signal_after_the_result_is_saved_does_not_lose_it(make_config, monkeypatch):
    """While the result is compared: the message once named the checkpoint only, as if there were no result."""
    config = make_config(max_steps=1)
    real = finish.sample_answers

    def stop(chat_model):
        os.kill(os.getpid(), signal.SIGINT)
        return real(chat_model)

    monkeypatch.setattr(finish, "sample_answers", stop)
    with pytest.raises(StoppedError) as error:
        loop.train(config)
    assert f"{Path(config.output_dir) / 'adapter'} is saved and complete" in str(error.value)
    assert "--resume" in str(error.value)
    assert error.value.exit_code == 130


def test_a_signal_after_the_summary_is_written_ends_nothing(make_config, monkeypatch):
    """While report.html was written, Ctrl-C once turned a verified run into "stopped by SIGINT", exit code 130."""
    config = make_config(max_steps=1)
    real = report.write

    def write(*args):
        os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    monkeypatch.setattr(report, "write", write)
    assert loop.train(config).steps == 1
    assert (Path(config.output_dir) / "report.html").exists()


# ---------------------------------------------------------------------------------------- stop and resume

SIX_STEPS = {
    "num_train_epochs": 2,
    "lora_dropout": 0.1,
    "val_size": 0.15,
    "save_steps": 1,
    "save_total_limit": 0,
}


@pytest.fixture(scope="module")
def six_steps(tiny_folder, tmp_path_factory):
    """The config of an uninterrupted run: 17 examples, 3 steps an epoch (the last smaller), 2 epochs, dropout.

    Its folder is for all tests to look at: none may change it.
    """
    folder = tmp_path_factory.mktemp("six_steps")
    data = write_jsonl(folder / "data.jsonl", 20, seed=4)
    config = small_config(tiny_folder, folder, **SIX_STEPS, train_file=str(data))
    with bare_runs():
        assert loop.train(config).steps == 6
    return config


@pytest.fixture
def copied(six_steps, tmp_path):
    """The config of a copy of `six_steps`, free to be changed."""
    shutil.copytree(six_steps.output_dir, tmp_path / "copied")
    return dataclasses.replace(six_steps, output_dir=str(tmp_path / "copied"))


def outcome(folder, last=6):
    """All that a run has learned and said, but for clocks and memory."""
    folder = Path(folder)
    clocks = {"seconds", "time", "tokens_per_second", "peak_memory_bytes", "predicted_peak_memory_bytes"}
    path = checkpoint.checkpoint_path(folder, last)
    return {
        "metrics": [{k: v for k, v in r.items() if k not in clocks} for part in lines(folder) for r in part],
        "state": {k: v for k, v in json.loads((path / checkpoint.STATE).read_text()).items() if k not in clocks},
        "weights": (path / checkpoint.WEIGHTS).read_bytes(),
        "moments": (path / checkpoint.MOMENTS).read_bytes(),
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "best": (folder / "best" / "adapter_model.safetensors").read_bytes(),
    }


@pytest.mark.parametrize(("stopped_after", "resume_by"), [(2, "auto"), (3, "auto"), (4, "auto"), (3, "path")])
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_bit(six_steps, copied, stopped_after, resume_by):
    other = Path(copied.output_dir)
    for name in ("adapter", "summary.json"):
        shutil.rmtree(other / name) if (other / name).is_dir() else (other / name).unlink()
    for path in checkpoint.checkpoints(other):
        if int(path.name[5:]) > stopped_after:
            shutil.rmtree(path)
    torch.manual_seed(stopped_after)
    resume = "auto" if resume_by == "auto" else str(checkpoint.checkpoint_path(other, stopped_after))
    loop.train(dataclasses.replace(copied, resume=resume))
    assert outcome(other) == outcome(six_steps.output_dir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_of_a_step_saves_and_the_run_goes_on_exactly(
    six_steps, tmp_path, monkeypatch, number, code
):
    """The signal comes in a micro-batch of step 5; the four steps before it are kept, with no checkpoint due there."""
    folder = tmp_path / "stopped"
    config = dataclasses.replace(six_steps, output_dir=str(folder), save_steps=0)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    real_step, real_loss = loop.train_step, sft.token_nats
    step = [0]

    def count(run):
        step[0] = run.state.step
        return real_step(run)

    def interrupt(*args):
        if step[0] == 4:
            os.kill(os.getpid(), number)
            step[0] = -1
        return real_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", count)
        patch.setattr(sft, "token_nats", interrupt)
        with pytest.raises(StoppedError) as stopped:
            loop.train(config)
    assert stopped.value.exit_code == code
    assert str(folder) in str(stopped.value)
    assert "--resume" in str(stopped.value)
    assert {each: signal.getsignal(each) for each in handlers} == handlers
    found, refused = checkpoint.newest_valid(folder)
    assert (found, refused) == (checkpoint.checkpoint_path(folder, 4), [])
    loop.train(dataclasses.replace(config, resume="auto"))
    assert outcome(folder) == outcome(six_steps.output_dir)


def test_a_signal_before_the_first_step_is_done_saves_nothing_and_a_new_start_is_whole(
    six_steps, tmp_path, monkeypatch
):
    """The evaluation before the first step once stood twice in metrics.jsonl, from both starts.

    The message once did not say how to start again, and the same command was refused.
    """
    folder = tmp_path / "stopped"
    config = dataclasses.replace(six_steps, output_dir=str(folder), resume="auto")
    real = loop.train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda run: (os.kill(os.getpid(), signal.SIGTERM), real(run))[1])
        with pytest.raises(StoppedError) as caught:
            loop.train(config)
    assert checkpoint.checkpoints(folder) == []
    told, _, command = str(caught.value).partition(". Start again with: python -m minilora ")
    assert told == "stopped by SIGTERM before the first step was done: there was nothing to save"
    assert cli.main(shlex.split(command)) == 0
    assert outcome(folder) == outcome(six_steps.output_dir)


def test_method_full_resumes_to_the_bit(make_config, tmp_path):
    config = make_config(method="full", save_steps=1, save_total_limit=0, output_dir=str(tmp_path / "whole"))
    loop.train(config)
    other = tmp_path / "resumed"
    shutil.copytree(config.output_dir, other)
    for path in checkpoint.checkpoints(other)[:2]:
        shutil.rmtree(path)
    shutil.rmtree(other / "model")
    loop.train(dataclasses.replace(config, output_dir=str(other), resume="auto"))
    for name in ("checkpoints/step-000004/optimizer.safetensors", "model/model.safetensors"):
        assert (other / name).read_bytes() == (Path(config.output_dir) / name).read_bytes()


def test_a_finished_run_can_be_lengthened_in_the_same_process(make_config):
    """The folder's lock once stayed with the process: a notebook could never go on with its own run."""
    config = make_config(lr_scheduler_type="constant", warmup_ratio=0.0)
    loop.train(config)
    summary = loop.train(dataclasses.replace(config, num_train_epochs=2, resume="auto"))
    assert summary.steps == 8


def test_a_run_that_could_not_start_gives_its_folder_free(make_config):
    config = make_config(target_modules=("nothing",))
    with pytest.raises(ConfigError, match="match nothing"):
        loop.train(config)
    loop.train(dataclasses.replace(config, target_modules=("q_proj",)))


def test_a_run_taken_back_to_an_older_checkpoint_leaves_none_of_the_abandoned_way(copied, monkeypatch):
    """Going back to step 2 with another number of epochs takes another way; step 4 of the first way once stayed in
    the folder, was taken for the new run's own, and `resume auto` would have gone on from it."""
    folder = Path(copied.output_dir)
    real = loop.train_step

    def stop_after_four(run):
        record = real(run)
        if run.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            kept.update({name: param.detach().clone() for name, param in trained(run.model).items()})
        return record

    kept = {}
    monkeypatch.setattr(loop, "train_step", stop_after_four)
    with pytest.raises(StoppedError):
        loop.train(
            dataclasses.replace(
                copied, num_train_epochs=8, resume=str(checkpoint.checkpoint_path(folder, 2)), save_steps=1
            )
        )
    newest, _ = checkpoint.newest_valid(folder)
    assert newest == checkpoint.checkpoint_path(folder, 4)
    assert digest(load_file(newest / checkpoint.WEIGHTS)) == digest(kept)


@pytest.fixture(params=["lora", "full"])
def descending(request, make_config, monkeypatch):
    """The config of a finished run whose evaluations are those of LOSSES, a better one at each of its 4 steps."""
    monkeypatch.setattr(loop, "evaluate", lambda run, dataset: LOSSES[run.state.step])
    keys = {"method": "full", "learning_rate": 1e-4} if request.param == "full" else {}
    config = make_config(val_size=0.1, eval_steps=1, save_steps=1, save_total_limit=0, **keys)
    loop.train(config)
    return config


LOSSES = [9.0, 8.0, 7.0, 6.0, 5.0]


def test_best_goes_with_the_steps_that_are_abandoned(descending, monkeypatch, capsys):
    """best/ of step 4 once stayed after the run had gone back to step 2, and was called the best of the new branch."""
    folder = Path(descending.output_dir)
    back = dataclasses.replace(descending, resume=str(checkpoint.checkpoint_path(folder, 2)), max_steps=3)
    monkeypatch.setattr(loop, "evaluate", lambda run, dataset: 8.5)
    real, seen = loop.train_step, []

    def train_step(run):
        seen.append(checkpoint.saved_step(folder / "best"))
        return real(run)

    monkeypatch.setattr(loop, "train_step", train_step)
    capsys.readouterr()
    summary = loop.train(back)
    assert "step-000004, step-000003, best: saved after this checkpoint" in capsys.readouterr().out
    assert seen == [4]  # nothing is lost before the new branch is on the disk
    assert summary.best_eval_loss == 7.0
    assert not (folder / "best").exists()


def test_best_goes_when_the_run_ends_at_an_earlier_checkpoint(descending):
    folder = Path(descending.output_dir)
    loop.train(dataclasses.replace(descending, resume=str(checkpoint.checkpoint_path(folder, 2)), max_steps=2))
    assert not (folder / "best").exists()


def test_best_stays_where_the_checkpoint_knows_it(make_config, monkeypatch):
    """Steps 3 and 4 were no better than step 2: best/ is of step 2, before and after the run goes back there."""
    losses = [9.0, 8.0, 7.0, 7.5, 7.5]
    monkeypatch.setattr(loop, "evaluate", lambda run, dataset: losses[run.state.step])
    config = make_config(val_size=0.1, eval_steps=1, save_steps=1, save_total_limit=0)
    loop.train(config)
    folder = Path(config.output_dir)
    loop.train(dataclasses.replace(config, resume=str(checkpoint.checkpoint_path(folder, 2)), max_steps=3))
    assert checkpoint.saved_step(folder / "best") == 2


def test_best_of_version_0_1_has_no_step(make_config, tmp_path):
    """It stays when its run goes on, and goes when its run goes back to an earlier checkpoint."""
    old = checkpoint.TrainState(step=2)
    save_file({"x": torch.zeros(1)}, (tmp_path / "best").mkdir() or tmp_path / "best" / "adapter_model.safetensors")
    assert not checkpoint.best_is_abandoned(tmp_path, old)
    checkpoint.checkpoint_path(tmp_path, 3).mkdir(parents=True)
    assert checkpoint.best_is_abandoned(tmp_path, old)


def test_a_new_token_budget_is_obeyed_by_a_resumed_run(copied, start):
    """The budget in the saved state once went before the flag, which then did nothing."""
    keys = {**SIX_STEPS, "train_file": copied.train_file, "output_dir": copied.output_dir, "resume": "auto"}
    run = start(**keys, max_tokens_per_micro_batch=77)
    assert run.state.max_tokens == 77


# ---------------------------------------------------------------------------------------- when things go wrong


def planted(bad_calls, fault):
    """token_nats that is spoilt at these calls (from 1): a NaN loss, an infinite loss, or a NaN gradient only."""
    real, calls = sft.token_nats, [0]

    def token_nats(hidden, *args):
        calls[0] += 1
        nats = real(hidden, *args)
        if calls[0] not in bad_calls:
            return nats
        if fault == "nan gradient":
            return nats + torch.sqrt((hidden * 0).sum())
        return nats * {"nan loss": math.nan, "infinite loss": math.inf}[fault]

    return token_nats


@pytest.mark.parametrize("fault", ["nan loss", "infinite loss", "nan gradient"])
def test_a_step_that_is_not_finite_changes_nothing(start, monkeypatch, fault):
    run = start(max_tokens_per_micro_batch=WHOLE_STEP, num_train_epochs=3, weight_decay=0.1)
    monkeypatch.setattr(sft, "token_nats", planted({2, 3, 5, 6}, fault))

    def everything():
        state = {f"{i}.{k}": v for i, s in enumerate(run.optimizer.state.values()) for k, v in s.items()}
        return digest(trained(run.model)), digest(state)

    for step in range(1, 8):
        before = everything()
        record = loop.train_step(run)
        bad = step in (2, 3, 5, 6)
        assert (everything() == before) == bad
        assert record["step"] == run.state.step == step
        assert (record["loss"] is None or record["grad_norm"] is None) == bad
        json.dumps(record, allow_nan=False)
    assert run.state.skipped_steps == 4
    assert math.isfinite(run.state.last_loss)


@pytest.mark.parametrize("fault", ["nan loss", "nan gradient"])
def test_a_run_goes_on_after_a_skipped_step(make_config, monkeypatch, fault):
    monkeypatch.setattr(sft, "token_nats", planted({1, 3}, fault))
    config = make_config(max_tokens_per_micro_batch=WHOLE_STEP, logging_steps=1)
    summary = loop.train(config)
    assert (summary.steps, summary.skipped_steps) == (4, 2)
    steps, _ = lines(config.output_dir)
    assert [r["loss"] is None or r["grad_norm"] is None for r in steps] == [True, False, True, False]


@pytest.fixture(scope="module")
def eight_steps(tiny_folder, tmp_path_factory):
    """The config of an undisturbed run whose steps are a micro-batch each."""
    keys = {"num_train_epochs": 2, "max_tokens_per_micro_batch": WHOLE_STEP, "lora_dropout": 0.1}
    config = small_config(tiny_folder, tmp_path_factory.mktemp("eight_steps"), **keys)
    with bare_runs():
        loop.train(config)
    return config


@pytest.mark.parametrize("first_bad", [1, 3])
def test_three_such_steps_in_a_row_stop_the_run_at_its_last_good_state(eight_steps, tmp_path, monkeypatch, first_bad):
    """The saved state goes on, once the cause is gone, as if nothing had been."""
    config = dataclasses.replace(eight_steps, output_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(sft, "token_nats", planted(range(first_bad, 100), "nan loss"))
        with pytest.raises(DivergedError) as diverged:
            loop.train(config)
    assert diverged.value.exit_code == 3
    found, _ = checkpoint.newest_valid(Path(config.output_dir))
    assert found == checkpoint.checkpoint_path(Path(config.output_dir), first_bad - 1)
    assert str(found) in str(diverged.value)
    summary = loop.train(dataclasses.replace(config, resume="auto"))
    assert summary.skipped_steps == 0
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000008/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (Path(eight_steps.output_dir) / name).read_bytes()


def out_of_memory_at(bad_calls, error):
    real, calls = sft.token_nats, [0]

    def token_nats(*args):
        calls[0] += 1
        if calls[0] in bad_calls:
            raise error
        return real(*args)

    return token_nats


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_out_of_memory_at_any_micro_batch_gives_the_same_adapter(make_config, tmp_path, monkeypatch, k):
    """The step begins again, from no gradient at all, with half the budget, which stays."""
    found = {}
    for name in ("calm", "short"):
        config = make_config(learning_rate=1e-4, max_tokens_per_micro_batch=200, output_dir=str(tmp_path / name))
        with monkeypatch.context() as patch:
            if name == "short":
                patch.setattr(sft, "token_nats", out_of_memory_at({k}, torch.OutOfMemoryError("planted")))
            loop.train(config)
        state = json.loads((checkpoint.checkpoint_path(tmp_path / name, 4) / checkpoint.STATE).read_text())
        found[name] = state, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert found["calm"][0]["max_tokens"] == 200
    assert found["short"][0]["max_tokens"] == 100
    assert found["short"][0]["tokens"] == found["calm"][0]["tokens"]
    for name, tensor in found["calm"][1].items():
        torch.testing.assert_close(found["short"][1][name], tensor, rtol=0, atol=1e-6)


def test_nothing_of_a_backward_pass_that_failed_is_held_while_the_step_begins_again(start, monkeypatch):
    """The graph once stayed until the next forward pass was over, which so had less room than it was given."""
    run, real, seen, held = start(), sft.token_nats, [], []

    def fail(_):
        raise torch.OutOfMemoryError("planted")

    def token_nats(hidden, *args):
        if not seen:
            seen.append(weakref.ref(hidden))
            hidden.register_hook(fail)
        return real(hidden, *args)

    monkeypatch.setattr(sft, "token_nats", token_nats)
    monkeypatch.setattr(recovery, "free_cached", lambda device: held.append(seen[0]()))
    loop.train_step(run)
    assert held == [None]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), MemoryError(), "the CPU allocator's"])
def test_when_not_even_one_example_fits_the_run_says_so(start, monkeypatch, error):
    if isinstance(error, str):
        with pytest.raises(RuntimeError) as raised:
            torch.empty(2**60, dtype=torch.uint8)
        error = raised.value
    run = start(max_tokens_per_micro_batch=500)
    longest = max(len(example.input_ids) - 1 for example in first_step(run)[0])
    monkeypatch.setattr(sft, "token_nats", out_of_memory_at(range(1000), error))
    with pytest.raises(OutOfMemoryError) as refused:
        loop.train_step(run)
    assert refused.value.exit_code == 4
    assert f"{longest:,} tokens" in str(refused.value)
    assert "--gradient_checkpointing" in str(refused.value)
    assert run.state.max_tokens == longest


def test_other_errors_are_not_taken_for_out_of_memory(start, monkeypatch):
    run = start()
    monkeypatch.setattr(sft, "token_nats", out_of_memory_at({1}, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        loop.train_step(run)
    assert lora_layers(run.model)


def test_a_long_system_prompt_is_shared_by_many_rows(start):
    """At a fixed budget each row would stand alone with a long prompt, and nothing would be shared."""
    run = start(system_prompt="水" * 220, share_prefix="auto", max_tokens_per_micro_batch=0)
    examples = [run.data.train[i] for i in run.schedule.examples_of(0)]
    prefix = batching.common_prefix(examples)
    assert 192 < prefix < 512
    usual = batching.micro_batch_tokens(run.model.config.intermediate_size, torch.float32)
    assert run.state.max_tokens == usual + 3 * prefix
    assert all(batch.layout.prefix >= prefix for batch in batching.micro_batches(examples, run.state.max_tokens, True))
