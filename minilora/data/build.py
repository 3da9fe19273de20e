"""The files of a run: read together, rendered, looked through for repeats, split, and mixed by their weights."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from minilora.config import TrainConfig
from minilora.data.cache import cached, is_large
from minilora.data.dataset import Dataset, describe, join, of_file, split, stack, tokenize, tokenized
from minilora.data.formats import Question, Row, question_of
from minilora.data.jsonl import file_sha256
from minilora.data.markup import ChatMarkup
from minilora.data.report import DataReport, Reading, Returned, put_together
from minilora.data.rows import read_rows, stream_rows
from minilora.data.sampler import Part
from minilora.errors import DataError, StorageError

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Source:
    """A file of a run. Of a large one only its hash is known before it is tokenised: `rows` and `reading` are None."""

    file: str
    sha256: str
    rows: list[Row] | None = None
    reading: Reading | None = None

    def rows_of(self, lines: Iterable[int]) -> Iterator[Row]:
        """The rows of these lines, in the order of the file, which is read no further than they are taken."""
        wanted = set(lines)
        rows = stream_rows(self.file, "skip") if self.rows is None else self.rows
        return (row for row in rows if row.line in wanted)


@dataclass(frozen=True)
class Sources:
    """The files of a run, read; `eval` is None where there is no eval_file."""

    train: list[Source]
    eval: Source | None

    @property
    def sha256(self) -> str:
        """What the files hold, as the identity of a run has it; their order counts."""
        hashes = [source.sha256 for source in self.train]
        train = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        return train + (self.eval.sha256 if self.eval else "")


@dataclass(frozen=True)
class Sets:
    """What a run trains on and is evaluated with.

    parts: how an epoch is mixed, empty where it takes each example once
    questions: the first `eval_samples` of the evaluation set
    reports: of all files, the training files first
    """

    train: Dataset
    eval: Dataset | None
    parts: tuple[Part, ...]
    questions: list[Question]
    reports: tuple[DataReport, ...] = ()


def read_sources(config: TrainConfig) -> Sources:
    """All files of a run. Raises DataError with the problems of all of them."""
    paths = [*config.train_files, *([config.eval_file] if config.eval_file else [])]

    def read_one(path: str) -> Source:
        if is_large(path):
            return Source(path, file_sha256(path))
        rows, reading = read_rows(path, config.on_bad_rows)
        return Source(path, reading.sha256, rows, reading)

    read = _for_all(paths, read_one)
    count = len(config.train_files)
    return Sources(read[:count], read[count] if config.eval_file else None)


def make_sets(config: TrainConfig, sources: Sources, markup: ChatMarkup, max_length: int) -> Sets:
    """The rows rendered, repeats counted (and left out of the training rows with `deduplicate`), split and mixed."""
    files = [*sources.train, *([sources.eval] if sources.eval else [])]
    rendered = _for_all(files, lambda source: to_examples(config, source, markup, max_length))
    count = len(sources.train)
    every = join([dataset for dataset, _ in rendered[:count]])
    first = first_of_repeats(every)
    unique = every.subset(np.flatnonzero(first)) if config.deduplicate and not first.all() else every
    train_set, eval_set = split(unique, config.val_size, config.seed)
    asked = sources.train
    if sources.eval is not None:
        eval_set, asked = rendered[-1][0], [sources.eval]
    repeats = np.bincount(every.sources[~first], minlength=count).tolist()
    shared = count_shared(train_set, eval_set, count) if eval_set is not None else [0] * count
    parts = parts_of(train_set, config.train_weights)
    with_part = [number for number in range(count) if parts and (train_set.sources == number).any()]
    part_of = dict(zip(with_part, parts, strict=True))

    reports = []
    for number, (_, report) in enumerate(rendered[:count]):
        notes = [] if config.deduplicate else repeat_notes(repeats[number])
        if repeats[number] and config.deduplicate:
            rest = unique.subset(np.flatnonzero(unique.sources == number))
            report = dataclasses.replace(report, dropped_repeats=repeats[number], **vars(describe(rest)))
        if found := shared[number]:
            notes.append(f"rows that the evaluation set holds too, to the token: {found:,}; its loss will flatter")
        if part := part_of.get(number):
            notes.append(f"an epoch takes {part.taken:,} of its {part.rows:,} rows, by its weight")
        reports.append(dataclasses.replace(report, notes=(*report.notes, *notes)))
    for dataset, report in rendered[count:]:
        notes = repeat_notes(int((~first_of_repeats(dataset)).sum()))
        reports.append(dataclasses.replace(report, notes=(*report.notes, *notes)))
    questions = first_questions(config, eval_set, asked, markup, max_length) if eval_set is not None else []
    return Sets(train_set, eval_set, parts, questions, tuple(reports))


def _for_all(items: Iterable[Item], make: Callable[[Item], Made]) -> list[Made]:
    """What `make` makes of each. Raises DataError with the problems of all of them."""
    made, problems = [], []
    for item in items:
        try:
            made.append(make(item))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return made


def to_examples(config: TrainConfig, source: Source, markup: ChatMarkup, max_length: int) -> tuple[Dataset, DataReport]:
    """Rows as the settings want them rendered, cut and masked."""
    settings = {name: getattr(config, name) for name in ("system_prompt", "overlong", "train_on_prompt")}
    settings["max_length"] = max_length
    if source.rows is not None and source.reading is not None:
        return tokenize(source.rows, markup, source.reading, **settings)
    try:
        return cached(source.file, source.sha256, markup, config.on_bad_rows, settings)
    except StorageError as error:
        advice = "Make room for a cache there, or elsewhere by XDG_CACHE_HOME"
        rows = Returned(stream_rows(source.file, config.on_bad_rows))
        parts = Returned(tokenized(rows, markup, source.file, **settings))
        dataset = of_file(source.file, stack(parts))
        note = f"tokenised in memory: {error.reason}. {advice}"
        return dataset, put_together(rows.result, parts.result, describe(dataset), note)


def first_of_repeats(dataset: Dataset) -> np.ndarray:
    """Whether each example is the first with its tokens and mask. (examples,)"""
    first = np.zeros(len(dataset), bool)
    first[np.unique(dataset.keys, return_index=True)[1]] = True
    return first


def repeat_notes(repeats: int) -> list[str]:
    """What the header says of repeats that stay in a file."""
    return [f"repeats of an earlier row, to the token: {repeats:,}"] if repeats else []


def count_shared(train_set: Dataset, eval_set: Dataset, files: int) -> list[int]:
    """How many rows of each training file the evaluation set holds too."""
    return np.bincount(train_set.sources[np.isin(train_set.keys, eval_set.keys)], minlength=files).tolist()


def parts_of(train_set: Dataset, weights: Sequence[float]) -> tuple[Part, ...]:
    """How an epoch is mixed of the examples of each file; empty where it takes each once."""
    if all(weight == 1 for weight in weights):
        return ()
    counts = np.bincount(train_set.sources, minlength=len(weights)).tolist()
    firsts = np.cumsum([0, *counts]).tolist()
    return tuple(
        Part(first, rows, max(1, round(rows * weight)))
        for first, rows, weight in zip(firsts, counts, weights, strict=False)
        if rows
    )


def first_questions(
    config: TrainConfig, eval_set: Dataset, sources: Sequence[Source], markup: ChatMarkup, max_length: int
) -> list[Question]:
    """The first `eval_samples` of the evaluation set that a user asks, and that leave room for an answer."""
    found: list[Question] = []
    for number, source in enumerate(sources if config.eval_samples else ()):
        for row in source.rows_of(eval_set.lines[eval_set.sources == number].tolist()):
            if len(found) == config.eval_samples:
                return found
            question = question_of(row)
            if question and len(markup.prompt_ids(question.turns, config.system_prompt)) < max_length:
                found.append(question)
    return found
