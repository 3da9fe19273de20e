"""SIGINT and SIGTERM ask a run to stop at the next safe point; a second SIGINT stops it at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from minilora.errors import StoppedError


class StopRequest:
    """Within this context a signal is remembered, and `check` raises StoppedError where it is safe to stop."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            os._exit(128 + number)  # asked twice: leave the last checkpoint as it is
        self.signal_number = number
        if self._at_once:
            raise KeyboardInterrupt  # not a StoppedError: `except Exception` must not take it for something else

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, where nothing can be lost, a signal raises StoppedError where it comes, not at the next point."""
        self._at_once = True
        try:
            self.check()
            yield
        except KeyboardInterrupt:
            self._at_once = False
            self.check()
            raise
        finally:
            self._at_once = False

    def check(self) -> None:
        """Raise StoppedError if a signal has come."""
        if self.signal_number:
            raise StoppedError(f"stopped by {signal.Signals(self.signal_number).name}", self.signal_number)
