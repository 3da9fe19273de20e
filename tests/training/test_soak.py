"""Long runs that must not grow, and what a checkpoint of the real model costs."""

import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import faults
import pytest
import torch
from conftest import write_jsonl

from minilora import loop
from minilora.config import TrainConfig
from minilora.training import checkpoint
from minilora.training import log as run_log
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

STEPS, SETTLED = 5000, 500
MAX_GROWTH = 0.01
MAX_CHECKPOINT_S = 0.2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_long_run_does_not_grow(make_config, monkeypatch, tmp_path, bare_run):
    """5,000 steps with evaluations and checkpoints among them; RSS, open files and threads every 50 steps."""
    steps = faults.count("STEPS", STEPS)
    settled = min(SETTLED, steps // 2)
    seen = []
    real = run_log.RunLog.step

    def step(self, record):
        real(self, record)
        if record["step"] % 50 == 0:
            counts = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
            seen.append((record["step"], faults.memory_now()[0], *counts))

    monkeypatch.setattr(run_log.RunLog, "step", step)
    valid = write_jsonl(tmp_path / "valid.jsonl", 8, seed=2)
    config = make_config(
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        lora_dropout=0.05,
        eval_file=str(valid),
        eval_steps=200,
        save_steps=100,
        logging_steps=1000,
    )
    assert loop.train(config).steps == steps
    late = [each for each in seen if each[0] >= settled]
    first, last = late[0], max(late, key=lambda each: each[1])
    growth = last[1] / first[1] - 1
    print(
        f"\n{steps:,} steps: RSS {first[1] / 2**20:.1f} MiB at step {first[0]:,}, at most {last[1] / 2**20:.1f} MiB "
        f"(+{100 * growth:.2f} %), open files {first[2]} -> {late[-1][2]}, threads {first[3]} -> {late[-1][3]}"
    )
    assert growth < MAX_GROWTH
    assert late[-1][2] <= first[2]
    assert late[-1][3] <= first[3]


@pytest.mark.real
def test_checkpoint_cost(tmp_path):
    """Adapter and AdamW state of the real model by the recipe of preset lora, forced to the disk and read back."""
    config = TrainConfig(
        model=os.environ["MINILORA_REAL_MODEL"],
        train_file=str(write_jsonl(tmp_path / "train.jsonl", 32)),
        output_dir=str(tmp_path / "run"),
    )
    with ExitStack() as held:
        run = prepare(config, StopRequest(), held)
        for param in run.model.parameters():
            if param.requires_grad:
                param.grad = torch.randn_like(param)
        run.optimizer.step()
        seconds = []
        for step in range(1, 8):
            run.state.step = step
            started = time.perf_counter()
            path = checkpoint.save(run.folder, run.model, run.optimizer, run.state, run.identity, keep=2)
            seconds.append(time.perf_counter() - started)
    size = sum(file.stat().st_size for file in Path(path).iterdir())
    median = statistics.median(seconds)
    print(f"\ncheckpoint of {size / 1e6:.1f} MB: median {1000 * median:.0f} ms, at most {1000 * max(seconds):.0f} ms")
    assert median < MAX_CHECKPOINT_S
