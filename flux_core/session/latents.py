"""Latents as safetensors files: those that a picture was decoded from, and on request those after every step.

Tensors [1, 16, 2*ceil(height/16), 2*ceil(width/16)] in the dtype of the drawing: `latents` was decoded, `step_1`,
`step_2`, … are the latents after those steps. The metadata holds the picture's request, under the key of pictures.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import Tensor

from ..checkpoint.source import find_source
from ..checkpoint.tensors import opened
from ..errors import FileError
from ..images.metadata import KEY, parse_request
from ..request.generation import PATCH, GenerationRequest
from ..sampling import pack, unpack

if TYPE_CHECKING:
    from ..sampling import Step

LAST = "latents"


class Latents:
    """A step callback that keeps the latents of a picture: of its last step, or of every step."""

    def __init__(self, request: GenerationRequest, every: bool) -> None:
        self.request, self.every = request, every
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, step: "Step") -> None:
        last = step.index + 1 == self.request.num_forward_steps
        if last or self.every:
            width, height = self.request.padded_size
            name = LAST if last else f"step_{step.index + 1}"
            self.tensors[name] = unpack(step.x, height, width).cpu().contiguous()

    def data(self, recorded: str | None) -> bytes:
        """The file as bytes. recorded: the request as the picture holds it, or None if it holds none."""
        return save(self.tensors, {KEY: recorded} if recorded else None)  # of two keys the order would be by chance


def read_latents(path: Path) -> tuple[Tensor, GenerationRequest]:
    """The tokens [1, L, 64] that were decoded, and their request. FileError, UsageError."""
    source = find_source(path)
    text = source.headers[0].metadata.get(KEY)
    if text is None or LAST not in source.shapes:
        raise FileError(f"{path} holds no latents of a session: give a file that explore --save-latents wrote")
    request = parse_request(text, str(path))
    width, height = request.padded_size
    shape = (1, 16, 2 * height // PATCH, 2 * width // PATCH)
    if source.shapes[LAST] != shape:
        raise FileError(f"{path} holds latents of {source.shapes[LAST]}, its request says {shape}: it is damaged")
    with opened(source, "cpu", [LAST]) as tensor:
        return pack(tensor(LAST)), request
