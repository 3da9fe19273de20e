"""SIGINT, SIGTERM and SIGHUP ask a run to stop at the next safe point; a second SIGINT stops it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from minilora.errors import StoppedError


class StopRequest:
    """Within this context a signal is remembered, and `check` raises StoppedError where it is safe to stop.

    Only the main thread can handle signals. In another thread this does nothing.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._at_once = self._finished = False
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if before is None or (number == signal.SIGHUP and before == signal.SIG_IGN):
                continue  # a handler that is not Python's cannot be put back; nohup means to go on
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            os._exit(128 + number)  # the second request: exit at once; the last checkpoint stays as it is
        self.signal_number = number
        if number == signal.SIGHUP:
            self._leave_closed_terminal()
        if self._at_once:
            raise KeyboardInterrupt  # not a StoppedError: `except Exception` must not take it for something else

    def _leave_closed_terminal(self) -> None:
        """A line printed to a terminal that is gone is an error: none may come between the signal and the saving."""
        for descriptor in self._terminals:
            if not os.isatty(descriptor):  # it was one
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, where nothing can be lost, a signal raises StoppedError at once, not at the next `check`."""
        before, self._at_once = self._at_once, True
        try:
            self.check()
            yield
        except KeyboardInterrupt:
            self._at_once = False
            self.check()
            raise
        finally:
            self._at_once = before

    def finished(self) -> None:
        """Nothing is left to stop: from now on a signal changes nothing, except a second SIGINT."""
        self._at_once, self._finished = False, True

    def check(self) -> None:
        """Raise StoppedError if a signal has come."""
        if self.signal_number and not self._finished:
            raise StoppedError(f"stopped by {signal.Signals(self.signal_number).name}", self.signal_number)
