"""Text in the terminal: styles, labelled lines, one-line excerpts."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from minilora.errors import printable


def style(text: str, code: str, stream: Any = None) -> str:
    """Text in a terminal style (SGR code); plain where the output is no terminal or NO_COLOR is set."""
    stream = stream or sys.stdout
    return f"\x1b[{code}m{text}\x1b[0m" if stream.isatty() and not os.environ.get("NO_COLOR") else text


_quiet = ContextVar("quiet", default=False)


def is_quiet() -> bool:
    """Whether a run prints nothing and shows no progress bar."""
    return _quiet.get()


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Inside, `is_quiet()` is `on`, in this thread."""
    token = _quiet.set(on)
    try:
        yield
    finally:
        _quiet.reset(token)


def say(label: str, text: str) -> None:
    """One line of the header or the report; nothing where `is_quiet()`."""
    if is_quiet():
        return
    tqdm.write(f"{style(f'{label:<12}', '1')} {text}", file=sys.stdout)
    sys.stdout.flush()


def one_line(text: str, most: int = 60) -> str:
    """A text as it fits into a line of the log."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."
