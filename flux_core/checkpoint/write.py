"""Write safetensors files and folders that appear whole under their name, or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError
from ..files import disk_errors


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, on the disk before it takes its name. DiskError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path, "--output"):
        try:
            tensors = {name: x.detach().contiguous() for name, x in state.items()}
            _save(tensors, part, {"format": "pt", **(metadata or {})})
            _sort_metadata(part)
            with part.open("r+b") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            os.chmod(part, 0o666 & ~_umask())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """`save_file`, whose error for a disk becomes the OSError that it has the number of."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in a random order: the same tensors are the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` when the block ends, and is deleted if it fails. DiskError.

    UsageError if there is something at that place already, except an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is left as it is. Next: name another folder.")
    with disk_errors(folder, "--output"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            yield part
            os.chmod(part, 0o777 & ~_umask())
            if folder.exists():
                folder.rmdir()
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    """The mask of the user's other new files; temporary ones are private."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
