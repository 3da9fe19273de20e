"""What is counted, kept and saved while a run goes, and what it does when numbers or memory go bad."""

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora import adapter, checkpoint, files, output
from minilora.dist import own_part
from minilora.errors import DivergedError, OutOfMemoryError, StoppedError
from minilora.generate import Speaker
from minilora.memory import free_cached, gib, is_out_of_memory, peak_memory_bytes, trim_heap
from minilora.run import Run

MAX_SKIPPED_IN_A_ROW = 3
SAMPLES_AT_ONCE = 8


def record_step(
    run: Run, loss: float, grad_norm: float, rate: float, num_tokens: int, num_supervised: int, seconds: float
) -> dict[str, Any]:
    """Count a step in run.state; returns its record for metrics.jsonl."""
    state = run.state
    state.step += 1
    state.tokens += num_tokens
    state.supervised_tokens += num_supervised
    state.seconds += seconds
    state.last_loss = loss if math.isfinite(loss) else state.last_loss
    state.first_loss = state.last_loss if state.first_loss is None else state.first_loss
    return {
        "step": state.step,
        "epoch": state.step / run.schedule.steps_per_epoch,
        "loss": loss if math.isfinite(loss) else None,
        "learning_rate": rate,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "tokens": num_tokens,
        "supervised_tokens": num_supervised,
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "time": time.time(),
    }


def record_evaluation(run: Run, loss: float) -> None:
    """Keep an evaluation's loss and answers, and the adapter in best/ if no earlier one was better."""
    state, best = run.state, run.state.best_eval_loss
    answers = run.world.lead(lambda: answer_questions(run))  # stopped in here, the evaluation is done again
    run.log.evaluation({"step": state.step, "eval_loss": loss if math.isfinite(loss) else None}, best)
    run.log.samples(state.step, zip(run.questions, answers, strict=False))
    if math.isfinite(loss) and (best is None or loss < best):
        state.best_eval_loss, state.evals_since_best = loss, 0
        if state.step:
            save_result(run, run.folder / "best")
    else:
        state.evals_since_best += 1
    state.first_eval_loss = loss if state.step == 0 and math.isfinite(loss) else state.first_eval_loss
    state.last_eval_loss = loss if math.isfinite(loss) else state.last_eval_loss
    state.evaluated_step = state.step


def answer_questions(run: Run) -> list[str]:
    """How the model answers run.questions now, as far as memory lasts; draws no random number."""
    speaker = Speaker(run.model.eval(), run.tokenizer, run.markup, run.config.system_prompt)
    answers: list[str] = []
    if run.questions:  # what training has freed makes room for what answering takes
        trim_heap(run.device)
    for start in range(0, len(run.questions), SAMPLES_AT_ONCE):
        part = run.questions[start : start + SAMPLES_AT_ONCE]
        try:
            with run.autocast():
                answers += output.short_answers(speaker, [question.turns for question in part])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.log.note(f"out of memory: {len(answers)} of {len(run.questions)} samples answered")
            break
        run.check()
    if len(answers) < len(run.questions):
        free_cached(run.device)
    return answers


def save_checkpoint(run: Run) -> Path:
    """The checkpoint of run.state, written now unless this run has done so. Raises DivergedError for spoilt weights."""
    path = checkpoint.checkpoint_path(run.folder, run.state.step)
    if run.saved_step == run.state.step and run.world.lead(lambda: checkpoint.is_valid(path)):
        return path
    _refuse_spoilt(run)

    def save() -> None:
        with files.storage_errors(run.folder):
            os.stat(run.folder)  # a folder that has vanished must not come back with a checkpoint and nothing else
        checkpoint.save(run.folder, run.model, run.optimizer, run.state, run.identity, run.config.save_total_limit)

    run.world.lead(save, lambda: checkpoint.take_part(run.model, run.optimizer))
    run.saved_step = run.state.step
    return path


def stopped(run: Run, error: StoppedError) -> None:
    """Save what was done before a signal; the error then says where, and how to go on."""
    if run.state.step:
        saved = save_checkpoint(run)
        error.args = (f"{error}; saved {saved}. Go on with: {run.resume_command}",)
    else:
        error.args = (f"{error} before the first step was done: there was nothing to save",)


def weights_are_finite(run: Run) -> bool:
    """Whether every number that is trained is finite."""
    params = checkpoint.trainable(run.model).values()
    return not run.world.any(not all(bool(torch.isfinite(own_part(param)).all()) for param in params))


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
    if run.config.method == "full":
        run.world.lead(
            lambda: output.save_model(folder, run.model, run.tokenizer, run.dtype), lambda: output.take_part(run.model)
        )
    else:
        run.world.lead(lambda: _save_adapter(run, folder))


def _save_adapter(run: Run, folder: Path) -> None:
    config = run.config
    settings = adapter.AdapterConfig(
        base_model=str(run.base_folder.resolve()) if os.path.isdir(os.path.expanduser(config.model)) else config.model,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        rslora=config.use_rslora,
        dora=config.use_dora,
    )
    if config.init_lora_weights == "pissa":
        settings = adapter.converted(settings)
    metadata = {"base_fingerprint": run.identity.base_fingerprint, "system_prompt": config.system_prompt}
    output.save_adapter(folder, run.model, run.tokenizer, settings, metadata)


def skip(run: Run, indices: np.ndarray, loss: float, grad_norm: float) -> None:
    """Leave the weights as they are; after MAX_SKIPPED_IN_A_ROW such steps, save the last good state and stop."""
    state = run.state
    if state.skipped_in_a_row == 0:
        run.before_skipped = dataclasses.replace(state)
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    places = run.train_set.places(indices)
    run.log.note(f"step {state.step + 1} skipped: loss {loss}, gradient norm {grad_norm}; rows at {places}")
    if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    good = state.step + 1 - MAX_SKIPPED_IN_A_ROW
    run.state = run.before_skipped or dataclasses.replace(state, step=good, skipped_in_a_row=0)
    if run.saved_step > good:
        run.world.lead(lambda: checkpoint.remove_after(run.folder, good))  # written among the skipped: would pass them
    if weights_are_finite(run):
        kept = f"The state before them is saved: {save_checkpoint(run)}."
    else:
        kept = "The weights themselves are not finite, and are not saved."
    raise DivergedError(
        f"no finite gradient in {MAX_SKIPPED_IN_A_ROW} steps in a row (steps {good + 1} to {state.step + 1}). "
        f"{kept} Start anew with a lower --learning_rate, or look at the rows above."
    )


def out_of_memory(run: Run, error: BaseException) -> bool:
    """True for an error that says that memory ran out; any other is raised again.

    Among shards the others wait for this process in the middle of the step, which cannot begin again: raises
    OutOfMemoryError.
    """
    if not is_out_of_memory(error):
        raise error
    if run.world.lockstep:
        budget = run.state.max_tokens
        raise OutOfMemoryError(
            f"a micro-batch of up to {budget:,} tokens does not fit: {gib(peak_memory_bytes(run.device))} were in use. "
            f"Go on with --max_tokens_per_micro_batch {budget // 2}, or more processes."
        ) from error
    return True


def shrink_budget(run: Run, lengths: Sequence[int] | np.ndarray) -> None:
    """Halve the token budget for the rest of the run. Raises OutOfMemoryError when examples already went one by one."""
    longest = int(max(lengths)) - 1
    if run.state.max_tokens <= longest:
        cheaper = [] if run.checkpointing else ["--gradient_checkpointing"]
        cheaper += [f"--max_length {longest // 2}"]
        cheaper += ["a smaller --lora_r" if run.config.method == "lora" else "--method lora", "a smaller --model"]
        raise OutOfMemoryError(
            f"one example of {longest:,} tokens does not fit: {gib(peak_memory_bytes(run.device))} were in use. "
            f"In order of cost: {', '.join(cheaper)}."
        )
    run.state.max_tokens = max(longest, run.state.max_tokens // 2)
    run.log.note(f"out of memory: beginning again with {run.state.max_tokens:,} tokens a micro-batch")
