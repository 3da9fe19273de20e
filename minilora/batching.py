"""The examples of one optimizer step, cut into padding-free micro-batches; the collator.

How a step is cut cannot change its gradient (DESIGN: the loss is the sum over all its tokens divided by their number),
so the cut is free: it serves speed and memory only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minilora.attention import Layout
from minilora.data import IGNORE, Example


@dataclass(frozen=True)
class Batch:
    """Examples laid end to end, without padding; attention never crosses them and positions restart.

    T = input tokens (each example's last token is only a target; a shared prefix is there once), S = supervised targets
    input_ids, position_ids: (1, T)
    layout: which of the T tokens belong to which example
    rows: (S,) positions in 0..T-1 whose next token is supervised; the prefix's last one may stand there for several
    targets: (S,) the tokens to be predicted there
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    rows: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, copied without waiting where memory is pinned."""
        tensors = (self.input_ids, self.position_ids, self.rows, self.targets)
        ids, positions, rows, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(ids, positions, self.layout, rows, targets)


def collate(examples: Sequence[Example], share_prefix: bool = False) -> Batch:
    """Examples as one Batch: the shift to next-token targets happens here, and only here.

    share_prefix: tokens that all examples begin with, none of them supervised, are computed once for all.
    """
    prefix = common_prefix(examples) if share_prefix else 0
    ids = np.concatenate([examples[0].input_ids[:prefix], *(example.input_ids[prefix:-1] for example in examples)])
    lengths = [len(example.input_ids) - 1 - prefix for example in examples]
    positions = np.concatenate([np.arange(prefix), *(prefix + np.arange(length) for length in lengths)])
    rows, targets = [], []
    for example, end in zip(examples, prefix + np.cumsum(lengths), strict=True):
        supervised = np.flatnonzero(example.labels[1:] != IGNORE)
        first_own = end - len(example.input_ids) + 1 + prefix
        rows.append(np.where(supervised < prefix, supervised, first_own + supervised - prefix))
        targets.append(example.labels[1:][supervised])
    arrays = (ids[None], positions[None], np.concatenate(rows), np.concatenate(targets))
    input_ids, position_ids, kept, wanted = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
    return Batch(input_ids, position_ids, Layout(tuple(lengths), prefix), kept, wanted)


def common_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all examples begin with, none supervised; each keeps an input token of its own."""
    if len(examples) < 2:
        return 0
    longest = min(len(example.input_ids) for example in examples) - 2
    first = examples[0]
    same = first.labels[:longest] == IGNORE
    for example in examples[1:]:
        same &= (example.input_ids[:longest] == first.input_ids[:longest]) & (example.labels[:longest] == IGNORE)
    return int(np.argmin(np.append(same, False)))


def micro_batches(examples: Sequence[Example], max_tokens: int, share_prefix: bool = False) -> Iterator[Batch]:
    """Examples, cut and collated: each Batch computes at most max_tokens tokens, or is one example.

    What all the examples begin with counts once for each Batch where it is shared, not once for each example.
    """
    shared = common_prefix(examples) if share_prefix else 0
    for part in cut([len(example.input_ids) - 1 - shared for example in examples], max_tokens - shared):
        yield collate([examples[i] for i in part], share_prefix)


def cut(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Cut the examples of a step into micro-batches of at most max_tokens tokens each; returns their indices.

    Longest first into the fullest micro-batch that still has room (best-fit decreasing); an example longer than the
    budget is alone. A pure function of its arguments, so that a resumed run cuts as the first did.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        length = int(lengths[i])
        fitting = [b for b in range(len(bins)) if room[b] >= length]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
            bins[best].append(i)
            room[best] -= length
        else:
            bins.append([i])
            room.append(max_tokens - length)
    return bins


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: a pure function of (seed, epoch). (num_examples,)"""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@dataclass(frozen=True)
class Schedule:
    """Which examples each optimizer step takes, computed from its number alone."""

    num_examples: int
    examples_per_step: int
    num_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one of an epoch may be smaller."""
        return math.ceil(self.num_examples / self.examples_per_step)

    def examples_of(self, step: int) -> np.ndarray:
        """Indices of the examples of a step (counted from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_examples, self.seed, epoch)
        return order[place * self.examples_per_step : (place + 1) * self.examples_per_step]

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is complete after this step (counted from 0)."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.num_steps


def make_schedule(num_examples: int, examples_per_step: int, num_epochs: float, max_steps: int, seed: int) -> Schedule:
    """The schedule of a run; max_steps > 0 goes before num_epochs."""
    steps_per_epoch = math.ceil(num_examples / examples_per_step)
    num_steps = max_steps or max(1, math.ceil(num_epochs * steps_per_epoch))
    return Schedule(num_examples, examples_per_step, num_steps, seed)
