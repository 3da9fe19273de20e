"""`minilora preview` shows rows as the model will see them, and statistics of their file. No weights are loaded."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters.format import find_base
from minilora.config import TrainConfig
from minilora.data.dataset import IGNORE, Dataset, tokenize
from minilora.data.formats import Row
from minilora.data.jsonl import MAX_LINE_BYTES
from minilora.data.markup import ChatMarkup
from minilora.data.report import DataReport, rows_by_name
from minilora.data.rows import read_rows
from minilora.models.load import load_tokenizer
from minilora.tools.inspect import token_text, visible
from minilora.training.setup import longest_allowed
from minilora.utils import files
from minilora.utils.html import Html, bar, colour, page, section, table, tag
from minilora.utils.terminal import say, style

MAX_BINS, BAR_COLUMNS, LINES_NAMED = 12, 40, 5
NO_LIMIT = MAX_LINE_BYTES  # tokens; a line has at most so many bytes, and a token has at least one byte
WIDTHS = tuple(step * power for power in (1, 10**3, 10**6) for step in (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500))


@dataclass(frozen=True)
class Shown:
    """A row as the model will see it.

    pieces: (kind, text), one for neighbouring tokens of a kind; kinds: learned, read, control (markup, also read), cut
    tokens: (text, id) of each token, including the tokens that are cut off
    """

    line: int
    kept: int  # tokens that the model gets; 0 if the row is dropped
    learned: int  # supervised tokens among them
    fate: str  # why the row is dropped or cut; empty if it is kept unchanged
    pieces: list[tuple[str, str]]
    tokens: list[tuple[str, int]]


@dataclass(frozen=True)
class Statistics:
    """The statistics of a file. Lists hold line numbers; a length is the tokens of a row before it is cut."""

    file: str
    format: str
    rows: int
    bad: tuple[str, ...]  # "file:line: reason"
    unread: Counter[str]  # field that no format reads -> rows that have it
    dropped: dict[str, list[int]]  # reason -> lines
    kept: int
    truncated: list[int]
    lengths: dict[str, float]  # min, median, mean, p95, max
    bins: list[tuple[int, int, int]]  # (shortest, longest, rows) of a histogram
    max_length: int
    tokens: int  # of the kept rows, after they were cut
    supervised_tokens: int
    not_ended: list[int]  # kept rows whose last supervised token is not the end token
    copies: list[tuple[int, int]]  # (line, earlier line with the same text)
    contradictions: list[tuple[int, int]]  # (line, earlier line with the same prompt and another answer)
    spelled: list[int]  # rows whose text spells a control token; it stays ordinary text


@dataclass(frozen=True)
class Preview:
    """Some rows as the model will see them, and the statistics of all rows."""

    rows: list[Shown]
    asked: int  # number of rows that were requested
    statistics: Statistics
    notes: list[str]


@dataclass(frozen=True)
class Material:
    """A file that was read: its examples without a length limit, and the examples that a run takes."""

    config: TrainConfig
    rows: list[Row]
    report: DataReport
    tokenizer: Any
    markup: ChatMarkup
    max_length: int
    whole: Dataset
    dataset: Dataset

    def why_dropped(self, length: int) -> str:
        """The reason why a run does not take a row of this many tokens."""
        if self.config.overlong == "drop" and length > self.max_length:
            return f"longer than max_length {self.max_length:,}"
        return f"nothing to learn is left within max_length {self.max_length:,}"


def preview(path: str, config: TrainConfig, num_rows: int, from_line: int) -> Preview:
    """Read a file with the settings of a run. It raises the errors that training would raise.

    Bad rows are the exception: they are left out and counted, so that the other rows can be shown.
    """
    notes: list[str] = []
    material = read(path, config, notes)
    selected = [row for row in material.rows if row.line >= from_line][:num_rows]
    return Preview([shown(material, row.line) for row in selected], num_rows, statistics(material), notes)


def read(path: str, config: TrainConfig, notes: list[str]) -> Material:
    """Read and tokenise a file. A note is added to `notes` where the model limits max_length."""
    rows, reading = read_rows(path, "skip")
    base_folder = find_base(config.model, config.adapter)
    tokenizer = load_tokenizer(base_folder)
    markup = ChatMarkup(tokenizer)
    longest = longest_allowed(config, base_folder, notes)
    settings: dict[str, Any] = {"system_prompt": config.system_prompt, "train_on_prompt": config.train_on_prompt}
    whole, _ = tokenize(rows, markup, reading, max_length=NO_LIMIT, overlong="truncate", **settings)
    dataset, report = tokenize(rows, markup, reading, max_length=longest, overlong=config.overlong, **settings)
    return Material(config, rows, report, tokenizer, markup, longest, whole, dataset)


def shown(material: Material, line: int) -> Shown:
    """The row of a line, as the model will see it."""
    tokenizer = material.tokenizer
    ids, supervised = of_line(material.whole, line)
    kept = len(of_line(material.dataset, line)[0])
    fate = ""
    if not kept:
        fate = f"dropped: {material.why_dropped(len(ids))}"
    elif kept < len(ids):
        fate = f"cut: {len(ids) - kept:,} of {len(ids):,} tokens are beyond max_length {material.max_length:,}"
    control = set(tokenizer.added_tokens_decoder)

    def kind(place: int) -> str:
        if place >= kept:
            return "cut"
        return "learned" if supervised[place] else "control" if ids[place] in control else "read"

    pieces = []
    for name, places in groupby(range(len(ids)), kind):
        pieces.append((name, tokenizer.decode([ids[place] for place in places], skip_special_tokens=False)))
    tokens = [(token_text(tokenizer, id), id) for id in ids]
    return Shown(line, kept, sum(supervised[:kept]), fate, pieces, tokens)


def of_line(dataset: Dataset, line: int) -> tuple[list[int], list[bool]]:
    """(ids, supervised) of the example from that line; empty if the line has none."""
    for place in np.flatnonzero(dataset.lines == line):
        example = dataset[place]
        return example.input_ids.tolist(), (example.labels != IGNORE).tolist()
    return [], []


# ---------------------------------------------------------------------------------------- statistics


def statistics(material: Material) -> Statistics:
    """Compute the statistics of a file."""
    whole, dataset = material.whole, material.dataset
    lengths, kept = whole.lengths, np.isin(whole.lines, dataset.lines)
    dropped: dict[str, list[int]] = {}
    for line, length in zip(whole.lines[~kept].tolist(), lengths[~kept].tolist(), strict=True):
        dropped.setdefault(material.why_dropped(length), []).append(line)
    copies, contradictions = repeats(material.rows)
    tokens = material.tokenizer.added_tokens_decoder.values()
    control_token = re.compile("|".join(re.escape(token.content) for token in tokens))
    return Statistics(
        file=material.report.file,
        format=material.report.format,
        rows=material.report.rows,
        bad=material.report.bad,
        unread=material.report.unread,
        dropped=dropped,
        kept=len(dataset),
        truncated=dataset.lines[dataset.lengths < lengths[kept]].tolist(),
        lengths={
            "min": int(lengths.min()),
            "median": int(np.percentile(lengths, 50, method="higher")),
            "mean": round(float(lengths.mean()), 1),
            "p95": int(np.percentile(lengths, 95, method="higher")),
            "max": int(lengths.max()),
        },
        bins=histogram(lengths),
        max_length=material.max_length,
        tokens=int(dataset.lengths.sum()),
        supervised_tokens=int(dataset.counts.sum()),
        not_ended=dataset.lines[~ended(dataset, material.markup)].tolist(),
        copies=copies,
        contradictions=contradictions,
        spelled=[row.line for row in material.rows if any(map(control_token.search, material.markup.texts(row.turns)))],
    )


def ended(dataset: Dataset, markup: ChatMarkup) -> np.ndarray:
    """Whether each example ends with a supervised end token; a line end after it is allowed. (rows,)"""
    labels = (example.labels for example in dataset)  # each has at least two tokens, and the last one is supervised
    return np.array([each[-2] if each[-1] in markup.newline else each[-1] for each in labels]) == markup.end


def repeats(rows: Iterable[Row]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Two lists of (line, earlier line): rows with the same text, and rows with the same prompt but another answer."""
    copies, contradictions = [], []
    first: dict[Any, int] = {}
    first_of_prompt: dict[Any, int] = {}
    for row in rows:
        earlier = first.setdefault(row.turns, row.line)
        if earlier != row.line:
            copies.append((row.line, earlier))
            continue
        earlier = first_of_prompt.setdefault(row.turns[:-1], row.line)
        if earlier != row.line:
            contradictions.append((row.line, earlier))
    return copies, contradictions


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, rows) of at most MAX_BINS bins of a round width; the last bin also takes the outliers."""
    low, most = int(lengths.min()), int(np.percentile(lengths, 99, method="higher"))
    width = next(width for width in WIDTHS if most // width - low // width < MAX_BINS)
    first, last = low // width, most // width
    counts = np.bincount(np.minimum(lengths // width, last) - first, minlength=last - first + 1).tolist()
    bins = [((first + i) * width, (first + i + 1) * width - 1, count) for i, count in enumerate(counts)]
    bins[-1] = (bins[-1][0], max(bins[-1][1], int(lengths.max())), bins[-1][2])
    return bins


# ---------------------------------------------------------------------------------------- the output


def show(found: Preview) -> None:
    """Print a preview: the rows, then the statistics."""
    for note in found.notes:
        say("note", note)
    plain = style("x", "32") == "x"
    marking = "stands between ⟦ ⟧" if plain else f"is {style('green', '32')}, markup {style('cyan', '36')}"
    say("preview", f"supervised text {marking}; the model only reads the other text")
    for row in found.rows:
        say(f"line {row.line}", in_words(row))
        print(as_text(row), end="\n\n", flush=True)
    if found.asked and not found.rows:
        say("", "there is no row at or after that line")
    for label, text in facts(found.statistics):
        say(label, visible(text))
    largest = max(count for _, _, count in found.statistics.bins)
    for i, (shortest, longest, count) in enumerate(found.statistics.bins):
        blocks = "█" * -(-count * BAR_COLUMNS // largest)
        beyond = "  all beyond max_length" if shortest > found.statistics.max_length else ""
        say("" if i else "lengths", f"{shortest:>6,} - {longest:>6,}  {blocks:<{BAR_COLUMNS}} {count:,}{beyond}")


def in_words(row: Shown) -> str:
    """The number of tokens of a row, and why it is dropped or cut."""
    return f"{row.kept:,} tokens, {row.learned:,} of them learned" + (f"; {row.fate}" if row.fate else "")


def as_text(row: Shown) -> str:
    """A row as text for the terminal; without colours, the supervised text stands between brackets."""
    text = ""
    for kind, part in row.pieces:
        if kind == "cut":
            text += style(f" ✂ {row.fate}", "33")
            break
        lines = [visible(line) for line in part.split("\n")]  # a row may hold terminal control codes
        code = {"learned": "32", "control": "36", "read": ""}[kind]
        coloured = "\n".join(style(line, code) if code and line else line for line in lines)
        text += f"⟦{coloured}⟧" if kind == "learned" and coloured == "\n".join(lines) else coloured
    return text.rstrip("\n")


def facts(found: Statistics) -> Iterator[tuple[str, str]]:
    """(label, text) of each line of the statistics."""
    yield "file", f"{found.file}: {found.rows:,} rows of {found.format}, {found.kept:,} kept"
    for line in found.bad[:LINES_NAMED]:
        yield "  bad", line
    if found.bad:
        yield "  bad", f"{len(found.bad):,} in total; training refuses the file unless --on_bad_rows is skip"
    if found.unread:
        yield "  unread", f"fields not read: {rows_by_name(found.unread)}"
    for why, lines in found.dropped.items():
        yield "  dropped", f"{_rows(lines)}: {why}"
    lengths = " / ".join(f"{found.lengths[key]:,}" for key in ("min", "median", "mean", "p95", "max"))
    yield "tokens", f"per row, min / median / mean / p95 / max: {lengths}"
    if found.truncated:
        yield "  cut", f"{_rows(found.truncated)} to max_length {found.max_length:,}"
    share = 100 * found.supervised_tokens / found.tokens
    yield "learned", f"{found.supervised_tokens:,} of {found.tokens:,} tokens, {share:.0f} %"
    never = f"; {_rows(found.not_ended)} without it do not teach the model to stop" if found.not_ended else ""
    yield (
        "end token",
        f"{found.kept - len(found.not_ended):,} of {found.kept:,} rows end with a learned end token{never}",
    )
    copies = [line for line, _ in found.copies]
    yield "duplicates", f"{_rows(copies)} with the text of an earlier row: {_pairs(found.copies)}" if copies else "none"
    if found.contradictions:
        lines = [line for line, _ in found.contradictions]
        yield "", f"{_rows(lines)} with the prompt of an earlier row and another answer: {_pairs(found.contradictions)}"
    if found.spelled:
        yield "markup", f"{_rows(found.spelled)} with text that spells a control token; it stays ordinary text"


def _rows(lines: Sequence[int]) -> str:
    named = ", ".join(map(str, lines[:LINES_NAMED])) + (", ..." if len(lines) > LINES_NAMED else "")
    return f"{len(lines):,} row{'s' * (len(lines) != 1)} (line{'s' * (len(lines) != 1)} {named})"


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(f"{line} as {earlier}" for line, earlier in pairs[:LINES_NAMED])
    return named + (", ..." if len(pairs) > LINES_NAMED else "")


def save_page(found: Preview, path: Path) -> None:
    """Write the preview as an HTML page."""
    files.replace_file(path, [as_page(found).encode()])


def as_page(found: Preview) -> Html:
    """The preview as HTML."""
    stats = found.statistics
    largest = max(count for _, _, count in stats.bins)
    bins = [
        (f"{shortest:,} to {longest:,}", f"{count:,}", bar(count / largest, int(shortest > stats.max_length)))
        for shortest, longest, count in stats.bins
    ]
    kinds = (("mark", "learned", ""), ("span", "only read", ""), ("span", "markup", "control"), ("span", "cut", "cut"))
    legend = tag("p", *(tag("span", tag(name, text, class_=kind), " ") for name, text, kind in kinds))
    beyond = tag("span", "■ ", class_=colour(1)), f"all beyond max_length {stats.max_length:,}"
    head = ("tokens per row", "rows", tag("span", *beyond) if stats.bins[-1][0] > stats.max_length else "")
    return page(
        f"Rows of {stats.file}",
        *(tag("p", note) for note in found.notes),
        section("The file", table((), facts(stats))),
        section("Lengths", table(head, bins, numbers=(0, 1))),
        section("Rows as the model sees them", legend, *map(_row_as_html, found.rows)),
    )


def _row_as_html(row: Shown) -> Html:
    text = [tag("mark" if kind == "learned" else "span", part, class_=kind) for kind, part in row.pieces]
    single = [tag("span", visible(part), " ", tag("small", id)) for part, id in row.tokens]
    details = tag("details", tag("summary", "token by token, with ids"), tag("p", *single, class_="chips"))
    head = tag("p", f"line {row.line}: {in_words(row)}", class_="soft")
    return tag("div", head, tag("pre", *text), details, class_="card row")
