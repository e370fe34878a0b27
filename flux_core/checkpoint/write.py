"""Files and folders that appear whole under their name, or not at all."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DiskError, UsageError


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, on the disk before it takes its name. DiskError if that can't be."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        try:
            tensors = {name: x.detach().contiguous() for name, x in state.items()}
            save_file(tensors, part, {"format": "pt", **(metadata or {})})
            _sort_metadata(part)
            with part.open("r+b") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            os.chmod(part, 0o666 & ~_umask())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order of chance. By their names the same tensors are the same bytes."""
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
    """A folder to fill, which becomes `folder` when the block ends, or nothing if it fails.

    UsageError if there is something at that place already, but for an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is left as it is. Next: name another folder.")
    with disk_errors(folder):
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


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full, read-only or forbidden place as DiskError. safetensors has an error of its own for it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DiskError(f"{path} could not be written: {reason}. {_advice(error.errno)}") from error
    except SafetensorError as error:
        raise DiskError(f"{path} could not be written: {error}. {_advice(None)}") from error


def _advice(code: int | None) -> str:
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Next: name a folder that you may write to."
    return "Next: make room, or name a place on another disk."


def _umask() -> int:
    """What the user's other new files are made with; temporary ones are private."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
