"""A run's steps as stderr shows them: a bar on a terminal, elsewhere, as in a log, a plain line every so often."""

from collections.abc import Callable
from statistics import fmean
from time import monotonic
from typing import Self

from tqdm import tqdm

from ..terminal import no_bars, note
from .loop import Progress
from .plan import told

EVERY = 30.0
"""seconds between lines, at least; there is one at the end, too"""


class Steps:
    """A context in which steps are told."""

    def __init__(self, total: int, done: int, clock: Callable[[], float] = monotonic) -> None:
        """done: steps of those before. clock: seconds."""
        self.total, self.first, self.step, self.clock = total, done, done, clock
        self.began = self.last = clock()
        self.losses: list[float] = []
        """since the last line"""
        self.bar = tqdm(total=total, initial=done, desc="steps", unit="step", disable=no_bars())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.bar.disable and self.losses:
            self._tell(self.clock())

    def add(self, done: Progress) -> None:
        """A step that is done."""
        self.step = done.step
        self.losses.append(done.loss)
        self.bar.update()
        self.bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
        if self.bar.disable and (now := self.clock()) - self.last >= EVERY:
            self._tell(now)

    def _tell(self, now: float) -> None:
        """A line: the mean of the losses since the last one, and the mean time of all steps, samples included."""
        seconds = (now - self.began) / (self.step - self.first)
        left = told(seconds * (self.total - self.step))
        note(f"step {self.step} of {self.total}: loss {fmean(self.losses):.4f}, {seconds:.2f} s a step, {left} left")
        self.last, self.losses = now, []
