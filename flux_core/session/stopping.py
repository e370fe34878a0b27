"""Ctrl-C during long work: the first finishes the picture that is begun, the second stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """SIGINT and SIGTERM as a request, inside `finishing`; outside it they raise KeyboardInterrupt at once."""

    def __init__(self, what: str = "picture", at_once: bool = True) -> None:
        """what: is finished first. at_once: a second SIGINT ends it; torchrun sends one behind that of the keyboard."""
        self.what, self.at_once = what, at_once
        self.requested = self._finishing = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come. Call it where nothing is half done."""
        if self.requested:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Handle signals while the block runs; outside the main thread, where Python allows no handlers, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Postpone signals while the block runs, which calls `check` between its indivisible parts."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        if not self._finishing or (self.at_once and self.requested and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not self.requested:
            with suppress(OSError):  # not `note`: a signal may come while stderr is being written
                again = "; interrupt again to stop at once" if self.at_once else ""
                os.write(2, f"\nthis {self.what} is finished first{again}\n".encode())
        self.requested = True
