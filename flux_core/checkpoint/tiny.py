"""Load a tiny decoder for previews (`model/tiny.py`) from safetensors: taesd's own names, or diffusers'."""

from pathlib import Path

import torch

from ..errors import FileError
from ..model.tiny import TinyDecoder
from .source import find_source
from .tensors import opened

DIFFUSERS = "decoder.layers."
"""what diffusers' names begin with; its numbers are one lower, since its clamp is no layer"""


def load_tiny_decoder(path: str | Path, device: torch.device | str = "cpu") -> TinyDecoder:
    """The decoder, frozen, fp32. FileError for a file that holds none, or another."""
    source = find_source(Path(path))
    names = {_official(name): name for name in source.shapes if _official(name)}
    with torch.device(device):
        decoder = TinyDecoder()
    expected = {name: tuple(x.shape) for name, x in decoder.state_dict().items()}
    found = {name: tuple(source.shapes[stored]) for name, stored in names.items()}
    if found != expected:
        wrong = next(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))
        raise FileError(
            f"{path} holds no decoder of taef1: {wrong} is {found.get(wrong, 'missing')}, and should be "
            f"{expected.get(wrong, 'absent')}. Next: the safetensors of madebyollin/taef1"
        )
    with opened(source, device, names.values()) as get:
        decoder.load_state_dict({name: get(stored).float() for name, stored in names.items()})
    return decoder.eval().requires_grad_(False)


def _official(name: str) -> str:
    """A tensor's name in taesd; empty for one of the encoder."""
    if not name.startswith(DIFFUSERS):
        return name if name[0].isdigit() else ""
    number, _, rest = name.removeprefix(DIFFUSERS).partition(".")
    return f"{int(number) + 1}.{rest}" if number.isdigit() else name
