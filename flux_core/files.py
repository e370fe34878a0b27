"""Writing files whole or not at all, `~` in paths, and disk errors with a next step."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from .errors import DiskError, UsageError

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EFBIG: "files may not grow so large here: raise the limit",
    errno.EROFS: "the file system is read-only: choose another folder with {flag}",
    errno.EACCES: "no permission to write there: choose another folder with {flag}",
    errno.EPERM: "no permission to write there: choose another folder with {flag}",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ENOTDIR: "a file is in the way: choose another folder",
    errno.EEXIST: "a file is in the way: choose another folder",
}


@contextmanager
def disk_errors(path: Path, flag: str = "--output-dir") -> Iterator[None]:
    """A context that turns OSErrors into DiskErrors with the path and the next step, and a bad path into a UsageError.

    flag: the flag that chooses another folder.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise DiskError(f"cannot write {path}: {reason.replace('{flag}', flag)}") from None
    except ValueError as error:
        if "\0" not in str(path) and not isinstance(error, UnicodeEncodeError):
            raise  # the path is not the cause
        raise UsageError(f"{str(path)!a} is no path: {error}") from None


def expand_home(path: str, named: str = "") -> str:
    """The path with the home folder in place of a leading `~` or `~name`. UsageError if there is no such home folder.

    named: the flag or variable that holds the path, for the error.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~") and not os.path.lexists(whole):
        text = f"{named} {path}".strip()
        raise UsageError(f"{text}: there is no such home folder. Next: write the whole path, or ./{path}")
    return whole


def user_path(path: str | Path, named: str = "") -> Path:
    """`expand_home` as a Path."""
    return Path(expand_home(str(path), named))


def prepare_folder(folder: str | Path, flag: str = "--output-dir") -> Path:
    """Create a folder if it is missing, check that files can be written to it, and return it. DiskError.

    flag: the one that chooses another folder.
    """
    folder = Path(folder)
    with disk_errors(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(folder)
        probe.touch(exist_ok=False)
        probe.unlink()
    return folder


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write a file whole or not at all, replacing an older file of that name. Returns its path. DiskError."""
    temporary = temporary_beside(path.parent)
    with disk_errors(path):
        try:
            write_synced(temporary, data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def temporary_beside(folder: Path) -> Path:
    """A new temporary path in a folder, for a file that is still being written."""
    return folder / f".flux_core.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk. FileExistsError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def append_synced(path: Path, data: bytes) -> None:
    """Add to a file by one write, and flush it to the disk."""
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, wanted: Path) -> Path:
    """Give a file the wanted name, or `stem_1`, `stem_2`, … if that is taken. Returns its path."""
    for number in count():
        path = wanted.with_name(f"{wanted.stem}_{number}{wanted.suffix}") if number else wanted
        try:
            _move(temporary, path)
            return path
        except FileExistsError:
            continue
    raise AssertionError("count() does not end")


def _move(temporary: Path, path: Path) -> None:
    """Rename a file. FileExistsError when the new name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (FAT, some network mounts): reserve the name with an empty file, then replace it.
        path.touch(exist_ok=False)
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
