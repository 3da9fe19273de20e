"""A file of prompts in, the same rows with their answers out."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.data.formats import Turn, to_turns
from minilora.data.jsonl import parse_line, read_lines
from minilora.data.report import MAX_PROBLEMS_SHOWN
from minilora.data.whole_file import whole_file_mistake
from minilora.errors import DataError, StorageError
from minilora.inference.generate import ChatModel, Sampling, answer_all, prompt_ids
from minilora.utils import files

ANSWER = "answer"  # the field that is added to a row


@dataclass(frozen=True)
class PromptRow:
    """A line of a file: its 1-based number, its text as it stands there, and the conversation to be answered."""

    line: int
    text: str
    turns: tuple[Turn, ...]


def read_questions(path: Path) -> list[PromptRow]:
    """The conversations of a JSONL file: rows of the training formats, whose answers may be missing.

    Raises DataError that lists every bad line with its number and reason.
    """
    questions, bad = [], []
    for number, line in read_lines(path):
        try:
            row = parse_line(line)
            if ANSWER in row:
                raise ValueError(f"there is already a field {ANSWER!r}, which would be overwritten")
            questions.append(PromptRow(number, line.decode("utf-8").strip(), to_question(row)))
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
    if mistake := whole_file_mistake(str(path), len(bad), len(questions)):
        raise DataError(mistake)
    if bad:
        more = [f"... and {len(bad) - MAX_PROBLEMS_SHOWN:,} more"] if len(bad) > MAX_PROBLEMS_SHOWN else []
        total = len(bad) + len(questions)
        raise DataError("\n".join([*bad[:MAX_PROBLEMS_SHOWN], *more, f"{len(bad):,} of {total:,} rows are bad."]))
    if not questions:
        raise DataError(f"{path}: nothing to answer: it holds no rows.")
    return questions


def to_question(row: dict[str, Any]) -> tuple[Turn, ...]:
    """A row's conversation up to its last answer, which is left out. Raises ValueError when there is no such thing."""
    stand_in = "-"  # the formats need an answer, a question may lack it
    if "messages" in row:
        messages = row["messages"]
        if isinstance(messages, list):
            answered = bool(messages) and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
            messages = [*messages[: len(messages) - answered], {"role": "assistant", "content": stand_in}]
        turns = to_turns(row | {"messages": messages}, "messages")[:-1]
        if not turns or turns[-1].role != "user":
            raise ValueError("the last turn before the answer must be the user's")
        return turns
    for asked, replied in (("prompt", "completion"), ("instruction", "output")):
        if asked in row:
            return to_turns(row | {replied: stand_in}, f"{asked}/{replied}")[:-1]
    raise ValueError(f"the fields are {', '.join(map(repr, row)) or 'none'}; needed is messages, prompt or instruction")


def check_output(source: Path, output: Path) -> None:
    """Raise StorageError when the answers to `source` could not be written to `output`: hours before it is tried."""
    if output.exists() and (not output.is_file() or output.samefile(source)):
        raise StorageError(f"{output} is {'the input itself' if output.is_file() else 'no file'}: give another file")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise StorageError(f"{output.parent} is no folder that can be written to")


def write_answers(
    chat_model: ChatModel, questions: Sequence[PromptRow], output: Path, sampling: Sampling, batch_size: int
) -> None:
    """Answer all questions; then write each line with its answer, in their order, to a file that appears at once."""
    for question in questions:
        try:
            prompt_ids(chat_model, question.turns, sampling)
        except DataError as error:
            raise DataError(f"line {question.line}: {error}") from error
    answers = answer_all(chat_model, [question.turns for question in questions], sampling, batch_size, "answers")

    def lines() -> Iterator[bytes]:
        for question, text in zip(questions, answers, strict=True):  # the row as it was written, to the digit
            added = json.dumps({ANSWER: text}, ensure_ascii=False)
            yield f"{question.text[:-1].rstrip()}, {added[1:]}\n".encode()

    files.replace_file(output, lines())
