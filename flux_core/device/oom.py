"""Retry after out of memory, with less memory in use: a measure is switched on, and a line says so.

There are two measures, and a flag for each. With `offload` the parts take turns on the device, which changes no bit of
a picture; with `vae_tiling` the autoencoder works strip by strip (`model/strips.py`), the same but for rounding. A
measure that is on stays on.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from ..errors import MemoryShortage, is_out_of_memory
from ..request.fields import MEMORY
from ..terminal import note
from .choice import empty_device_cache, memory_errors

CPU = torch.device("cpu")
"""where `offload` keeps the parts that do not compute"""
Measure = Literal["offload", "vae_tiling"]
"""a way to use less memory: an attribute of `OomFallback`, and a flag"""
T = TypeVar("T")

_EFFECTS: dict[Measure, str] = {
    "offload": "text encoders, transformer and autoencoder take turns there",
    "vae_tiling": "the autoencoder works strip by strip",
}
_FLAGS = {field.name: field.flag for field in MEMORY}


@dataclass
class OomFallback:
    """Runs work on a device; where memory runs out, switches a measure on and runs it again."""

    device: torch.device
    offload: bool = False
    vae_tiling: bool = False

    def run(self, what: str, work: Callable[[], T], *measures: Measure) -> T:
        """The result of `work()`. Out of memory: switch the next of `measures` on, and call it again from its start.

        what: the work for messages, as in "drawing 64x64 pixels". MemoryShortage when no measure is left.
        """
        for measure in measures:
            if not self._can_add(measure):
                continue
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            setattr(self, measure, True)
            gc.collect()  # after the except clause: until its end the error keeps the work's tensors alive
            empty_device_cache(self.device)
            change = f"from now on {_EFFECTS[measure]} ({_FLAGS[measure]})"
            note(f"out of memory on {self.device} while {what}: starting again, and {change}")
        with memory_errors(what, self.device):
            return work()

    def _can_add(self, measure: Measure) -> bool:
        """Whether a measure is off and would free memory: on a CPU, offloading to the CPU would not."""
        return not getattr(self, measure) and not (measure == "offload" and self.device == CPU)


@contextmanager
def fewer_rows(rows: str) -> Iterator[None]:
    """A context in which a MemoryShortage also says that a batch of so many rows takes less."""
    try:
        yield
    except MemoryShortage as error:
        raise MemoryShortage(f"{error}, or --batch {rows}") from error


def retried(work: Callable[[], T], free: Callable[[], bool]) -> T:
    """The result of `work()`, called again when memory runs out, as long as `free()` finds some to free."""
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # which holds the work's tensors
        if not free():
            raise failure
