"""Makes examples of token ids from rows, and stores them end to end in flat columns, in memory or in files."""

import dataclasses
import hashlib
import itertools
import operator
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, cast, overload

import numpy as np

from minilora.data.formats import Row
from minilora.data.markup import ChatMarkup
from minilora.data.report import MAX_PROBLEMS_SHOWN, Cut, DataReport, Figures, Reading, Returned, put_together
from minilora.errors import DataError

# Part of the key of a cache. Increase it if the same file, tokenizer and settings give other tokens, masks, columns,
# refused rows or figures in the report after a change in this module, formats, jsonl, rows, markup or report.
RENDER_VERSION = 1
IGNORE = -100  # PyTorch's ignore_index: positions with this label do not count in the loss


@dataclass(frozen=True)
class Example:
    """One training example.

    input_ids: (T,) int32, the whole conversation up to its last supervised token
    labels: (T,) int32, the token id if the token is supervised, else IGNORE (not shifted)
    """

    input_ids: np.ndarray
    labels: np.ndarray


ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 4096, 2**22  # the most rows and characters that are tokenised together


class FileColumn:
    """A column in a file. It is read, not memory-mapped: mapped pages would count as memory of this process."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  # open as long as the column exists
        self._dtype = dtype
        self._length = os.fstat(self._file.fileno()).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, _ = part.indices(self._length)
        found = np.empty(max(0, end - start), self._dtype)
        space, place = memoryview(cast(Any, found)).cast("B"), start * self._dtype.itemsize
        while space:
            try:
                count = os.preadv(self._file.fileno(), [space], place)
            except OSError as error:
                raise DataError(f"{self._file.name} cannot be read: {error.strerror}.") from error
            if not count:
                raise DataError(f"{self._file.name} was cut short while it was in use.")
            space, place = space[count:], place + count
        return found


Column = np.ndarray | FileColumn


class Columns(NamedTuple):
    """Examples end to end. T = tokens of all examples, n = examples.

    ids, supervised: (T,) int32, bool
    ends: (n,) int64, the end of each example among the tokens
    lines: (n,) int64, the line of the file that each example comes from
    counts: (n,) int32, the supervised tokens of each example
    keys: (n,) uint64, a hash of the tokens and the mask of each example; equal examples have equal keys
    """

    ids: Column
    supervised: Column
    ends: Column
    lines: Column
    counts: Column
    keys: Column


DTYPES = tuple(map(np.dtype, ("<i4", "?", "<i8", "<i8", "<i4", "<u8")))  # of the columns, in their order


@dataclass(frozen=True)
class Dataset(Sequence[Example]):
    """All or some of the examples of one or several files, in any order.

    columns: those of each file; chosen: (examples,) the numbers of the examples, counted over all files
    """

    files: tuple[str, ...]
    columns: tuple[Columns, ...]
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Dataset": ...

    def __getitem__(self, index: SupportsIndex | slice) -> "Example | Dataset":
        if isinstance(index, slice):
            return dataclasses.replace(self, chosen=self.chosen[index])
        number = int(self.chosen[operator.index(index)])
        file = int(np.searchsorted(self._firsts, number, side="right")) - 1
        columns, place = self.columns[file], number - int(self._firsts[file])
        *start, end = columns.ends[max(0, place - 1) : place + 1].tolist()
        start = start[0] if start else 0
        ids = columns.ids[start:end]
        return Example(ids, np.where(columns.supervised[start:end], ids, IGNORE).astype(np.int32))

    def groups(self, most: int = 256) -> Iterator[list[Example]]:
        """The examples in order, up to `most` at a time. The default is enough to fill micro-batches well."""
        for start in range(0, len(self), most):
            yield [self[i] for i in range(start, min(start + most, len(self)))]

    @cached_property
    def _firsts(self) -> np.ndarray:
        """The number of the first example of each file."""
        return np.cumsum([0, *(len(columns.lines) for columns in self.columns[:-1])])

    def _all(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(columns, name)[:] for columns in self.columns])[self.chosen]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example. (examples,)"""
        return np.concatenate([np.diff(columns.ends[:], prepend=0) for columns in self.columns])[self.chosen]

    @property
    def lines(self) -> np.ndarray:
        """The line that each example comes from. (examples,)"""
        return self._all("lines")

    @property
    def counts(self) -> np.ndarray:
        """Supervised tokens of each example. (examples,)"""
        return self._all("counts")

    @property
    def keys(self) -> np.ndarray:
        """A hash of each example's tokens and mask. (examples,) uint64"""
        return self._all("keys")

    @property
    def sources(self) -> np.ndarray:
        """The index in `files` of the file that each example comes from. (examples,)"""
        return np.searchsorted(self._firsts, self.chosen, side="right") - 1

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """The examples at these indices, in this order."""
        return dataclasses.replace(self, chosen=self.chosen[np.asarray(indices, np.int64)])

    def places(self, indices: np.ndarray) -> str:
        """The lines of these examples as a text, with the files' names if there are several files."""
        some = self.subset(indices)
        by_file = {file: sorted(some.lines[some.sources == number].tolist()) for number, file in enumerate(self.files)}
        if len(by_file) == 1:
            return f"lines {by_file[self.files[0]]}"
        return "; ".join(f"{file}, lines {lines}" for file, lines in by_file.items() if lines)


def of_file(file: str, columns: Columns) -> Dataset:
    """All examples of a file."""
    return Dataset((file,), (columns,), np.arange(len(columns.lines), dtype=np.int32))


def join(parts: Sequence[Dataset]) -> Dataset:
    """Join data sets end to end. Each must hold all examples of its files in their first order."""
    columns = tuple(each for part in parts for each in part.columns)
    count = sum(len(each.lines) for each in columns)
    assert count == sum(map(len, parts)), "only whole files are joined"
    return Dataset(tuple(file for part in parts for file in part.files), columns, np.arange(count, dtype=np.int32))


def make_columns(ids: np.ndarray, supervised: np.ndarray, lengths: np.ndarray, lines: np.ndarray) -> Columns:
    """Make the columns of examples whose tokens lie end to end. lengths: the tokens of each example"""
    ends = np.cumsum(lengths, dtype=np.int64)
    content = memoryview((2 * ids + supervised).astype("<i4").tobytes())
    bounds = itertools.pairwise([0, *(4 * ends).tolist()])
    keys = b"".join(hashlib.blake2b(content[a:b], digest_size=8).digest() for a, b in bounds)
    before = np.concatenate([[0], np.cumsum(supervised)])
    counts = before[ends] - before[ends - lengths]
    made = (ids, supervised, ends, lines, counts, np.frombuffer(keys, "<u8"))
    return Columns(*(array.astype(dtype) for array, dtype in zip(made, DTYPES, strict=True)))


def stack(parts: Iterable[Columns]) -> Columns:
    """Join columns end to end."""
    found: list[Columns] = []
    tokens = 0
    for part in parts:
        found.append(part._replace(ends=part.ends[:] + tokens))
        tokens += len(part.ids)
    return Columns(*(np.concatenate(column) for column in zip(*found, strict=True)))


# ---------------------------------------------------------------------------------------- rows -> examples


def tokenize(
    rows: Iterable[Row],
    markup: ChatMarkup,
    reading: Reading,
    *,
    system_prompt: str,
    max_length: int,
    overlong: str,
    train_on_prompt: bool,
) -> tuple[Dataset, DataReport]:
    """Make examples of at most max_length tokens from rows, in memory. Raises what `tokenized` raises."""
    settings: dict[str, Any] = {"system_prompt": system_prompt, "max_length": max_length, "overlong": overlong}
    parts = Returned(tokenized(rows, markup, reading.file, **settings, train_on_prompt=train_on_prompt))
    dataset = of_file(reading.file, stack(parts))
    return dataset, put_together(reading, parts.result, describe(dataset))


def tokenized(
    rows: Iterable[Row],
    markup: ChatMarkup,
    file: str,
    *,
    system_prompt: str,
    max_length: int,
    overlong: str,
    train_on_prompt: bool,
) -> Generator[Columns, None, Cut]:
    """Make examples of at most max_length tokens from the rows of a file, some rows at a time. Returns what was cut.

    A truncated answer never gets an end token. Tokens after the last supervised token do not affect the loss and are
    not kept. At the end, raises DataError if no example is left. With overlong = error, also raises DataError with the
    lines that are too long.
    """
    left = too_long = truncated = dropped_overlong = dropped_unsupervised = 0
    named = list[str]()
    for part in _portions(rows):
        ids, supervised, lengths = markup.render([row.turns for row in part], system_prompt)
        lines = np.array([row.line for row in part])
        supervised |= train_on_prompt
        starts = np.cumsum(lengths) - lengths
        place = np.arange(len(ids)) - np.repeat(starts, lengths)  # the position of each token in its example
        within = supervised & (place < max_length)
        whole = np.maximum.reduceat(np.where(supervised, place + 1, 0), starts)  # up to the last supervised token
        cut = np.maximum.reduceat(np.where(within, place + 1, 0), starts)
        long = whole > max_length
        dropped = long & (overlong == "drop")
        learns = np.logical_or.reduceat(within & (place > 0), starts)  # nothing predicts the first token
        kept = learns & ~dropped
        dropped_overlong += int(dropped.sum())
        dropped_unsupervised += int((~learns & ~dropped).sum())
        truncated += int((kept & long).sum())
        left, too_long = left + int(kept.sum()), too_long + int(long.sum())
        for i in np.flatnonzero(long)[: MAX_PROBLEMS_SHOWN - len(named)]:
            named.append(f"{file}:{lines[i]}: {whole[i]:,} tokens, more than max_length {max_length:,}")
        taken = np.repeat(kept, lengths) & (place < np.repeat(cut, lengths))
        yield make_columns(ids[taken], supervised[taken], cut[kept], lines[kept])
    if too_long and overlong == "error":
        hint = "Raise --max_length, or use --overlong truncate or --overlong drop"
        raise DataError("\n".join([*named, f"{too_long:,} rows. {hint}"]))
    if not left:
        raise DataError(f"{file}: no example is left with max_length {max_length:,}. Raise --max_length.")
    return Cut(truncated, dropped_overlong, dropped_unsupervised)


def _portions(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield the rows in groups. Groups of long rows are smaller, so that long rows do not fill the memory."""
    part, size = list[Row](), 0
    for row in rows:
        part.append(row)
        size += sum(len(turn.content) for turn in row.turns)
        if len(part) == ROWS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def describe(dataset: Dataset) -> Figures:
    """The figures of the kept examples."""
    lengths = dataset.lengths
    p50, p95, top = np.percentile(lengths, [50, 95, 100], method="higher") if len(dataset) else (0, 0, 0)
    percentiles = {"p50": int(p50), "p95": int(p95), "max": int(top)}
    return Figures(len(dataset), percentiles, int(lengths.sum()), int(dataset.counts.sum()))


def split(dataset: Dataset, val_size: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """(training part, evaluation part). The share val_size of the examples, at least one, is drawn with the seed."""
    if not val_size:
        return dataset, None
    held_out = max(1, round(len(dataset) * val_size))
    if held_out >= len(dataset):
        raise DataError(f"val_size {val_size} leaves no example to train on: the data has only {len(dataset)}.")
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.subset(np.sort(order[held_out:])), dataset.subset(np.sort(order[:held_out]))
