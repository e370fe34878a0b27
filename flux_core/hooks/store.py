"""Write and read tensors in safetensors files, for interventions."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DiskError, FileError

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> Path:
    """Write a new file, whole or not at all, and return its path; a number is added if the name is taken. DiskError."""
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial)
        free = next(p for p in _numbered(path) if not p.exists())
        os.replace(partial, free)
        return free
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DiskError(f"{path}: could not be written: {error.strerror or error}") from error


def _numbered(path: Path):
    yield path
    for i in range(1, 10_000):
        yield path.with_stem(f"{path.stem}_{i}")


def read_tensor(path: Path, name: str) -> "Tensor":
    """A tensor of a safetensors file by name. FileError names the file and the nearest tensor."""
    from safetensors import SafetensorError, safe_open

    from ..errors import nearest

    try:
        with safe_open(path, "pt") as file:
            if name not in (known := list(file.keys())):
                raise FileError(f"{path} holds no tensor {name!r}.{nearest(name, known)}")
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path}: could not be read as safetensors: {error}") from None
