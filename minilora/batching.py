"""The examples of one optimizer step, cut into micro-batches without padded rows; the collator.

How a step is cut cannot change its gradient (the loss is the sum over all its tokens divided by their number),
so the cut is free: it serves speed and memory only.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minilora.attention import Layout
from minilora.data import IGNORE, Example

TOKENS_MULTIPLE = 8  # of a micro-batch: bf16 products with other numbers of rows take up to a quarter longer on a CPU
MICRO_BATCH_TOKENS = {"cpu": 960, "cuda": 16384}  # of a CUDA device: less where that is predicted not to fit
SHARED_PREFIXES = 3  # a micro-batch has more room by so many times the tokens that its rows share


@dataclass(frozen=True)
class Batch:
    """Examples laid end to end, no row padded; attention never crosses them and positions restart.

    T = input tokens (each example's last token is only a target; a shared prefix is there once), filled up at the end
    to a multiple of TOKENS_MULTIPLE; S = supervised targets
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
        """The same batch on a device; a CUDA device copies from pinned memory, so that nobody waits for it."""
        tensors = [self.input_ids, self.position_ids, self.rows, self.targets]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        ids, positions, rows, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(ids, positions, self.layout, rows, targets)

    def unsupervised(self) -> "Batch":
        """The same tokens, none of which counts: the loss is zero, and so is its gradient."""
        return dataclasses.replace(self, rows=self.rows[:0], targets=self.targets[:0])


def collate(examples: Sequence[Example], share_prefix: bool = False) -> Batch:
    """Examples as one Batch: the shift to next-token targets happens here, and only here.

    share_prefix: tokens that all examples begin with, none of them supervised, are computed once for all.
    """
    prefix = common_prefix(examples) if share_prefix else 0
    lengths = [len(example.input_ids) - 1 - prefix for example in examples]
    padding = -(prefix + sum(lengths)) % TOKENS_MULTIPLE
    own_ids = (example.input_ids[prefix:-1] for example in examples)
    ids = np.concatenate([examples[0].input_ids[:prefix], *own_ids, np.zeros(padding, np.int64)])
    own_positions = (prefix + np.arange(length) for length in lengths)
    positions = np.concatenate([np.arange(prefix), *own_positions, np.arange(padding)])
    rows, targets = [], []
    for example, end in zip(examples, prefix + np.cumsum(lengths), strict=True):
        supervised = np.flatnonzero(example.labels[1:] != IGNORE)
        first_own = end - len(example.input_ids) + 1 + prefix
        rows.append(np.where(supervised < prefix, supervised, first_own + supervised - prefix))
        targets.append(example.labels[1:][supervised])
    arrays = (ids[None], positions[None], np.concatenate(rows), np.concatenate(targets))
    input_ids, position_ids, kept, wanted = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
    return Batch(input_ids, position_ids, Layout(tuple(lengths), prefix, padding), kept, wanted)


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
    """Examples, cut and collated: each Batch has at most max_tokens tokens of examples, or is one example.

    What all the examples begin with counts once for each Batch where it is shared, not once for each example.
    """
    for part in cut_examples(examples, max_tokens, share_prefix):
        yield collate([examples[i] for i in part], share_prefix)


def default_tokens(device_type: str, examples: Sequence[Example], share_prefix: bool) -> int:
    """How many tokens a micro-batch of such examples is given where nothing else is asked.

    The longer a shared prefix is, the more rows must meet at it for it to pay.
    """
    shared = common_prefix(examples) if share_prefix else 0
    return MICRO_BATCH_TOKENS[device_type] + SHARED_PREFIXES * shared


def cut_examples(examples: Sequence[Example], max_tokens: int, share_prefix: bool) -> list[list[int]]:
    """Which examples stand together in each micro-batch, by their indices."""
    shared = common_prefix(examples) if share_prefix else 0
    return cut([len(example.input_ids) - 1 - shared for example in examples], max_tokens - shared)


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


def share(lengths: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Share the examples of a step out to so many processes, about the same number of tokens to each; their indices.

    Longest first to the process that has least so far. A pure function of its arguments: each process computes it
    alone. With fewer examples than processes some get none.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += int(lengths[i])
    return [sorted(part) for part in shares]


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
