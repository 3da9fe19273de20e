"""Which examples each optimizer step takes, computed from the step's number alone."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: a pure function of (seed, epoch). (num_examples,)"""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@dataclass(frozen=True)
class Part:
    """A file in the mixture of an epoch: its examples are `rows` from index `first` on; an epoch takes `taken`."""

    first: int
    rows: int
    taken: int


def mixed(parts: Sequence[Part], seed: int, epoch: int) -> np.ndarray:
    """The examples that an epoch takes of each file: a pure function of (seed, epoch). (sum of taken,)

    They are the next `taken` of a file's shuffles laid end to end, so that over the epochs none of its examples is
    ahead of another by more than one.
    """
    chosen = []
    for number, part in enumerate(parts):
        places = np.arange(epoch * part.taken, (epoch + 1) * part.taken)
        for again in range(places[0] // part.rows, places[-1] // part.rows + 1):
            shuffle = np.random.default_rng([seed, again, number, 1]).permutation(part.rows)  # unlike [seed, epoch]
            chosen.append(part.first + shuffle[places[places // part.rows == again] % part.rows])
    return np.concatenate(chosen)


@functools.lru_cache(maxsize=2)
def _order(parts: tuple[Part, ...], num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = epoch_order(num_examples, seed, epoch)
    return mixed(parts, seed, epoch)[order] if parts else order


@dataclass(frozen=True)
class Schedule:
    """Which examples each optimizer step takes, computed from its number alone.

    num_examples: those of an epoch; parts: the files that these are mixed of, empty where it takes each example once
    """

    num_examples: int
    examples_per_step: int
    num_steps: int
    seed: int
    parts: tuple[Part, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one of an epoch may be smaller."""
        return math.ceil(self.num_examples / self.examples_per_step)

    def examples_of(self, step: int) -> np.ndarray:
        """Indices of the examples of a step (counted from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(self.parts, self.num_examples, self.seed, epoch)
        return order[place * self.examples_per_step : (place + 1) * self.examples_per_step]

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is complete after this step (counted from 0)."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.num_steps


def make_schedule(
    num_examples: int,
    examples_per_step: int,
    num_epochs: float,
    max_steps: int,
    seed: int,
    parts: tuple[Part, ...] = (),
) -> Schedule:
    """The schedule of a run; max_steps > 0 goes before num_epochs, `parts` before num_examples."""
    num_examples = sum(part.taken for part in parts) or num_examples
    steps_per_epoch = math.ceil(num_examples / examples_per_step)
    num_steps = max_steps or max(1, math.ceil(num_epochs * steps_per_epoch))
    return Schedule(num_examples, examples_per_step, num_steps, seed, parts)
