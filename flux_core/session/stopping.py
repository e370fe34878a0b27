"""Ctrl-C while a long piece of work goes on: once finishes what is begun, twice stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Turns SIGINT and SIGTERM into a request, while `finishing`; elsewhere they raise KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.asked = self._finishing = False

    def check(self) -> None:
        """KeyboardInterrupt if somebody asked: to be called where nothing is half done."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Signals are heard while the block runs; only the main thread can hear."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """The block calls `check` between what is not to be broken off."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _hear(self, number: int, frame: FrameType | None) -> Any:
        if not self._finishing or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not self.asked:
            with suppress(OSError):  # not `note`: a signal may come while stderr is being written
                os.write(2, b"\nthis picture is finished first; interrupt again to stop at once\n")
        self.asked = True
