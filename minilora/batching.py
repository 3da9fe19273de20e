"""Packs the examples of one optimizer step into micro-batches without padded rows, and collates them.

The loss is the sum over all tokens of the step, divided by their number. So the division into micro-batches cannot
change the gradient of the step. It affects only speed and memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minilora.attention import Layout
from minilora.config import TrainConfig
from minilora.data.dataset import IGNORE, Example
from minilora.utils.device import micro_batch_tokens


def shares_prefix(config: TrainConfig, device_type: str) -> bool:
    """Whether a micro-batch computes the tokens that all its rows begin with only once."""
    return config.share_prefix == "on" or (config.share_prefix == "auto" and device_type == "cpu")


ROWS_MULTIPLE = 8  # bf16 products with another number of rows take up to a quarter longer on a CPU
CUDA_TOKENS = 16384  # of a micro-batch; a run takes fewer if this is predicted not to fit
SHARED_PREFIXES = 3  # a shared prefix raises the token limit of a micro-batch by 3 times its length


@dataclass(frozen=True)
class Batch:
    """Examples laid end to end. No row is padded, attention never crosses examples, and positions restart at each one.

    T = input tokens, filled up at the end to a multiple of ROWS_MULTIPLE. The last token of each example is only a
    target. A shared prefix is present once.
    S = supervised targets
    input_ids, position_ids: (1, T)
    layout: which of the T tokens belong to which example
    rows: (S,) positions in 0..T-1 whose next token is supervised. The last position of a shared prefix can occur in
        it several times.
    targets: (S,) the tokens to predict at these positions
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: Layout
    rows: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device. The copy to a CUDA device is asynchronous, from pinned memory."""
        tensors = [self.input_ids, self.position_ids, self.rows, self.targets]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        ids, positions, rows, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Batch(ids, positions, self.layout, rows, targets)

    def unsupervised(self) -> "Batch":
        """The same tokens with no supervised target: the loss and its gradient are zero."""
        return dataclasses.replace(self, rows=self.rows[:0], targets=self.targets[:0])


def collate(examples: Sequence[Example], share_prefix: bool = False) -> Batch:
    """Makes one Batch of the examples. The shift to next-token targets happens only here.

    share_prefix: compute the unsupervised tokens that all examples begin with once for all of them
    """
    prefix = common_prefix(examples) if share_prefix else 0
    lengths = [len(example.input_ids) - 1 - prefix for example in examples]
    padding = -(prefix + sum(lengths)) % ROWS_MULTIPLE
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
    """How many unsupervised tokens all examples begin with. Each example keeps at least one input token of its own."""
    if len(examples) < 2:
        return 0
    longest = min(len(example.input_ids) for example in examples) - 2
    first = examples[0]
    same = first.labels[:longest] == IGNORE
    for example in examples[1:]:
        same &= (example.input_ids[:longest] == first.input_ids[:longest]) & (example.labels[:longest] == IGNORE)
    return int(np.argmin(np.append(same, False)))


def micro_batches(examples: Sequence[Example], max_tokens: int, share_prefix: bool = False) -> Iterator[Batch]:
    """Packs and collates the examples. Each Batch has at most max_tokens tokens of examples, or holds one example.

    A shared prefix counts once for each Batch, not once for each example.
    """
    for part in pack_examples(examples, max_tokens, share_prefix):
        yield collate([examples[i] for i in part], share_prefix)


def default_tokens(
    device_type: str, examples: Sequence[Example], share_prefix: bool, ffn: int, dtype: torch.dtype
) -> int:
    """The default token limit of a micro-batch of these examples. On a CPU it depends on the size of the cache.

    ffn: the intermediate_size of the model; dtype: of its activations
    A longer shared prefix raises the limit, because sharing saves more when more rows use the same prefix.
    """
    shared = common_prefix(examples) if share_prefix else 0
    usual = micro_batch_tokens(ffn, dtype) if device_type == "cpu" else CUDA_TOKENS
    return usual + SHARED_PREFIXES * shared


def pack_examples(examples: Sequence[Example], max_tokens: int, share_prefix: bool) -> list[list[int]]:
    """The indices of the examples in each micro-batch."""
    shared = common_prefix(examples) if share_prefix else 0
    return pack([len(example.input_ids) - 1 - shared for example in examples], max_tokens - shared)


def pack(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Pack the examples of a step into micro-batches of at most max_tokens tokens each. Returns their indices.

    The method is best-fit decreasing: the longest example comes first, and each goes into the fullest micro-batch that
    still has room. An example longer than max_tokens is alone. The result depends only on the arguments, so a resumed
    run makes the same micro-batches.
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
    """Divide the examples of a step among `parts` processes, with about equal numbers of tokens. Returns their indices.

    The longest example comes first, and each goes to the process with the fewest tokens so far. The result depends only
    on the arguments, so each process computes it by itself. If there are fewer examples than processes, some processes
    get none.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += int(lengths[i])
    return [sorted(part) for part in shares]
