"""Computes the examples of each optimizer step from the number of the step alone."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch. It depends only on the seed and the epoch. (num_examples,)"""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@dataclass(frozen=True)
class Part:
    """A file in the mixture of an epoch. Its `rows` examples begin at index `first`; an epoch takes `taken` of them."""

    first: int
    rows: int
    taken: int


def mixed(parts: Sequence[Part], seed: int, epoch: int) -> np.ndarray:
    """The examples that an epoch takes from each file. They depend only on the seed and the epoch. (sum of taken,)

    For each file, repeated shuffles of its examples form one long sequence. Each epoch takes the next `taken` examples
    of this sequence. So after any epoch, one example of a file was taken at most once more than another.
    """
    chosen = []
    for number, part in enumerate(parts):
        places = np.arange(epoch * part.taken, (epoch + 1) * part.taken)
        for again in range(places[0] // part.rows, places[-1] // part.rows + 1):
            shuffle = np.random.default_rng([seed, again, number, 1]).permutation(part.rows)  # not [seed, epoch]
            chosen.append(part.first + shuffle[places[places // part.rows == again] % part.rows])
    return np.concatenate(chosen)


@functools.lru_cache(maxsize=2)
def _order(parts: tuple[Part, ...], num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = epoch_order(num_examples, seed, epoch)
    return mixed(parts, seed, epoch)[order] if parts else order


@dataclass(frozen=True)
class Schedule:
    """The examples of each optimizer step, computed from the number of the step alone.

    num_examples: the examples of an epoch
    parts: the files that an epoch mixes; empty if it takes each example once
    """

    num_examples: int
    examples_per_step: int
    num_steps: int
    seed: int
    parts: tuple[Part, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch. The last step of an epoch may be smaller."""
        return math.ceil(self.num_examples / self.examples_per_step)

    def examples_of(self, step: int) -> np.ndarray:
        """The indices of the examples of a step (counted from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.parts, self.num_examples, self.seed, epoch)
        return order[place * self.examples_per_step : (place + 1) * self.examples_per_step]

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch or the run is complete after this step (counted from 0)."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.num_steps


def make_schedule(
    num_examples: int,
    examples_per_step: int,
    num_epochs: float,
    max_steps: int,
    seed: int,
    parts: tuple[Part, ...] = (),
) -> Schedule:
    """The schedule of a run. max_steps > 0 overrides num_epochs, and `parts` overrides num_examples."""
    num_examples = sum(part.taken for part in parts) or num_examples
    steps_per_epoch = math.ceil(num_examples / examples_per_step)
    num_steps = max_steps or max(1, math.ceil(num_epochs * steps_per_epoch))
    return Schedule(num_examples, examples_per_step, num_steps, seed, parts)
