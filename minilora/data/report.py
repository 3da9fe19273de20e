"""Reports what happened to the rows of a file, and writes the lines of the header about it."""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

MAX_PROBLEMS_SHOWN = 50
Item = TypeVar("Item")
Result = TypeVar("Result")


class Returned(Generic[Item, Result]):
    """Iterates over a generator and keeps its return value: `result` is set after the last item."""

    result: Result

    def __init__(self, items: Generator[Item, None, Result]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Item]:
        self.result = yield from self._items


@dataclass(frozen=True)
class Reading:
    """The findings of reading a file (`rows.stream_rows`)."""

    file: str
    sha256: str
    format: str
    format_line: int
    rows: int
    bad: tuple[str, ...]
    unread: Counter[str]


@dataclass(frozen=True)
class Cut:
    """How many rows tokenising cut or dropped (`dataset.tokenized`)."""

    truncated: int
    dropped_overlong: int
    dropped_unsupervised: int


@dataclass(frozen=True)
class Figures:
    """The size of the examples that are kept (`dataset.describe`)."""

    kept: int
    lengths: dict[str, int]
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class DataReport:
    """What happened to the lines of a file: its Reading, Cut and Figures together.

    `build.make_sets` adds the repeats and the notes.
    """

    file: str
    sha256: str = ""
    format: str = ""
    format_line: int = 0  # the line that fixed the format
    rows: int = 0
    kept: int = 0
    bad: tuple[str, ...] = ()  # "file:line: reason"
    unread: Counter[str] = field(default_factory=Counter)  # rows that have a field which no format reads
    truncated: int = 0  # among the kept rows
    dropped_overlong: int = 0
    dropped_unsupervised: int = 0  # nothing left to learn after truncation
    dropped_repeats: int = 0  # with the same tokens as an earlier row
    lengths: dict[str, int] = field(default_factory=dict)  # p50, p95, max, in tokens
    tokens: int = 0
    supervised_tokens: int = 0
    notes: tuple[str, ...] = ()  # more lines of the header about the file


def put_together(reading: Reading, cut: Cut, figures: Figures, *notes: str) -> DataReport:
    """The report of a file after its examples are made."""
    return DataReport(**vars(reading), **vars(cut), **vars(figures), notes=notes)


def data_record(report: DataReport) -> dict[str, Any]:
    """A report for config.json. It has only the number of bad rows and of fields that are not read."""
    return vars(report) | {"bad": len(report.bad), "unread": len(report.unread)}


def describe_data(report: DataReport) -> Iterable[str]:
    """The lines of the header: how many rows of a file were kept, and why the others were dropped."""
    lost = {
        "bad": len(report.bad),
        "longer than max_length": report.dropped_overlong,
        "nothing supervised": report.dropped_unsupervised,
        "the same as an earlier one": report.dropped_repeats,
    }
    why = ", ".join(f"{count:,} {reason}" for reason, count in lost.items() if count)
    share = 100 * report.supervised_tokens / max(1, report.tokens)
    lengths = " / ".join(f"{report.lengths[key]:,}" for key in ("p50", "p95", "max"))
    yield f"{report.file}: {report.kept:,} of {report.rows:,} rows kept" + (f"; dropped: {why}" if why else "")
    yield f"tokens a row p50 / p95 / max: {lengths}; {share:.0f} % supervised" + (
        f"; {report.truncated:,} rows truncated" if report.truncated else ""
    )
    if report.unread:
        yield f"fields not read: {rows_by_name(report.unread)}"
    yield from report.notes


def rows_by_name(counts: Counter[str], most: int = 8) -> str:
    """The fields with the number of rows that have them, the most frequent first."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    shown = [
        f"{name[:40] if name.isprintable() else repr(name[:40])} ({counts[name]:,} row{'s' * (counts[name] > 1)})"
        for name in names[:most]
    ]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")
