"""The log of a run: progress lines, metrics.jsonl, samples.jsonl and TensorBoard."""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minilora.data.dataset import IGNORE, Example
from minilora.data.formats import Question
from minilora.errors import ConfigError, first_line
from minilora.utils import files
from minilora.utils.device import gib
from minilora.utils.terminal import is_quiet, one_line, say, style

METRICS, SAMPLES, SUMMARY, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "summary.json", "tensorboard"
BOARD_KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "epoch")
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW


class RunLog:
    """Prints progress, and appends one JSON object per step and per evaluation to metrics.jsonl.

    The answers at evaluations go to samples.jsonl, one line each. With `board`, curves for TensorBoard are written too.
    """

    def __init__(
        self, run: Path, first_step: int, kept_step: int, num_steps: int, logging_steps: int, board: bool = False
    ) -> None:
        self._path, self._samples = run / METRICS, run / SAMPLES
        self._num_steps = num_steps
        self._logging_steps = logging_steps
        for path in (self._path, self._samples):
            _trim(path, kept_step)
        with files.storage_errors(self._path):
            self._descriptor = os.open(self._path, APPEND, 0o666)
        self._board = Board(run / TENSORBOARD, kept_step + 1) if board else None
        no_bar = is_quiet() or not sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=no_bar, dynamic_ncols=True)
        self._started, self._done_before = time.monotonic(), first_step

    def step(self, record: dict[str, Any]) -> None:
        """Log a training step."""
        self._write(record)
        line = (
            f"loss {_number(record['loss'], '.4f')}  lr {record['learning_rate']:.2e}  "
            f"grad {_number(record['grad_norm'], '.3f')}  "
            f"{record['tokens_per_second']:,.0f} tok/s  peak {gib(record['peak_memory_bytes'])}"
        )
        step = record["step"]
        self._bar.set_description_str(f"epoch {record['epoch']:.2f}", refresh=False)
        self._bar.set_postfix_str(line, refresh=False)
        self._bar.update()
        if self._board:
            self._board.scalars(step, {f"train/{name}": record[name] for name in BOARD_KEYS})
        if self._bar.disable and not is_quiet() and (step % self._logging_steps == 0 or step in (1, self._num_steps)):
            left = (time.monotonic() - self._started) / (step - self._done_before) * (self._num_steps - step)
            print(f"step {step}/{self._num_steps}  epoch {record['epoch']:.2f}  {line}  left {left:.0f} s", flush=True)

    def evaluation(self, record: dict[str, Any], best: float | None) -> None:
        """Log an evaluation; best is the lowest loss of the earlier evaluations."""
        self._write(record)
        if record["step"] == self._done_before:  # the time of the first evaluation is not counted as time of steps
            self._started = time.monotonic()
        change = (
            ""
            if best is None or record["eval_loss"] is None
            else f"  ({record['eval_loss'] - best:+.4f} from the best)"
        )
        say(
            "evaluation",
            f"step {record['step']}: held-out loss {_number(record['eval_loss'], '.4f')} nats per token{change}",
        )

        if self._board:
            self._board.scalars(record["step"], {"eval/loss": record["eval_loss"]})

    def samples(self, step: int, asked: Iterable[tuple[Question, str]]) -> None:
        """Log the answers of the model after this step."""
        lines = []
        for question, answer in asked:
            prompt = question.turns[-1].content
            say("sample", f"{one_line(prompt)} -> {one_line(answer)}")
            record = {"step": step, "prompt": prompt, "answer": answer, "reference": question.reference}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        if lines:
            with files.storage_errors(self._samples):
                descriptor = os.open(self._samples, APPEND, 0o666)
                try:
                    os.write(descriptor, "".join(lines).encode())
                finally:
                    os.close(descriptor)

    def note(self, text: str) -> None:
        """Print a note about an unusual event."""
        say("note", text)

    def _write(self, record: dict[str, Any]) -> None:
        with files.storage_errors(self._path):
            os.write(self._descriptor, (json.dumps(record, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the files and the progress bar."""
        self._bar.close()
        os.close(self._descriptor)
        if self._board:
            self._board.close()


class NullLog:
    """The log of a process that prints and writes nothing."""

    def step(self, record: dict[str, Any]) -> None:
        """Do nothing."""

    def evaluation(self, record: dict[str, Any], best: float | None) -> None:
        """Do nothing."""

    def samples(self, step: int, asked: Iterable[tuple[Question, str]]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


def _trim(path: Path, step: int) -> None:
    """Delete the lines of later steps than the checkpoint of a resumed run; the run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue  # a crash cut this line short
        kept.append(line)
    files.replace_file(path, kept)


class Board:
    """Writes curves for TensorBoard to a folder with the package `tensorboard` (an extra)."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: points that an earlier process wrote for this step and later ones are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with files.storage_errors(folder):
            self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Add a point to each curve; a value of None (not finite) is left out."""
        with files.storage_errors(self._folder):
            for tag, value in values.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)
            self._writer.flush()  # a killed process then leaves no gap before its newest checkpoint

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


def check_board() -> None:
    """Raise ConfigError if curves for TensorBoard cannot be written."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except Exception as error:  # any of the many packages that it imports may be missing or broken
        raise ConfigError(
            f"report_to = 'tensorboard' needs the package tensorboard ({first_line(error)}): pip install tensorboard, "
            "or leave it out"
        ) from error


def _number(value: float | None, shape: str) -> str:
    return "not finite" if value is None else format(value, shape)


def marked_example(example: Example, tokenizer: Any) -> str:
    """An example as the model sees it. Supervised tokens are green, or between ⟦ ⟧ if there are no colours."""
    text = ""
    supervised = example.labels != IGNORE
    starts = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(supervised)]
    for start, end in itertools.pairwise(starts):
        part = tokenizer.decode(example.input_ids[start:end].tolist(), skip_special_tokens=False)
        green = style(part, "32")
        text += part if not supervised[start] else green if green != part else f"⟦{part}⟧"
    return text


def versions() -> dict[str, str]:
    """The versions of the packages on which the numbers of a run depend."""
    import tokenizers
    import transformers

    from minilora import __version__

    return {
        "minilora": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
    }
