"""The transformer of a variant that ships as another one and a LoRA: one file, written when it is first used.

So such a variant is a model like any other, in every format and budget, for training and `save`, at no cost a step.
"""

import hashlib
from functools import cache
from pathlib import Path

from torch import Tensor

from ..errors import FileError
from ..files import prepare_folder
from ..hub.client import cache_folder, cache_variable
from ..params import FluxParams
from .keymaps import streamed_from_diffusers
from .names import pairs_of
from .source import find_source
from .tensors import opened
from .write import write_safetensors

ADAPTER = "pytorch_lora_weights.safetensors"
"""as trainers name it; in PEFT's keys, and alpha is the rank"""
DOWN, UP = "lora_A.weight", "lora_B.weight"
FORMAT = b"1"
"""of what is written; another one where the sum changes"""


def adapted_file(name: str, base: Path, adapter: Path, params: FluxParams) -> Path:
    """`name.safetensors` beside the hub's cache: an official file with a LoRA written into it. DiskError, FileError.

    Summed in fp64 and rounded once, so the bytes are the same on every machine.
    """
    key = _key(FORMAT, *((path, path.stat().st_mtime_ns) for path in (base, adapter)))
    path = cache_folder().parent / "flux_core" / "adapted" / key / f"{name}.safetensors"
    if not path.is_file():
        source, differences = find_source(base), _differences(adapter, params)
        with opened(source, "cpu", source.shapes) as get:
            state = {tensor: get(tensor) for tensor in source.shapes}
            for tensor, x in differences.items():
                state[tensor] = (state[tensor].double() + x).to(state[tensor].dtype)
            write_safetensors(prepare_folder(path.parent, cache_variable()) / path.name, state)
    return path


@cache
def _key(format: bytes, *files: tuple[Path, int]) -> str:
    """16 hex digits of all their bytes; files that are written anew are read again."""
    return hashlib.sha256(format + b"".join(path.read_bytes() for path, _ in files)).hexdigest()[:16]


def _differences(adapter: Path, params: FluxParams) -> dict[str, Tensor]:
    """Official names of weights, and up @ down of each, fp64. FileError where a tensor belongs to none."""
    source = find_source(adapter)
    pairs = [pair for pair in pairs_of(params) if all(_of(name, DOWN) in source.shapes for name in pair.diffusers)]
    read = {_of(name, which) for pair in pairs for name in pair.diffusers for which in (DOWN, UP)}
    if other := sorted(read ^ source.shapes.keys()):
        raise FileError(f"{adapter}: {other[0]} is no factor of a weight, or has no partner. Next: install it again.")
    with opened(source, "cpu", source.shapes) as get:

        def product(name: str) -> Tensor:
            return get(_of(name, UP)).double() @ get(_of(name, DOWN)).double()

        return dict(streamed_from_diffusers(product, pairs, params))


def _of(weight: str, which: str) -> str:
    """The key of a factor of a weight, by diffusers' name of the weight."""
    return f"transformer.{weight.removesuffix('weight')}{which}"
