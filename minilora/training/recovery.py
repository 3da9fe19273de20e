"""What a run does when a signal stops it, when a gradient is not finite, and when memory runs out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from minilora.errors import DivergedError, OutOfMemoryError, StoppedError
from minilora.training import checkpoint
from minilora.training.run import Run
from minilora.training.saving import save_checkpoint, weights_are_finite
from minilora.utils.device import free_cached, gib, is_out_of_memory, peak_memory_bytes

MAX_SKIPPED_IN_A_ROW = 3
T = TypeVar("T")


def stopped(run: Run, error: StoppedError) -> None:
    """Save the steps that were done before a signal; the error's text then says where, and the command that goes on."""
    if run.saved_result is not None:
        error.args = (
            f"{error} after all steps. {run.saved_result} is saved and complete; it was not loaded again and compared "
            f"with what was trained. To do this: {run.resume_command}",
        )
        return
    if run.state.step:
        saved = save_checkpoint(run)
        error.args = (f"{error}; saved {saved}. Go on with: {run.resume_command}",)
    else:
        again = f"Start again with: {run.resume_command}"
        error.args = (f"{error} before the first step was done: there was nothing to save. {again}",)


def skip(run: Run, indices: np.ndarray, loss: float, grad_norm: float) -> None:
    """Leave the weights as they are; after MAX_SKIPPED_IN_A_ROW such steps, save the last good state and stop."""
    state = run.state
    if state.skipped_in_a_row == 0:
        run.before_skipped = dataclasses.replace(state)
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    places = run.data.train.places(indices)
    run.log.note(f"step {state.step + 1} skipped: loss {loss}, gradient norm {grad_norm}; rows at {places}")
    if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    good = state.step + 1 - MAX_SKIPPED_IN_A_ROW
    run.state = run.before_skipped or dataclasses.replace(state, step=good, skipped_in_a_row=0)
    if run.saved_step > good:
        # a checkpoint that was written among the skipped steps would otherwise be taken for the newest
        run.world.run_on_main(lambda: checkpoint.remove_after(run.folder, good))
    if weights_are_finite(run):
        kept = f"The state before them is saved: {save_checkpoint(run)}."
    else:
        kept = "The weights themselves are not finite, and are not saved."
    raise DivergedError(
        f"no finite gradient in {MAX_SKIPPED_IN_A_ROW} steps in a row (steps {good + 1} to {state.step + 1}). "
        f"{kept} Start a new run with a lower --learning_rate, or look at the rows above."
    )


def until_it_fits(run: Run, work: Callable[[], T], lengths: Sequence[int] | np.ndarray) -> T:
    """work(), repeated with a smaller token budget as long as memory runs out in any of the processes.

    lengths: tokens of the examples that `work` goes through. Where the model is sharded, the other processes wait in
    the middle of the work, and it cannot be repeated: raises OutOfMemoryError, as where one example does not fit.
    """
    while True:
        no_memory = False
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if run.world.sharded:
                raise _too_little_for_shards(run) from error
            no_memory = True
        if not run.world.any(no_memory):
            return result
        run.optimizer.zero_grad(set_to_none=True)  # outside of the except block, whose error holds on to the rest
        free_cached(run.device)
        _shrink_budget(run, lengths)


def _too_little_for_shards(run: Run) -> OutOfMemoryError:
    budget = run.state.max_tokens
    return OutOfMemoryError(
        f"a micro-batch of up to {budget:,} tokens does not fit: {gib(peak_memory_bytes(run.device))} were in use. "
        f"Go on with --max_tokens_per_micro_batch {budget // 2}, or more processes."
    )


def _shrink_budget(run: Run, lengths: Sequence[int] | np.ndarray) -> None:
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
    run.log.note(f"out of memory: repeated with {run.state.max_tokens:,} tokens a micro-batch")
