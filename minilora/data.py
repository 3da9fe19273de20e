"""JSONL rows become conversations, and these token ids: what is supervised is known, because we write the markup."""

import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from minilora.errors import DataError

IGNORE = -100  # PyTorch's ignore_index: positions with this label have no loss
MAX_LINE_BYTES = 16 * 2**20
MAX_PROBLEMS_SHOWN = 50
ROLES = ("system", "user", "assistant")
FORMATS: dict[str, tuple[str, ...]] = {  # a file's rows all have the fields of one of these
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"instruction/output": ("input",)}  # read where they are; `system` everywhere
UTF16 = {  # how a file in one of these encodings begins: by its byte order mark, or an opening bracket
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
    "UTF-16LE": (b"{\0", b"[\0"),
    "UTF-16BE": (b"\0{", b"\0["),
}


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: who speaks and what is said."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One line of a file as a conversation, with the 1-based number of the line it came from."""

    line: int
    turns: tuple[Turn, ...]


class Question(NamedTuple):
    """A conversation up to the last answer of a row, and that answer."""

    turns: tuple[Turn, ...]
    reference: str


@dataclass(frozen=True)
class Example:
    """One training example.

    input_ids: (T,) int32, the whole conversation up to its last supervised token
    labels: (T,) int32, the token itself where it is supervised, else IGNORE (not shifted)
    """

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass
class DataReport:
    """What happened to the lines of a file on their way to examples."""

    file: str
    sha256: str = ""
    format: str = ""
    format_line: int = 0  # the line that fixed the format
    rows: int = 0
    kept: int = 0
    bad: list[str] = field(default_factory=list)  # "file:line: reason"
    unread: Counter[str] = field(default_factory=Counter)  # rows that have a field which no format reads
    truncated: int = 0  # of those kept
    dropped_overlong: int = 0
    dropped_unsupervised: int = 0  # nothing left to learn after truncation
    dropped_repeats: int = 0  # the same as an earlier one, to the token
    lengths: dict[str, int] = field(default_factory=dict)  # p50, p95, max, in tokens
    tokens: int = 0
    supervised_tokens: int = 0
    notes: list[str] = field(default_factory=list)  # what else is to be said of it


# ---------------------------------------------------------------------------------------- bytes -> rows


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The non-empty lines of a file (or of what a .gz holds) with their 1-based numbers, split on \\n only.

    JSON strings may hold U+2028, U+0085 and other characters that text-mode reading would split on. Of a line longer
    than MAX_LINE_BYTES only one byte more than that is kept: a file without line ends must not fill the memory.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a FIFO would block for ever, a directory says something unhelpful
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise DataError(f"{path} is {kind}; a JSONL file is needed, one JSON object a line.")
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as file:
            for number in itertools.count(1):
                line = rest = file.readline(MAX_LINE_BYTES + 1)
                while len(line) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
                    rest = file.readline(2**20)
                if not line:
                    return
                if number == 1 and len(line) <= MAX_LINE_BYTES:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        hint = "Copy it again if it is cut or damaged; if it is not packed, its name must not end in .gz."
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}. {hint}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal. Raises DataError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def parse_line(line: bytes) -> dict[str, Any]:
    """One line of JSON as an object. Raises ValueError with the reason, for anything that is not exactly that."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has more than {MAX_LINE_BYTES:,} bytes, which are the most that is read")
    try:
        text = line.decode("utf-8").rstrip("\r\n")  # the column of an error counts from the line
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})") from error
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON value: {error.msg} (column {error.colno})") from error
    except RecursionError:
        raise ValueError("not readable JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, this is {_json_type(row)}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def detect_format(row: dict[str, Any]) -> str:
    """The format whose fields this row has. Raises ValueError when it has those of none."""
    for name, needed in FORMATS.items():
        if all(key in row for key in needed):
            return name
    possible = "; ".join(" + ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"the fields are {', '.join(map(repr, row)) or 'none'}; needed are {possible}")


def to_turns(row: dict[str, Any], format: str) -> tuple[Turn, ...]:
    """A row's conversation. Raises ValueError with the reason when it is not one."""
    system = _text(row, "system", optional=True)
    if format == "messages":
        turns = list(_messages(row["messages"]) if "messages" in row else _missing("messages"))
        if system and turns[0].role == "system":
            raise ValueError("both a 'system' field and a system message: give one")
    elif format == "prompt/completion":
        turns = [Turn("user", _text(row, "prompt")), Turn("assistant", _text(row, "completion"))]
    else:
        asked, extra = _text(row, "instruction"), _text(row, "input", optional=True)
        turns = [Turn("user", f"{asked}\n{extra}" if extra else asked), Turn("assistant", _text(row, "output"))]
    return (Turn("system", system), *turns) if system else tuple(turns)


def _text(row: dict[str, Any], key: str, optional: bool = False) -> str:
    value = row.get(key)
    if optional and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    if key not in row:
        _missing(key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, this is {_json_type(value)}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is no character") from None
    return value


def _missing(key: str) -> Any:
    raise ValueError(f"the field {key!r} is missing")


def _messages(messages: Any) -> Iterator[Turn]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list of turns, this is {_json_type(messages) if messages else 'empty'}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} must be an object, this is {_json_type(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; possible are {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise ValueError(f"message {number} is a system turn; only the first may be one")
        try:
            yield Turn(role, _text(message, "content"))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant turn: there is nothing to learn")


def read_rows(path: str | Path, on_bad_rows: str = "error") -> tuple[list[Row], DataReport]:
    """All rows of a JSONL file, and what happened to its lines. Raises what `stream_rows` raises."""
    report = DataReport(str(path))
    return list(stream_rows(report, on_bad_rows)), report


def stream_rows(report: DataReport, on_bad_rows: str) -> Iterator[Row]:
    """The rows of the JSONL file `report.file`, one after the other. Its format is that of its first readable row.

    When all are read, raises DataError that lists every bad line with its number and reason (or, with on_bad_rows =
    skip, only when there was no good row).
    """
    path, good, first = report.file, 0, b""
    for number, line in read_lines(path):
        report.rows += 1
        first = first or line
        try:
            row = _row(number, parse_line(line), report)
        except ValueError as error:
            report.bad.append(f"{path}:{number}: {error}")
        else:
            good += 1
            yield row
    if len(report.bad) > good and (mistake := _whole_file_mistake(report, first)):
        raise DataError(mistake)
    if report.bad and on_bad_rows == "error":
        shown = report.bad[:MAX_PROBLEMS_SHOWN]
        more = [f"... and {len(report.bad) - len(shown):,} more"] if len(report.bad) > len(shown) else []
        hint = f"{len(report.bad):,} of {report.rows:,} rows are bad. Mend them, or leave them out: --on_bad_rows skip"
        hint = hint if good else f"all {report.rows:,} rows are bad. Mend them."
        raise DataError("\n".join([*shown, *more, hint]))
    if not good:
        why = f"all {report.rows:,} rows are bad, the first: {report.bad[0]}" if report.bad else "it holds no rows"
        raise DataError(f"{path}: nothing to read: {why}.")
    report.sha256 = file_sha256(path)


def _row(number: int, row: dict[str, Any], report: DataReport) -> Row:
    """A row in the file's format, which its first readable row fixes; counts the fields that are not read."""
    if not report.format:
        report.format, report.format_line = detect_format(row), number
    known = FORMATS[report.format]
    try:
        turns = to_turns(row, report.format)
    except ValueError as error:
        others = [name for name, needed in FORMATS.items() if all(key in row for key in needed)]
        if not others or all(key in row for key in known):
            raise
        fixed = f"line {report.format_line} made this a file of {report.format}, this row is of {others[0]}"
        raise ValueError(f"{error}: {fixed}") from None
    unread = row.keys() - {"system", *known, *OPTIONAL.get(report.format, ())}
    for message in row["messages"] if report.format == "messages" else ():
        unread |= {f"messages: {key}" for key in message.keys() - {"role", "content"}}
    report.unread.update(unread)
    return Row(number, turns)


def _whole_file_mistake(report: DataReport, first: bytes) -> str:
    """What is wrong with a file most of whose rows are bad, and a command that mends it; empty for lines of their own.

    first: its first line, the only one that tells an array, a table or UTF-16 from a file of bad rows.
    """
    path, text = report.file, first.strip()
    unpack = f"gunzip -k {shlex.quote(path)} && " if path.endswith(".gz") else ""
    mend = f"{shlex.quote(path.removesuffix('.gz'))} > new.jsonl converts it"
    for name, starts in UTF16.items():
        if first.startswith(starts):
            return f"{path}: this is {name}, UTF-8 is needed: {unpack}iconv -f {name} -t UTF-8 {mend}"
    not_utf8 = sum(": not UTF-8 (" in reason for reason in report.bad)
    encoding = "gb18030" if 2 * not_utf8 > len(report.bad) else "utf-8-sig"
    opened = f'open(sys.argv[1], newline="", encoding="{encoding}")'
    script = "import csv, json, sys; [print(json.dumps(row)) for row in %s]"
    if re.match(rb"\[\s*(\{|$)", text):
        command = "python -c " + shlex.quote(script % f"json.load({opened})")
        return f"{path}: this is a JSON array, one object a line is needed: {unpack}{command} {mend}"
    columns = [name.strip(b" \"'").decode(errors="replace") for name in re.split(rb"[,;\t]", text)]
    if {key for needed in FORMATS.values() for key in needed} & set(columns):
        delimiter = next(mark for mark in "\t;," if mark.encode() in text or mark == ",")
        command = "python -c " + shlex.quote(script % f"csv.DictReader({opened}, delimiter={delimiter!r})")
        return f"{path}: this is a table (CSV), one JSON object a line is needed: {unpack}{command} {mend}"
    if text == b"{":
        return f"{path}: its objects take several lines each, one object a line is needed: {unpack}jq -c . {mend}"
    if encoding == "gb18030":
        return f"{report.bad[0]}; UTF-8 is needed. Where the file is GBK: {unpack}iconv -f GB18030 -t UTF-8 {mend}"
    return ""


def question_of(row: Row) -> Question | None:
    """What a row asks last and the answer to it; None where nobody asks."""
    last = max(i for i, turn in enumerate(row.turns) if turn.role == "assistant")
    if last == 0 or row.turns[last - 1].role != "user":
        return None
    return Question(row.turns[:last], row.turns[last].content)


# ---------------------------------------------------------------------------------------- rows -> tokens


class HasTokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer here."""

    chat_template: Any
    backend_tokenizer: Any


class ChatMarkup:
    """Writes conversations as ChatML token ids (the markup of Qwen2, Qwen2.5 and Qwen3), turn by turn.

    Control tokens are placed by id; all text is encoded by a copy of the tokenizer that knows no control tokens, so
    nothing a user writes can become one. Source of the format: the chat_template of the Qwen tokenizers, which the
    tests compare with.
    """

    def __init__(self, tokenizer: HasTokenizer) -> None:
        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain["added_tokens"], plain["truncation"], plain["padding"] = [], None, None
        text = json.dumps(plain, ensure_ascii=False)
        self._plain = Tokenizer.from_str(text)
        known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        if missing := [token for token in ("<|im_start|>", "<|im_end|>") if token not in known]:
            raise DataError(f"the tokenizer has no {' or '.join(missing)}: it is not a ChatML (Qwen) tokenizer.")
        self.start, self.end = known["<|im_start|>"], known["<|im_end|>"]
        self.newline = self.encode(["\n"])[0]
        self.openings = {role: [self.start, *self.encode([f"{role}\n"])[0]] for role in ROLES}
        self._markup = {
            "turn": Piece([self.start]),
            "answer": Piece(self.openings["assistant"]),
            "end of answer": Piece([self.end], supervised=True),
            "end of turn": Piece([self.end, *self.newline]),
            "newline": Piece(self.newline),
        }
        # Qwen3 opens the last answer with a think block, empty where the row brings no reasoning.
        self.thinks = "<think>" in known and "reasoning_content" in str(tokenizer.chat_template)
        self.think = [known.get("<think>", -1), known.get("</think>", -1)]
        control = (self.start, self.end, self.thinks, self.think)
        self.sha256 = hashlib.sha256(f"{text}{control}".encode()).hexdigest()  # of all that the ids depend on

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel, with no control tokens whatever the text holds."""
        return [each.ids for each in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt_ids(self, turns: Sequence[Turn], system_prompt: str = "") -> list[int]:
        """A conversation up to the point where the assistant answers. Its last turn is the user's."""
        pieces = self._pieces(turns, system_prompt)
        return [i for ids in self._ids(pieces) for i in ids] + self.openings["assistant"]

    def render(self, rows: Sequence[Sequence[Turn]], system_prompt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Conversations end to end: (ids, supervised, lengths); (tokens,) int32, (tokens,) bool, (rows,) int64."""
        pieces_of = [self._pieces(turns, system_prompt) for turns in rows]
        pieces = [piece for each in pieces_of for piece in each]
        parts = self._ids(pieces)
        sizes = np.array([len(part) for part in parts])
        supervised = np.repeat([piece.supervised for piece in pieces], sizes)
        firsts = np.cumsum([0, *(len(each) for each in pieces_of[:-1])])
        ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32, count=len(supervised))
        return ids, supervised, np.add.reduceat(sizes, firsts)

    def _ids(self, pieces: Sequence["Piece"]) -> list[Sequence[int]]:
        texts = list(dict.fromkeys(piece.text for piece in pieces if piece.text is not None))
        known = dict(zip(texts, self.encode(texts), strict=True))  # a system prompt is many rows', and encoded once
        return [piece.ids if piece.text is None else known[piece.text] for piece in pieces]

    def _pieces(self, turns: Sequence[Turn], system_prompt: str) -> list["Piece"]:
        """A conversation as pieces of markup (ids) and text, each supervised or not.

        A prompt turn's role and text are encoded together, as the chat template does; an answer's text starts anew
        after "assistant\\n", as it does when the model writes it.
        """
        if system_prompt and turns[0].role != "system":
            turns = [Turn("system", system_prompt), *turns]
        last_asked = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
        pieces = []
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                pieces.append(self._markup["answer"])
                pieces += self._answer(turn.content, after_last_user=i > last_asked, last=i == len(turns) - 1)
                pieces += (self._markup["end of answer"], self._markup["newline"])
            else:
                text = Piece(text=f"{turn.role}\n{turn.content}")
                pieces += (self._markup["turn"], text, self._markup["end of turn"])
        return pieces

    def _answer(self, content: str, after_last_user: bool, last: bool) -> list["Piece"]:
        """What the assistant says; for Qwen3 with the reasoning dropped or set off as its template does."""
        if not self.thinks:
            return [Piece(text=content, supervised=True)]
        reasoning, closed, _ = content.partition("</think>")
        reasoning = reasoning.rpartition("<think>")[2].strip("\n") if closed else ""
        answer = content.rpartition("</think>")[2].lstrip("\n") if closed else content
        if not after_last_user or not (last or reasoning):
            return [Piece(text=answer, supervised=True)]
        begin, end = ([i] for i in self.think)
        texts = [Piece(text=text, supervised=True) for text in (f"\n{reasoning}\n", f"\n\n{answer}")]
        return [Piece(begin, supervised=True), texts[0], Piece(end, supervised=True), texts[1]]


class Piece(NamedTuple):
    """A part of a rendered turn: control tokens and fixed markup by id, or text still to be encoded."""

    ids: Sequence[int] = ()
    text: str | None = None
    supervised: bool = False
