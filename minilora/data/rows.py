"""Reads the rows of a file and collects what is wrong with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilora.data.formats import FORMATS, OPTIONAL, Row, detect_format, to_turns
from minilora.data.jsonl import file_sha256, parse_line, read_lines
from minilora.data.report import MAX_PROBLEMS_SHOWN, DataReport
from minilora.data.whole_file import whole_file_mistake
from minilora.errors import DataError


def read_rows(path: str | Path, on_bad_rows: str = "error") -> tuple[list[Row], DataReport]:
    """All rows of a JSONL file, and what happened to its lines. Raises what `stream_rows` raises."""
    report = DataReport(str(path))
    return list(stream_rows(report, on_bad_rows)), report


def stream_rows(report: DataReport, on_bad_rows: str) -> Iterator[Row]:
    """The rows of the JSONL file `report.file`, one after the other. Its format is that of its first readable row.

    When all are read, raises DataError that lists every bad line with its number and reason (or, with on_bad_rows =
    skip, only when there was no good row).
    """
    path, good = report.file, 0
    for number, line in read_lines(path):
        report.rows += 1
        try:
            row = _row(number, parse_line(line), report)
        except ValueError as error:
            report.bad.append(f"{path}:{number}: {error}")
        else:
            good += 1
            yield row
    if mistake := whole_file_mistake(path, len(report.bad), good):
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
