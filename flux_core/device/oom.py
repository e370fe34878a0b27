"""Out of memory: one step down, the same work once more, and a line that says so.

Two rungs lead down. With `offload` the parts take turns on the device, which changes no bit of a picture; with
`vae_tiling` the autoencoder works strip by strip (`model/strips.py`), the same but for rounding. A rung is taken once, and
stays for all that follows. Who wants to stand there from the start asks for it by the flag of its name.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from ..request.fields import MEMORY
from ..terminal import note
from .choice import give_memory_back, is_out_of_memory, memory_errors

CPU = torch.device("cpu")
"""where parts are when it is not their turn"""
Rung = Literal["offload", "vae_tiling"]
T = TypeVar("T")

_MEANS: dict[Rung, str] = {
    "offload": "text encoders, transformer and autoencoder take turns there",
    "vae_tiling": "the autoencoder works strip by strip",
}
_FLAGS = {row.name: row.flag for row in MEMORY}


@dataclass
class Ladder:
    """Where a pipeline stands."""

    device: torch.device
    offload: bool = False
    vae_tiling: bool = False

    def attempt(self, what: str, work: Callable[[], T], *rungs: Rung) -> T:
        """`work()`, from its start again behind each of these rungs, until memory suffices.

        what: as in "drawing 64x64 pixels". MemoryShortage when none is left.
        """
        for rung in rungs:
            if getattr(self, rung) or (rung == "offload" and self.device == CPU):
                continue
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            setattr(self, rung, True)
            gc.collect()  # behind the except clause: up to its end the error holds all that was alive
            give_memory_back(self.device)
            told = f"once more from its start, and from now on {_MEANS[rung]}"
            note(f"out of memory on {self.device} while {what}: {told} ({_FLAGS[rung]} asks for that)")
        with memory_errors(what, self.device):
            return work()
