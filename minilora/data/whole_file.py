"""Recognises a file that is wrong as a whole, and gives a command that converts it."""

import gzip
import json
import os
import re
import shlex
from typing import Any

from minilora.data.binary import NOT_IN_TEXT, needs_text, unpacked
from minilora.data.formats import FORMATS
from minilora.data.jsonl import NotJson, NotUtf8, parse_line, read_lines

ENCODINGS = {  # the first bytes of a file in each encoding: a byte order mark or an opening bracket
    "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
    "UTF-16LE": (b"{\0", b"[\0"),
    "UTF-16BE": (b"\0{", b"\0["),
}
LINES_JUDGED, BYTES_JUDGED = 200, 4 * 2**20  # the beginning of the file that is checked
MAX_PARSED_BYTES = 64 * 2**20  # the largest file that is parsed as one JSON value
NEEDED = {field for fields in FORMATS.values() for field in fields}
SCRIPT = "import csv, json, sys; [print(json.dumps(row)) for row in %s]"


def whole_file_mistake(path: str, bad: int, good: int) -> str:
    """A message that says what is wrong with a file that has more bad lines than good lines.

    The text is empty if no common cause is found. This function reads the beginning of the file again.
    """
    if bad <= good:
        return ""
    lines = _first_lines(path)
    errors = [(number, error) for number, line in lines if (error := _error_of(line))]
    first = lines[0][1] if lines else b""
    text = first.strip()
    unpack, name = unpacked(path)
    for encoding, starts in ENCODINGS.items():
        if first.startswith(starts):
            command = f"{unpack}iconv -f {encoding} -t UTF-8 {name}"
            return f"{path}: this is {encoding}; UTF-8 is needed: {command} > new.jsonl converts it"
    if not text.startswith((b"{", b"[")) and any(NOT_IN_TEXT.search(line) for _, line in lines):
        return needs_text(path, "a binary file", "")
    not_utf8 = sum(isinstance(error, NotUtf8) for _, error in errors)
    encoding = "gb18030" if not_utf8 else "utf-8-sig"
    opened = f'open(sys.argv[1], newline="", encoding="{encoding}")'

    def converted(kind: str, rows: str) -> str:
        command = f"{unpack}python -c {shlex.quote(SCRIPT % rows)} {name}"
        return f"{path}: this is {kind}; one object a line is needed: {command} > new.jsonl converts it"

    if re.match(rb"\[\s*(\{|$)", text):
        return converted("a JSON array", f"json.load({opened})")
    if text.startswith(b"{") and (found := _rows_inside(path, encoding)):
        kind, part = found
        return converted(kind, f"json.load({opened}){part}")
    columns = [each.strip(b" \"'").decode(errors="replace") for each in re.split(rb"[,;\t]", text)]
    if NEEDED & set(columns):
        delimiter = next(mark for mark in "\t;," if mark.encode() in text or mark == ",")
        return converted("a table (CSV)", f"csv.DictReader({opened}, delimiter={delimiter!r})")
    if text == b"{":
        several = "each of its objects has several lines; one object a line is needed"
        return f"{path}: {several}: {unpack}jq -c . {name} > new.jsonl converts it"
    if 2 * not_utf8 > len(errors):
        number, error = errors[0]
        gbk = f"If the file is GBK: {unpack}iconv -f GB18030 -t UTF-8 {name} > new.jsonl converts it"
        return f"{path}:{number}: {error}; UTF-8 is needed. {gbk}"
    not_json = sum(isinstance(error, NotJson) for _, error in errors)
    opening = sum(line.lstrip().startswith((b"{", b"[")) for _, line in lines)
    if not good and not text.startswith((b"{", b"[")) and 2 * not_json > len(errors) and 2 * opening < len(lines):
        start = text.decode(errors="replace")
        start = repr(start[:40]) + "..." * (len(start) > 40)
        needed = 'One JSON object a line is needed, such as {"instruction": "...", "output": "..."}'
        return f"{path}: this is not JSONL; its first line is {start}. {needed}"
    return ""


def _first_lines(path: str) -> list[tuple[int, bytes]]:
    found, size = list[tuple[int, bytes]](), 0
    for number, line in read_lines(path):
        found.append((number, line))
        size += len(line)
        if len(found) == LINES_JUDGED or size >= BYTES_JUDGED:
            break
    return found


def _error_of(line: bytes) -> ValueError | None:
    try:
        parse_line(line)
    except ValueError as error:
        return error
    return None


def _rows_inside(path: str, encoding: str) -> tuple[str, str] | None:
    """(what the file is, an expression for its rows) if it is one JSON object that contains rows, else None."""
    try:
        if os.path.getsize(path) > MAX_PARSED_BYTES:
            return None
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            content = file.read(MAX_PARSED_BYTES + 1)
        value: Any = json.loads(content.decode(encoding)) if len(content) <= MAX_PARSED_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or NEEDED & value.keys():
        return None
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and _are_rows(rows)}
    if lists:
        key = max(lists, key=lambda name: len(lists[name]))
        others = f" (others: {', '.join(sorted(lists.keys() - {key})[:5])})" if len(lists) > 1 else ""
        return f"one JSON object with the rows in {key!r}{others}", f"[{json.dumps(key)}]"
    if len(value) > 1 and _are_rows([*value.values()]):
        return "one JSON object with the rows as its values", ".values()"
    return None


def _are_rows(values: list[Any]) -> bool:
    """Whether all values are objects and none is a turn of a conversation."""
    return all(isinstance(value, dict) and not {"role", "from"} & value.keys() for value in values)
