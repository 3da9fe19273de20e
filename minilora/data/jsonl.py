"""Reads JSONL files: yields the non-empty lines of a file, and parses each line as one JSON object."""

import gzip
import hashlib
import itertools
import json
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilora.data.binary import binary_file
from minilora.errors import DataError

BYTES_LOOKED_AT = 512  # of a file, to tell what kind it is
MAX_LINE_BYTES = 16 * 2**20


# ---------------------------------------------------------------------------------------- bytes -> rows


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The non-empty lines of a file, or of the content of a .gz file, with their 1-based numbers. Splits on \\n only.

    Reading in text mode would also split on U+2028, U+0085 and other characters, which JSON strings may hold. Only the
    first MAX_LINE_BYTES + 1 bytes of a line are kept, so that a file without line ends does not fill the memory.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a FIFO would block for ever
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise DataError(f"{path} is {kind}; a JSONL file is needed, one JSON object a line.")
        with gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb") as file:
            if mistake := binary_file(str(path), file.peek(BYTES_LOOKED_AT)):  # a header may hold a line end
                raise DataError(mistake)
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
        hint = "If it is cut or damaged, copy it again. If it is not packed, its name must not end in .gz."
        raise DataError(f"{path} cannot be read: {str(error).rstrip('.')}. {hint}") from error
    except OSError as error:
        several = f"{os.fspath(path)!r} may mean several files: give one." if re.search(r"[*?\[,]", str(path)) else ""
        raise DataError(f"{path} cannot be read: {error.strerror}. {several}".rstrip()) from error


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal. Raises DataError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


class NotUtf8(ValueError):
    """A line in another encoding."""


class NotJson(ValueError):
    """A line that is not a JSON value."""


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line as one JSON object. Raises ValueError with the reason for any other content."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has more than {MAX_LINE_BYTES:,} bytes; longer lines are not read")
    try:
        text = line.decode("utf-8").rstrip("\r\n")  # an error's column counts from the line's start
    except UnicodeDecodeError as error:
        raise NotUtf8(f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})") from error
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise NotJson(f"not one JSON value: {error.msg} (column {error.colno})") from error
    except RecursionError:
        raise ValueError("not readable JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, this is {_json_type(row)}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
