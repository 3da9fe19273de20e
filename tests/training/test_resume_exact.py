"""Resumed at every step of a run, it becomes the run that was never stopped: every bit of it, at every later step."""

import dataclasses
import json
import shutil
from pathlib import Path

import faults
import pytest
import torch
from conftest import bare_runs, write_jsonl
from safetensors.torch import load_file

from minilora import loop
from minilora.config import TrainConfig
from minilora.training import checkpoint

STEPS = 24
SUBSET = (8, 13, 20, 23)  # an epoch's end, the middle of an epoch, an evaluation, the last step but one
CLOCKS = ("seconds",)


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """24 steps, 3 epochs of 8 (the last of each smaller), dropout 0.1, warm-up and cosine, accumulation over
    micro-batches, an evaluation every 5 steps; every checkpoint kept."""
    folder = tmp_path_factory.mktemp("exact")
    config = TrainConfig(
        model=str(tiny_folder),
        train_file=str(write_jsonl(folder / "train.jsonl", 61, seed=1)),
        eval_file=str(write_jsonl(folder / "valid.jsonl", 7, seed=2)),
        output_dir=str(folder / "whole"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=1e-2,
        warmup_ratio=0.2,
        lr_scheduler_type="cosine",
        lora_dropout=0.1,
        max_tokens_per_micro_batch=120,
        dtype="float32",
        device="cpu",
        eval_steps=5,
        save_steps=1,
        save_total_limit=0,
    )
    with bare_runs():
        assert loop.train(config).steps == STEPS
    rates = [
        json.loads(line).get("learning_rate") for line in (folder / "whole/metrics.jsonl").read_text().splitlines()
    ]
    rates = [rate for rate in rates if rate is not None]
    assert rates[0] < rates[3] < rates[4] > rates[12] > rates[23] > 0  # it warms up, and falls
    return config


def same_tensors(found: Path, expected: Path) -> list[str]:
    """The tensors of two files that are not the same with atol = rtol = 0."""
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    different = []
    for name, tensor in theirs.items():
        try:
            torch.testing.assert_close(ours[name], tensor, atol=0, rtol=0)
        except AssertionError:
            different.append(f"{expected.name}: {name}")
    return different


def state_of(path: Path) -> dict:
    state = json.loads((path / checkpoint.STATE).read_text())
    return {key: value for key, value in state.items() if key not in CLOCKS}


def resumed_at(config, step: int, folder: Path) -> list[str]:
    """What differs, anywhere, between the run and one that goes on from its checkpoint of this step."""
    original = Path(config.output_dir)
    folder.mkdir()
    shutil.copyfile(original / "config.json", folder / "config.json")
    shutil.copyfile(original / "metrics.jsonl", folder / "metrics.jsonl")
    shutil.copytree(checkpoint.checkpoint_path(original, step), checkpoint.checkpoint_path(folder, step))
    shutil.copytree(original / "best", folder / "best")
    torch.manual_seed(step)  # whatever was drawn before must not matter
    torch.rand(step)
    loop.train(dataclasses.replace(config, output_dir=str(folder), resume="auto"))
    different = []
    for later in range(step + 1, STEPS + 1):
        ours, theirs = checkpoint.checkpoint_path(folder, later), checkpoint.checkpoint_path(original, later)
        for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
            different += [f"step {later}: {words}" for words in same_tensors(ours / name, theirs / name)]
        if state_of(ours) != state_of(theirs):
            different.append(f"step {later}: {state_of(ours)} is not {state_of(theirs)}")
    name = "adapter_model.safetensors"
    for part in ("adapter", "best"):
        different += same_tensors(folder / part / name, original / part / name)
        if (folder / part / name).read_bytes() != (original / part / name).read_bytes():
            different.append(f"the bytes of {part}")
    return different


def check(config, steps, tmp_path) -> None:
    different = {step: resumed_at(config, step, tmp_path / f"from{step}") for step in steps}
    exact = sum(not words for words in different.values())
    print(f"\nresumed exactly at {exact} of {len(different)} steps, atol = rtol = 0")
    assert exact == len(different), {step: words[:3] for step, words in different.items() if words}


def test_resumed_to_the_bit(whole, tmp_path, bare_run):
    check(whole, SUBSET, tmp_path)


@pytest.mark.soak
def test_resumed_to_the_bit_at_every_step_soak(whole, tmp_path, bare_run):
    """The last is a finished run: nothing is left to do, and the result is written again."""
    trials = faults.count("RESUMES", STEPS)
    check(whole, sorted({STEPS - i * STEPS // trials for i in range(trials)}), tmp_path)


def test_a_run_shortened_to_less_than_it_has_done_ends(whole, tmp_path, bare_run, monkeypatch):
    """num_train_epochs and max_steps may change; a run beyond its new end once would never have ended."""
    original = Path(whole.output_dir)
    real = loop.train_step

    def step(run):
        assert run.state.step < run.schedule.num_steps, "it trains beyond its end"
        return real(run)

    monkeypatch.setattr(loop, "train_step", step)
    for keys in ({"num_train_epochs": 1.0}, {"max_steps": 5}):
        folder = tmp_path / next(iter(keys))
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("step-00000*", "adapter", ".lock"))
        summary = loop.train(dataclasses.replace(whole, output_dir=str(folder), resume="auto", **keys))
        assert summary.steps == STEPS
        assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_the_comparison_sees_the_last_bit(whole, tmp_path):
    """The smallest change there is, in one number, is seen: the tests above are not blind."""
    original = checkpoint.checkpoint_path(Path(whole.output_dir), 5) / checkpoint.MOMENTS
    content = bytearray(original.read_bytes())
    content[-4] ^= 1  # the lowest bit of the last fp32 number
    (tmp_path / original.name).write_bytes(content)
    assert len(same_tensors(tmp_path / original.name, original)) == 1
