"""`minilora tune` is a short search for the learning rate on the user's rows. It prints a table and a suggestion.

Each rate is tried in a short run with the same initial A, the same rows in the same order and the same dropout. All
rates are compared by the loss on the same held-out rows. The base is loaded once. Before each rate, the trainable
parameters get their initial values back.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from minilora.config import TrainConfig
from minilora.data.dataset import Dataset
from minilora.errors import ConfigError, DataError, DivergedError
from minilora.loop import evaluate, train_step
from minilora.models.trainable import in_words
from minilora.training.checkpoint import TrainState, trainable
from minilora.training.run import Run
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest
from minilora.utils.process import settings_of_a_run
from minilora.utils.terminal import say

GRID = {"lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "full": (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)}  # the middle one is first
NEARLY = 0.9  # of the best gain; the rest may be noise, and a lower rate is safer in a longer run


@dataclass(frozen=True)
class Search:
    """The settings of the search. rates: the rates to try; empty: a descent over GRID to the lowest loss."""

    rates: tuple[float, ...]
    steps: int
    rows: int  # per step
    held_out: int  # rows

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "held_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} = {getattr(self, name)} must be at least 1")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigError(f"--rates {' '.join(map(str, self.rates))}: a rate must be a finite number above 0")


def tune(config: TrainConfig, search: Search) -> float | None:
    """Try rates on a few rows and print a table. Returns the suggested rate, or None if no rate lowered the loss.

    Raises what `setup.prepare` raises, and DataError if there are too few rows.
    """
    losses: dict[float, float] = {}
    with settings_of_a_run(), StopRequest() as stop, ExitStack() as held:
        folder = held.enter_context(TemporaryDirectory(prefix="minilora-tune-"))
        run = prepare(short_run(config, search, Path(folder) / "run"), stop, held, header=False)
        with stop.interruptible():  # no state can be lost
            rows = held_out_rows(run, search)
            start = {name: param.detach().clone() for name, param in trainable(run.model).items()}
            before = evaluate(run, rows)
            _head(run, search, len(rows), before)

            def loss_at(rate: float) -> float:
                if rate not in losses:
                    losses[rate] = loss_after(run, rate, start, rows)
                    shown = f"{rate:.0e}" if float(f"{rate:.0e}") == rate else f"{rate:g}"
                    print(f"{shown:>14}  {losses[rate]:>13.4f}", flush=True)
                return losses[rate]

            if search.rates:
                for rate in search.rates:
                    loss_at(rate)
            else:
                if config.learning_rate:
                    loss_at(config.learning_rate)  # the rate that the run would use
                descend(sorted({*GRID[config.method], *losses}), GRID[config.method][2], loss_at)
    suggested = suggestion(before, losses)
    _advice(search, suggested)
    return suggested


def descend(grid: Sequence[float], first: float, loss_at: Callable[[float], float]) -> None:
    """From a rate of the grid go up, or else down, while the loss falls; the loss has one minimum over the rate."""
    best = grid.index(first)
    for step in (1, -1):  # lower rates are tried only if a higher rate was not better
        while 0 <= best + step < len(grid) and loss_at(grid[best]) > loss_at(grid[best + step]):
            best += step


def short_run(config: TrainConfig, search: Search, folder: Path) -> TrainConfig:
    """The settings of the short runs: those of the run with fewer steps and a constant learning rate."""
    return dataclasses.replace(
        config,
        output_dir=str(folder),
        resume="never",
        per_device_train_batch_size=search.rows,
        gradient_accumulation_steps=1,
        max_steps=search.steps,
        train_weights=(),  # each row is taken once, so that the last rows are held out
        eval_samples=0,
        report_to="none",
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
    )


def held_out_rows(run: Run, search: Search) -> Dataset:
    """The rows of the comparison: from the evaluation set, or rows that the short runs do not train on."""
    rng = np.random.default_rng(run.config.seed)
    if run.data.eval is not None:
        return run.data.eval.subset(rng.permutation(len(run.data.eval))[: search.held_out])
    trained = np.concatenate([run.schedule.examples_of(step) for step in range(search.steps)])
    others = np.setdiff1d(np.arange(len(run.data.train)), trained)
    if len(others) < search.held_out:
        raise DataError(
            f"{', '.join(run.config.train_files)}: {len(run.data.train):,} rows are too few for {search.steps} steps "
            f"of {search.rows} rows and {search.held_out} held-out rows: give smaller --steps, --rows or --held_out"
        )
    return run.data.train.subset(rng.permutation(others)[: search.held_out])


def loss_after(run: Run, rate: float, start: dict[str, Tensor], rows: Dataset) -> float:
    """The held-out loss after a short run at this rate from the parameters `start`; infinite if the run diverged."""
    with torch.no_grad():
        for name, param in trainable(run.model).items():
            param.copy_(start[name])
    run.optimizer.state.clear()
    run.config = dataclasses.replace(run.config, learning_rate=rate)
    run.state = TrainState(asked_tokens=run.state.asked_tokens, max_tokens=run.state.max_tokens)
    try:
        while run.state.step < run.schedule.num_steps:
            train_step(run)
        loss = evaluate(run, rows)
    except DivergedError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def suggestion(before: float, losses: Mapping[float, float]) -> float | None:
    """The lowest rate with at least NEARLY times the best gain; None if no rate lowered the loss."""
    best = before - min(losses.values())
    return min(rate for rate, loss in losses.items() if before - loss >= NEARLY * best) if best > 0 else None


def _head(run: Run, search: Search, held_out: int, before: float) -> None:
    config = run.config
    trained_on = ", ".join(config.train_files)
    say("model", f"{config.model}, {in_words(config)}")
    say(
        "each rate",
        f"{search.steps} steps of {min(search.rows, len(run.data.train)):,} rows of {trained_on}, all from one start",
    )
    say("measured on", f"{held_out} other rows of {config.eval_file or trained_on}")
    print(f"\n{'learning rate':>14}  {'held-out loss':>13}\n{'(before)':>14}  {before:>13.4f}", flush=True)


def _advice(search: Search, rate: float | None) -> None:
    print()
    if rate is None:
        say("suggested", f"none: no rate lowered the loss in {search.steps} steps. Try lower --rates")
        return
    say("suggested", f"--learning_rate {rate:g}")
    say("", "This search took few steps. In a run of many epochs, watch the held-out loss (early_stopping_patience)")
