"""Files that appear whole or not at all, and never in the place of another.

A picture is written beside its final name, flushed to the disk, and then linked to it. `link` fails when the
name is taken, also when another process took it a moment ago; then the next number is tried. Names hold the
model and the seed, never the prompt: no prompt can choose where a file goes.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from PIL import Image

from ..errors import DiskError, UsageError
from .metadata import png_bytes

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EFBIG: "files may not grow so large here: raise the limit",
    errno.EROFS: "the file system is read-only: choose another folder with --output-dir",
    errno.EACCES: "no permission to write there: choose another folder with --output-dir",
    errno.EPERM: "no permission to write there: choose another folder with --output-dir",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "a file is in the way: choose another folder",
    errno.EEXIST: "a file is in the way: choose another folder",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSErrors inside become DiskErrors with path and next step; a path that cannot be one, a UsageError."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise DiskError(f"cannot write {path}: {reason}") from None
    except ValueError as error:
        raise UsageError(f"{str(path)!a} is no path: {error}") from None


def prepare_folder(folder: str | Path) -> Path:
    """The folder, made if need be and proven writable before minutes are spent on a picture for it."""
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder)
        probe.touch(exist_ok=False)
        probe.unlink()
    return folder


def save_picture(image: Image.Image, folder: Path, stem: str) -> Path:
    """Write a PNG with its metadata as `stem.png`, or `stem_1.png`, … if that is taken. Returns its path."""
    data, temporary = png_bytes(image), _temporary(folder)
    with disk_errors(folder / f"{stem}.png"):
        try:
            _write(temporary, data)
            return _publish(temporary, folder, stem)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write a file that is there whole or not at all, in the place of an older one of that name. DiskError."""
    temporary = _temporary(path.parent)
    with disk_errors(path):
        try:
            _write(temporary, data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _temporary(folder: Path) -> Path:
    return folder / f".flux_core.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, folder: Path, stem: str) -> Path:
    for number in count():
        path = folder / (f"{stem}_{number}.png" if number else f"{stem}.png")
        try:
            _move(temporary, path)
            return path
        except FileExistsError:
            continue
    raise AssertionError("count() does not end")


def _move(temporary: Path, path: Path) -> None:
    """Give a file its final name. FileExistsError when that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (FAT, some network mounts): hold the name with an empty file, replaced at once.
        path.touch(exist_ok=False)
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
