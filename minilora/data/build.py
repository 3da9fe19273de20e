"""The files of a run: read together, rendered, looked through for repeats, split, and mixed by their weights."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from minilora.config import TrainConfig
from minilora.data.cache import cached, is_large
from minilora.data.dataset import Dataset, join, split, tokenize
from minilora.data.dataset import describe as count_again
from minilora.data.formats import Question, Row, question_of
from minilora.data.jsonl import file_sha256
from minilora.data.markup import ChatMarkup
from minilora.data.report import DataReport
from minilora.data.rows import read_rows, stream_rows
from minilora.data.sampler import Part
from minilora.errors import DataError, StorageError

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Source:
    """A file's rows, and what happened to its lines; of a large file only its hash is known before it is tokenised."""

    rows: list[Row] | None
    report: DataReport

    def rows_of(self, lines: Iterable[int]) -> Iterator[Row]:
        """The rows of these lines, in the order of the file, which is read no further than they are taken."""
        wanted = set(lines)
        rows = stream_rows(DataReport(self.report.file), "skip") if self.rows is None else self.rows
        return (row for row in rows if row.line in wanted)


@dataclass(frozen=True)
class Sources:
    """The files of a run, read; `eval` is None where there is no eval_file."""

    train: list[Source]
    eval: Source | None

    @property
    def reports(self) -> list[DataReport]:
        """Those of all files, the training files first."""
        return [source.report for source in (*self.train, *([self.eval] if self.eval else []))]

    @property
    def sha256(self) -> str:
        """What the files hold, as the identity of a run has it; their order counts."""
        hashes = [source.report.sha256 for source in self.train]
        train = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        return train + (self.eval.report.sha256 if self.eval else "")


@dataclass(frozen=True)
class Sets:
    """What a run trains on and is evaluated with.

    parts: how an epoch is mixed, empty where it takes each example once
    questions: the first `eval_samples` of the evaluation set
    """

    train: Dataset
    eval: Dataset | None
    parts: tuple[Part, ...]
    questions: list[Question]


def read_sources(config: TrainConfig) -> Sources:
    """All files of a run. Raises DataError with the problems of all of them."""
    paths = [*config.train_files, *([config.eval_file] if config.eval_file else [])]

    def read_one(path: str) -> Source:
        if is_large(path):
            return Source(None, DataReport(path, sha256=file_sha256(path)))
        return Source(*read_rows(path, config.on_bad_rows))

    read = _for_all(paths, read_one)
    count = len(config.train_files)
    return Sources(read[:count], read[count] if config.eval_file else None)


def make_sets(config: TrainConfig, sources: Sources, markup: ChatMarkup, max_length: int) -> Sets:
    """The rows rendered, repeats counted (and left out of the training rows with `deduplicate`), split and mixed.

    The reports of `sources` get what was found.
    """
    reports = [source.report for source in sources.train]
    every = [*sources.train, *([sources.eval] if sources.eval else [])]
    rendered = _for_all(every, lambda source: to_examples(config, source, markup, max_length))
    train_set = without_repeats(join(rendered[: len(sources.train)]), reports, remove=config.deduplicate)
    train_set, eval_set = split(train_set, config.val_size, config.seed)
    asked = sources.train
    if sources.eval is not None:
        eval_set, asked = rendered[-1], [sources.eval]
        without_repeats(eval_set, [sources.eval.report], remove=False)
    if eval_set is not None:
        note_overlap(train_set, eval_set, reports)
    parts = parts_of(train_set, config.train_weights)
    taken = [report for number, report in enumerate(reports) if parts and (train_set.sources == number).any()]
    for part, report in zip(parts, taken, strict=True):
        report.notes.append(f"an epoch takes {part.taken:,} of its {part.rows:,} rows, by its weight")
    questions = first_questions(config, eval_set, asked, markup, max_length) if eval_set is not None else []
    return Sets(train_set, eval_set, parts, questions)


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


def to_examples(config: TrainConfig, source: Source, markup: ChatMarkup, max_length: int) -> Dataset:
    """Rows as the settings want them rendered, cut and masked."""
    how = {name: getattr(config, name) for name in ("system_prompt", "overlong", "train_on_prompt")}
    how["max_length"] = max_length
    if source.rows is not None:
        return tokenize(source.rows, markup, source.report, **how)
    report = source.report
    fresh = DataReport(report.file, sha256=report.sha256)
    try:
        return cached(report, markup, config.on_bad_rows, how)
    except StorageError as error:
        vars(report).update(vars(fresh))
        why = str(error).split(". What was saved")[0]
        report.notes.append(f"tokenised in memory: {why}. Make room for a cache there, or elsewhere by XDG_CACHE_HOME")
        return tokenize(stream_rows(report, config.on_bad_rows), markup, report, **how)


def without_repeats(dataset: Dataset, reports: Sequence[DataReport], remove: bool) -> Dataset:
    """The examples, without those that repeat an earlier one to the token where they are to be removed.

    The reports of the files get the numbers, each of the repeats that stand in it.
    """
    repeats = np.ones(len(dataset), bool)
    repeats[np.unique(dataset.keys, return_index=True)[1]] = False
    if not repeats.any():
        return dataset
    rest = dataset.subset(np.flatnonzero(~repeats)) if remove else dataset
    for number, report in enumerate(reports):
        found = int((repeats & (dataset.sources == number)).sum())
        if remove:
            report.dropped_repeats = found
            count_again(rest.subset(np.flatnonzero(rest.sources == number)), report)
        elif found:
            report.notes.append(f"repeats of an earlier row, to the token: {found:,}")
    return rest


def note_overlap(train_set: Dataset, eval_set: Dataset, reports: Sequence[DataReport]) -> None:
    """Say in the reports of the training files how many of their rows the evaluation set holds too."""
    shared = np.isin(train_set.keys, eval_set.keys)
    for number, report in enumerate(reports):
        if found := int((shared & (train_set.sources == number)).sum()):
            report.notes.append(
                f"rows that the evaluation set holds too, to the token: {found:,}; its loss will flatter"
            )


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
