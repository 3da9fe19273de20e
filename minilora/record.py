"""What is counted, kept and saved while a run goes, and what it does when numbers or memory go bad."""

import dataclasses
import math
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora import adapter, checkpoint, files, output
from minilora.errors import DivergedError, OutOfMemoryError
from minilora.memory import gib, peak_memory_bytes
from minilora.run import Run

MAX_SKIPPED_IN_A_ROW = 3


def record_step(
    run: Run, loss: float, grad_norm: float, rate: float, tokens: int, supervised: int, seconds: float
) -> dict[str, Any]:
    """Count a step in run.state; returns its record for metrics.jsonl."""
    state = run.state
    state.step += 1
    state.tokens += tokens
    state.supervised_tokens += supervised
    state.seconds += seconds
    state.last_loss = loss if math.isfinite(loss) else state.last_loss
    state.first_loss = state.last_loss if state.first_loss is None else state.first_loss
    return {
        "step": state.step,
        "epoch": state.step / run.schedule.steps_per_epoch,
        "loss": loss if math.isfinite(loss) else None,
        "learning_rate": rate,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "time": time.time(),
    }


def record_evaluation(run: Run, loss: float) -> None:
    """Keep an evaluation's loss, and the adapter in best/ if no earlier one was better."""
    state, best = run.state, run.state.best_eval_loss
    run.log.evaluation({"step": state.step, "eval_loss": loss if math.isfinite(loss) else None}, best)
    if math.isfinite(loss) and (best is None or loss < best):
        state.best_eval_loss, state.evals_since_best = loss, 0
        if state.step:
            save_result(run, run.folder / "best")
    else:
        state.evals_since_best += 1
    state.first_eval_loss = loss if state.step == 0 and math.isfinite(loss) else state.first_eval_loss
    state.last_eval_loss = loss if math.isfinite(loss) else state.last_eval_loss
    state.evaluated_step = state.step


def save_checkpoint(run: Run) -> Path:
    """The checkpoint of run.state, written now unless this run has done so. Raises DivergedError for spoilt weights."""
    path = checkpoint.checkpoint_path(run.folder, run.state.step)
    if run.saved_step == run.state.step and checkpoint.is_valid(path):
        return path
    _refuse_spoilt(run)
    with files.storage_errors(run.folder):
        os.stat(run.folder)  # a folder that has vanished must not come back with a checkpoint and nothing else
    checkpoint.save(run.folder, run.model, run.optimizer, run.state, run.identity, run.config.save_total_limit)
    run.saved_step = run.state.step
    return path


def resume_command(run: Run) -> str:
    """The command that goes on with a run."""
    return f"python train.py --resume {shlex.quote(str(run.folder))}"


def weights_are_finite(run: Run) -> bool:
    """Whether every number that is trained is finite."""
    return all(bool(torch.isfinite(param).all()) for param in checkpoint.trainable(run.model).values())


def _refuse_spoilt(run: Run) -> None:
    """Raise DivergedError for weights that are not finite: a finite gradient, too, can be stepped along too far."""
    if weights_are_finite(run):
        return
    saved, _ = checkpoint.newest_valid(run.folder)
    raise DivergedError(
        f"the weights are not finite after step {run.state.step}, and are not saved; the newest checkpoint: {saved}. "
        f"Start anew with a lower --learning_rate (is {run.config.learning_rate:g}) or --weight_decay (is "
        f"{run.config.weight_decay:g})."
    )


def save_result(run: Run, folder: Path) -> None:
    """What is trained, as it is now, in the form its users load: a PEFT adapter or a Hugging Face model.

    Raises DivergedError for weights that are not finite.
    """
    _refuse_spoilt(run)
    config = run.config
    if config.method == "full":
        output.save_model(folder, run.model, run.tokenizer, run.dtype)
        return
    settings = adapter.AdapterConfig(
        base_model=str(run.base_folder.resolve()) if os.path.isdir(os.path.expanduser(config.model)) else config.model,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        rslora=config.use_rslora,
    )
    metadata = {"base_fingerprint": run.identity.base_fingerprint, "system_prompt": config.system_prompt}
    output.save_adapter(folder, run.model, run.tokenizer, settings, metadata)


def skip(run: Run, indices: np.ndarray, loss: float, grad_norm: float) -> None:
    """Leave the weights as they are; after MAX_SKIPPED_IN_A_ROW such steps, save the last good state and stop."""
    state = run.state
    if state.skipped_in_a_row == 0:
        run.before_skipped = dataclasses.replace(state)
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    lines = sorted(run.train_set.lines[indices].tolist())
    run.log.note(f"step {state.step + 1} skipped: loss {loss}, gradient norm {grad_norm}; rows at lines {lines}")
    if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    good = state.step + 1 - MAX_SKIPPED_IN_A_ROW
    run.state = run.before_skipped or dataclasses.replace(state, step=good, skipped_in_a_row=0)
    if run.saved_step > good:
        checkpoint.remove_after(run.folder, good)  # written among the skipped steps: it would pass them over
    if weights_are_finite(run):
        kept = f"The state before them is saved: {save_checkpoint(run)}."
    else:
        kept = "The weights themselves are not finite, and are not saved."
    raise DivergedError(
        f"no finite gradient in {MAX_SKIPPED_IN_A_ROW} steps in a row (steps {good + 1} to {state.step + 1}). "
        f"{kept} Start anew with a lower --learning_rate, or look at the rows above."
    )


def shrink_budget(run: Run, lengths: Sequence[int] | np.ndarray) -> None:
    """Halve the token budget for the rest of the run. Raises OutOfMemoryError when examples already went one by one."""
    longest = int(max(lengths)) - 1
    if run.state.max_tokens <= longest:
        cheaper = [] if run.checkpointing else ["--gradient_checkpointing"]
        cheaper += [f"--max_length {longest // 2}", "a smaller --lora_r", "a smaller --model"]
        raise OutOfMemoryError(
            f"one example of {longest:,} tokens does not fit: {gib(peak_memory_bytes(run.device))} were in use. "
            f"In order of cost: {', '.join(cheaper)}."
        )
    run.state.max_tokens = max(longest, run.state.max_tokens // 2)
    run.log.note(f"out of memory: beginning again with {run.state.max_tokens:,} tokens a micro-batch")
