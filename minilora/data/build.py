"""Builds the data sets of a run: reads and renders its files, finds repeats, splits, and mixes by weights."""

import dataclasses
import hashlib
import os
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
    """A file of a run. For a large file, `rows` and `reading` are None: only the hash is known before tokenising."""

    file: str
    sha256: str
    rows: list[Row] | None = None
    reading: Reading | None = None

    def rows_of(self, lines: Iterable[int]) -> Iterator[Row]:
        """The rows of these lines, in the order of the file. The file is read only as far as rows are taken."""
        wanted = set(lines)
        rows = stream_rows(self.file, "skip") if self.rows is None else self.rows
        return (row for row in rows if row.line in wanted)


@dataclass(frozen=True)
class Sources:
    """The files of a run after reading. `eval` is None if there is no eval_file."""

    train: list[Source]
    eval: Source | None

    @property
    def sha256(self) -> str:
        """The hash of the files' content for the identity of a run. It depends on their order."""
        hashes = [source.sha256 for source in self.train]
        train = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        return train + (self.eval.sha256 if self.eval else "")


@dataclass(frozen=True)
class Sets:
    """The training set and the evaluation set of a run.

    parts: how an epoch is mixed; empty if it takes each example once
    questions: the first `eval_samples` questions of the evaluation set
    reports: one for each file, the training files first
    """

    train: Dataset
    eval: Dataset | None
    parts: tuple[Part, ...]
    questions: list[Question]
    reports: tuple[DataReport, ...] = ()


def read_sources(config: TrainConfig) -> Sources:
    """Read all files of a run. Raises DataError with the problems of all files."""
    if config.train_files == (TrainConfig.train_file,) and not os.path.lexists(config.train_files[0]):
        raise DataError(
            f"there is no {config.train_file} in the current folder. This is the default of --train_file: give "
            "--train_file FILE, or start in the folder of minilora's clone."
        )
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
    """Render the rows, count repeats, split and mix. `deduplicate` leaves repeats out of the training rows."""
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
            notes.append(f"rows with the same tokens as a row of the evaluation set: {found:,}; its loss is too low")
        if part := part_of.get(number):
            notes.append(f"an epoch takes {part.taken:,} of its {part.rows:,} rows, because of its weight")
        reports.append(dataclasses.replace(report, notes=(*report.notes, *notes)))
    for dataset, report in rendered[count:]:
        notes = repeat_notes(int((~first_of_repeats(dataset)).sum()))
        reports.append(dataclasses.replace(report, notes=(*report.notes, *notes)))
    questions = first_questions(config, eval_set, asked, markup, max_length) if eval_set is not None else []
    return Sets(train_set, eval_set, parts, questions, tuple(reports))


def _for_all(items: Iterable[Item], make: Callable[[Item], Made]) -> list[Made]:
    """Apply `make` to each item. Raises DataError with the problems of all items."""
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
    """Render, cut and mask the rows of a file according to the settings."""
    settings = {name: getattr(config, name) for name in ("system_prompt", "overlong", "train_on_prompt")}
    settings["max_length"] = max_length
    if source.rows is not None and source.reading is not None:
        return tokenize(source.rows, markup, source.reading, **settings)
    try:
        return cached(source.file, source.sha256, markup, config.on_bad_rows, settings)
    except StorageError as error:
        advice = "Make room for the cache there, or set XDG_CACHE_HOME to another folder"
        rows = Returned(stream_rows(source.file, config.on_bad_rows))
        parts = Returned(tokenized(rows, markup, source.file, **settings))
        dataset = of_file(source.file, stack(parts))
        note = f"tokenised in memory: {error.reason}. {advice}"
        return dataset, put_together(rows.result, parts.result, describe(dataset), note)


def first_of_repeats(dataset: Dataset) -> np.ndarray:
    """Whether each example is the first one with its tokens and mask. (examples,)"""
    first = np.zeros(len(dataset), bool)
    first[np.unique(dataset.keys, return_index=True)[1]] = True
    return first


def repeat_notes(repeats: int) -> list[str]:
    """The line of the header about repeats that stay in the data."""
    return [f"rows with the same tokens as an earlier row: {repeats:,}"] if repeats else []


def count_shared(train_set: Dataset, eval_set: Dataset, files: int) -> list[int]:
    """How many rows of each training file are also in the evaluation set."""
    return np.bincount(train_set.sources[np.isin(train_set.keys, eval_set.keys)], minlength=files).tolist()


def parts_of(train_set: Dataset, weights: Sequence[float]) -> tuple[Part, ...]:
    """How an epoch mixes the examples of the files. Empty if it takes each example once."""
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
    """The first `eval_samples` questions of a user in the evaluation set that leave room for an answer."""
    found: list[Question] = []
    for number, source in enumerate(sources if config.eval_samples else ()):
        for row in source.rows_of(eval_set.lines[eval_set.sources == number].tolist()):
            if len(found) == config.eval_samples:
                return found
            question = question_of(row)
            if question and len(markup.prompt_ids(question.turns, config.system_prompt)) < max_length:
                found.append(question)
    return found
