"""Out of memory: take one measure, do the same work once more, and say so in a line.

There are two measures. With `offload` the parts take turns on the device, which changes no bit of a picture; with
`vae_tiling` the autoencoder works strip by strip (`model/strips.py`), the same but for rounding. A measure is taken
once, and stays for all that follows. Both can be asked for from the start, by the flags of their names.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from ..errors import is_out_of_memory
from ..request.fields import MEMORY
from ..terminal import note
from .choice import empty_device_cache, memory_errors

CPU = torch.device("cpu")
"""where parts are when it is not their turn"""
Measure = Literal["offload", "vae_tiling"]
T = TypeVar("T")

_MEANS: dict[Measure, str] = {
    "offload": "text encoders, transformer and autoencoder take turns there",
    "vae_tiling": "the autoencoder works strip by strip",
}
_FLAGS = {row.name: row.flag for row in MEMORY}


@dataclass
class OomFallback:
    """Where a pipeline stands."""

    device: torch.device
    offload: bool = False
    vae_tiling: bool = False

    def run(self, what: str, work: Callable[[], T], *measures: Measure) -> T:
        """`work()`, from its start again behind each of these measures, until memory suffices.

        what: as in "drawing 64x64 pixels". MemoryShortage when none is left.
        """
        for measure in measures:
            if getattr(self, measure) or (measure == "offload" and self.device == CPU):
                continue
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            setattr(self, measure, True)
            gc.collect()  # behind the except clause: up to its end the error holds all that was alive
            empty_device_cache(self.device)
            told = f"once more from its start, and from now on {_MEANS[measure]}"
            note(f"out of memory on {self.device} while {what}: {told} ({_FLAGS[measure]} asks for that)")
        with memory_errors(what, self.device):
            return work()
