"""Reads the rows of a file and collects the errors in them."""

from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

from minilora.data.formats import FORMATS, OPTIONAL, Row, Turn, detect_format, to_turns
from minilora.data.jsonl import file_sha256, parse_line, read_lines
from minilora.data.report import MAX_PROBLEMS_SHOWN, Reading, Returned
from minilora.data.whole_file import whole_file_mistake
from minilora.errors import DataError


def read_rows(path: str | Path, on_bad_rows: str = "error") -> tuple[list[Row], Reading]:
    """All rows of a JSONL file, and the findings of reading it. Raises what `stream_rows` raises."""
    rows = Returned(stream_rows(str(path), on_bad_rows))
    return list(rows), rows.result


def stream_rows(path: str, on_bad_rows: str) -> Generator[Row, None, Reading]:
    """Yield the rows of a JSONL file. The first readable row decides the format of the file.

    After the last row, raises DataError if there were bad lines. The message lists them with their numbers and reasons.
    With on_bad_rows = skip, raises DataError only if there was no good row.
    """
    good, bad, unread = 0, list[str](), Counter[str]()
    format, format_line = "", 0
    for number, line in read_lines(path):
        try:
            fields = parse_line(line)
            if not format:
                format, format_line = detect_format(fields), number
            row = Row(number, _turns(fields, format, format_line))
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
        else:
            good += 1
            unread.update(_unread(fields, format))
            yield row
    total = good + len(bad)
    if mistake := whole_file_mistake(path, len(bad), good):
        raise DataError(mistake)
    if bad and on_bad_rows == "error":
        more = [f"... and {len(bad) - MAX_PROBLEMS_SHOWN:,} more"] if len(bad) > MAX_PROBLEMS_SHOWN else []
        hint = f"{len(bad):,} of {total:,} rows are bad. Correct them, or leave them out: --on_bad_rows skip"
        hint = hint if good else f"all {total:,} rows are bad. Correct them."
        raise DataError("\n".join([*bad[:MAX_PROBLEMS_SHOWN], *more, hint]))
    if not good:
        raise DataError(f"all {total:,} rows are bad, the first: {bad[0]}." if bad else f"{path}: it holds no rows.")
    return Reading(path, file_sha256(path), format, format_line, total, tuple(bad), unread)


def _turns(row: dict[str, Any], format: str, format_line: int) -> tuple[Turn, ...]:
    """The conversation of a row in the format of the file. The row in line `format_line` decided this format."""
    try:
        return to_turns(row, format)
    except ValueError as error:
        others = [name for name, needed in FORMATS.items() if all(key in row for key in needed)]
        if not others or all(key in row for key in FORMATS[format]):
            raise
        fixed = f"line {format_line} decided that the format of the file is {format}; this row is {others[0]}"
        raise ValueError(f"{error}: {fixed}") from None


def _unread(row: dict[str, Any], format: str) -> set[str]:
    """The fields of a row that are not read."""
    unread = row.keys() - {"system", *FORMATS[format], *OPTIONAL.get(format, ())}
    for message in row["messages"] if format == "messages" else ():
        unread |= {f"messages: {key}" for key in message.keys() - {"role", "content"}}
    return unread
