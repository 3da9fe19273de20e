"""The training loop: `train` is a whole run, `train_step` one optimizer step, `gradients` the gradient of that step."""

import math
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.config import TrainConfig
from minilora.data.dataset import Dataset, Example
from minilora.distributed.world import full_tensor
from minilora.errors import StoppedError
from minilora.optim import learning_rate
from minilora.training.finish import Summary, finish
from minilora.training.recovery import skip, stopped, until_it_fits
from minilora.training.run import Run
from minilora.training.saving import record_evaluation, save_checkpoint, step_record
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest
from minilora.utils import terminal
from minilora.utils.process import settings_of_a_run


def train(config: TrainConfig, *, quiet: bool = False) -> Summary:
    """A whole run, from the JSONL file to the verified adapter.

    quiet: print nothing and show no progress bar; the files are the same
    """
    with settings_of_a_run(), terminal.quiet(quiet), StopRequest() as stop, ExitStack() as held:
        run = prepare(config, stop, held)
        try:
            with run.world.raise_on_all_ranks():
                while True:
                    evaluate_and_save(run)
                    if run.stop_reason:
                        return finish(run, run.stop_reason)
                    run.log.step(train_step(run))
        except StoppedError as error:  # the current step is lost; all steps before it are saved
            stopped(run, error)
            raise
        except BrokenPipeError:  # the reader of our output is gone; the training is still saved
            if run.state.step:
                save_checkpoint(run)
            raise


def evaluate_and_save(run: Run) -> None:
    """What is due between two steps: an evaluation (and best/ when it is the best), a checkpoint.

    Both are due at the end of an epoch, or after eval_steps and save_steps steps; always after the last step.
    """
    config, state = run.config, run.state
    done = state.step > 0 and run.schedule.ends_epoch(state.step - 1)
    last = state.step >= run.schedule.num_steps
    eval_due = state.step == 0 or last or (state.step % config.eval_steps == 0 if config.eval_steps else done)
    if run.data.eval is not None and eval_due and state.evaluated_step != state.step:
        record_evaluation(run, evaluate(run, run.data.eval))
    save_due = state.step > 0 and (state.step % config.save_steps == 0 if config.save_steps else done)
    if run.stop_reason or save_due:
        save_checkpoint(run)


def train_step(run: Run) -> dict[str, Any]:
    """One optimizer step over the examples of run.state.step: gradient of the mean loss, clip, AdamW.

    Returns the record for metrics.jsonl. Raises DivergedError after three steps in a row without a finite gradient.
    """
    config, state, steps, started = run.config, run.state, run.schedule.num_steps, time.perf_counter()
    indices = run.schedule.examples_of(state.step)
    examples = [run.data.train[i] for i in indices]
    num_units = run.objective.count(examples)
    rate = learning_rate(state.step, steps, config.learning_rate, config.lr_scheduler_type, config.warmup_ratio)

    mean_loss = gradients(run, examples, num_units)
    params = [param for param in run.model.parameters() if param.grad is not None]
    norm = full_tensor(nn.utils.clip_grad_norm_(params, config.max_grad_norm or math.inf))
    loss, grad_norm = torch.stack([mean_loss, norm.to(mean_loss)]).tolist()  # the step's one wait for the device
    if math.isfinite(loss) and math.isfinite(grad_norm):
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        run.optimizer.step()
        state.skipped_in_a_row = 0
    else:
        skip(run, indices, loss, grad_norm)
    run.optimizer.zero_grad(set_to_none=True)

    num_tokens, seconds = sum(len(example.input_ids) for example in examples), time.perf_counter() - started
    state.step += 1
    state.tokens += num_tokens
    state.supervised_tokens += num_units
    state.seconds += seconds
    state.last_loss = loss if math.isfinite(loss) else state.last_loss
    state.first_loss = state.last_loss if state.first_loss is None else state.first_loss
    return step_record(run, loss, grad_norm, rate, num_tokens, num_units, seconds)


def gradients(run: Run, examples: list[Example], num_units: int) -> Tensor:
    """Add up the gradient of the mean loss, (sum over all units) / num_units, over the micro-batches; return that loss.

    The gradient does not depend on how the step is divided, because each micro-batch divides its sum by the units of
    the whole step. (Dropout and noise are drawn for each micro-batch, so their values do depend on it.)
    Each process takes its share of the examples (`run.batches`). If memory runs out, the step is repeated with fewer
    tokens in each micro-batch.
    """

    def accumulate() -> Tensor:
        total = torch.zeros((), device=run.device)
        torch.manual_seed(step_seed(run.config.seed, run.state.step, run.world.rank))  # for dropout and noise
        run.model.train()
        for batch in run.batches(examples):
            with run.autocast():
                loss = run.objective.loss(run.decoder, batch) / num_units
            loss.backward()
            total += loss.detach()
            run.check()
        return total

    total = until_it_fits(run, accumulate, [len(example.input_ids) for example in examples])
    return run.world.all_reduce_gradients(run.model.parameters(), total)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of a process's random draws in a step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def evaluate(run: Run, dataset: Dataset) -> float:
    """Mean loss over the units of a data set, in nats. Repeated when memory runs out."""
    total = until_it_fits(run, lambda: _evaluate(run, dataset), dataset.lengths)
    num_units = sum(run.objective.count(group) for group in dataset.groups())
    return sum(run.world.exchange(total)) / num_units


@torch.no_grad()
def _evaluate(run: Run, dataset: Dataset) -> float:
    """The loss summed over the micro-batches that this process takes."""
    total = torch.zeros((), device=run.device, dtype=torch.float64)
    run.model.eval()
    for group in dataset.groups():
        for batch in run.batches(group):
            with run.autocast():
                total += run.objective.loss(run.decoder, batch)
            run.check()
    return total.item()
