"""How many rows of a batch a device has use for."""

import torch

from ..request.generation import PATCH, GenerationRequest
from ..terminal import note

FULL = {"cuda": 4096, "cpu": 1024}
"""image tokens that fill a device: two rows of as many take as long as one after the other (docs/performance.md)"""


def _tokens(request: GenerationRequest) -> int:
    width, height = request.padded_size
    return width * height // PATCH**2


def rows_that_fill(device: torch.device, request: GenerationRequest) -> int:
    """The rows of a study by default. On a CPU 1: they gain little there, and lose more when they are stopped."""
    return 1 if device.type == "cpu" else max(1, FULL["cuda"] // _tokens(request))


def tell_idle_rows(device: torch.device, request: GenerationRequest, rows: int) -> None:
    """Print a line where one row fills the device, so that a batch takes more memory and no less time."""
    if rows > 1 and (tokens := _tokens(request)) >= FULL.get(device.type, FULL["cuda"]):
        size = f"{request.width}x{request.height}"
        note(f"--batch {rows} gains nothing at {size}: one picture's {tokens:,} tokens fill {device} already")
