"""A file of prompts in, the same rows with their answers out."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.data.formats import Turn, to_turns
from minilora.data.jsonl import parse_line, read_lines
from minilora.data.report import MAX_PROBLEMS_SHOWN
from minilora.data.whole_file import whole_file_mistake
from minilora.errors import DataError, StoppedError, StorageError
from minilora.inference.generate import ChatModel, Sampling, answer_all, prompt_ids
from minilora.lora import lora_layers
from minilora.models.fingerprint import fingerprint
from minilora.utils import files

ANSWER = "answer"  # the field that is added to a row
KEY = r"[0-9a-f]{64}"  # the first line of a file of partial answers


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


def holds_answers(path: Path) -> bool:
    """Whether each row of a JSONL file has an answer, as in a file that `write_answers` wrote."""
    try:
        return all(ANSWER in parse_line(line) for _, line in read_lines(path))
    except ValueError:  # DataError included
        return False


class PartialAnswers:
    """The answers of an unfinished file, appended as they come, so that a killed command loses none of them.

    They stand in OUTPUT.partial. Its first line is the key of the work: rows, sampling, system prompt and model. Each
    further line is [place of the row, answer]. A line cut short does not count. Raises StorageError for a file that
    holds anything else, or answers of other work.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        lines = self._lines()
        self.answers: dict[int, str] = {line[0]: line[1] for line in lines[1:] if _is_answer(line)}
        if lines and not (isinstance(lines[0], str) and re.fullmatch(KEY, lines[0])):
            raise StorageError(f"{self.path} is no file of answers from here: move it, or give another --output_file")
        if self.answers and lines[0] != key:
            raise StorageError(
                f"{self.path} keeps answers ({len(self.answers):,}) to other rows, or with other settings or another "
                f"model. Give those again to continue, or another --output_file, or delete {self.path}."
            )
        kept = [json.dumps(line) + "\n" for line in (key, *self.answers.items())]
        files.replace_file(self.path, [line.encode() for line in kept])

    def _lines(self) -> list[Any]:
        """The JSON value of each whole line, None for a line that holds none. Raises StorageError."""
        found = []
        with files.storage_errors(self.path), suppress(FileNotFoundError):
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    found.append(json.loads(line) if line.endswith(b"\n") else None)
                except (ValueError, RecursionError):
                    found.append(None)
        return found

    def add(self, place: int, text: str) -> None:
        """Append one answer and force it to the disk."""
        with files.storage_errors(self.path), open(self.path, "ab") as file:
            file.write((json.dumps([place, text]) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.answers[place] = text


def _is_answer(line: Any) -> bool:
    return isinstance(line, list) and [type(part) for part in line] == [int, str]


def gzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks as the content of a .gz file."""
    packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with the header of gzip
    for chunk in chunks:
        yield packer.compress(chunk)
    yield packer.flush()


def key_of(chat_model: ChatModel, questions: Sequence[PromptRow], sampling: Sampling) -> str:
    """A hash of everything that the answers to these rows depend on."""
    digest = hashlib.sha256()
    for part in ([row.text for row in questions], dataclasses.asdict(sampling), chat_model.system_prompt):
        digest.update(json.dumps(part).encode())
    dtype = next(chat_model.model.parameters()).dtype
    digest.update(f"{fingerprint(chat_model.model)} {dtype} {chat_model.markup.sha256}".encode())
    for name, layer in lora_layers(chat_model.model).items():
        digest.update(f"{name} {layer.scale} {layer.enabled}".encode())
        for param in layer.parameters(recurse=False):
            digest.update(param.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_answers(
    chat_model: ChatModel, questions: Sequence[PromptRow], output: Path, sampling: Sampling, batch_size: int
) -> None:
    """Answer the questions, then write each row with its answer, in their order, to a file that appears at once.

    Answers are kept in OUTPUT.partial as they come. The same command goes on where an earlier one stopped.
    """
    for question in questions:
        try:
            prompt_ids(chat_model, question.turns, sampling)
        except DataError as error:
            raise DataError(f"line {question.line}: {error}") from error
    partial = PartialAnswers(output, key_of(chat_model, questions, sampling))
    if partial.answers:
        print(f"{partial.path}: {len(partial.answers):,} of {len(questions):,} rows are answered", file=sys.stderr)
    places = [place for place in range(len(questions)) if place not in partial.answers]
    turns = [questions[place].turns for place in places]
    try:
        answer_all(
            chat_model, turns, sampling, batch_size, "answers", lambda number, text: partial.add(places[number], text)
        )
    except KeyboardInterrupt as error:
        kept = f"{len(partial.answers):,} of {len(questions):,} answers are kept in {partial.path}"
        raise StoppedError(f"interrupted; {kept}. The same command continues.", signal.SIGINT) from error

    def lines() -> Iterator[bytes]:
        for place, question in enumerate(questions):  # the row as it was written, digit for digit
            added = json.dumps({ANSWER: partial.answers[place]}, ensure_ascii=False)
            yield f"{question.text[:-1].rstrip()}, {added[1:]}\n".encode()

    files.replace_file(output, gzipped(lines()) if output.suffix == ".gz" else lines())
    partial.path.unlink(missing_ok=True)
