"""The examples of one optimizer step, cut into micro-batches without padded rows; the collator.

How a step is cut cannot change its gradient (the loss is the sum over all its tokens divided by their number),
so the cut is free: it serves speed and memory only.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minilora.attention import Layout
from minilora.config import TrainConfig
from minilora.data.dataset import IGNORE, Example


def shares_prefix(config: TrainConfig, device_type: str) -> bool:
    """Whether a micro-batch computes what all its rows begin with only once."""
    return config.share_prefix == "on" or (config.share_prefix == "auto" and device_type == "cpu")


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
    for part in pack_examples(examples, max_tokens, share_prefix):
        yield collate([examples[i] for i in part], share_prefix)


def default_tokens(device_type: str, examples: Sequence[Example], share_prefix: bool) -> int:
    """How many tokens a micro-batch of such examples is given where nothing else is asked.

    The longer a shared prefix is, the more rows must meet at it for it to pay.
    """
    shared = common_prefix(examples) if share_prefix else 0
    return MICRO_BATCH_TOKENS[device_type] + SHARED_PREFIXES * shared


def pack_examples(examples: Sequence[Example], max_tokens: int, share_prefix: bool) -> list[list[int]]:
    """Which examples stand together in each micro-batch, by their indices."""
    shared = common_prefix(examples) if share_prefix else 0
    return pack([len(example.input_ids) - 1 - shared for example in examples], max_tokens - shared)


def pack(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
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


def split_across_ranks(lengths: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
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
