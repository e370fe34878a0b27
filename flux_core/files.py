"""Files that appear whole or not at all, and what a disk answers, in words with a next step."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
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
    """A context in which OSErrors become DiskErrors, with the path and the next step, and a bad path a UsageError.

    flag: names another folder.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise DiskError(f"cannot write {path}: {reason.replace('{flag}', flag)}") from None
    except ValueError as error:
        if "\0" not in str(path) and not isinstance(error, UnicodeEncodeError):
            raise  # not the path's
        raise UsageError(f"{str(path)!a} is no path: {error}") from None


def expand_home(path: str, named: str = "") -> str:
    """The path with the home folder for a `~` or `~name` at its beginning. UsageError where nobody knows that folder.

    named: the flag or variable that named the path.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~") and not os.path.lexists(whole):
        text = f"{named} {path}".strip()
        raise UsageError(f"{text}: there is no such home folder. Next: write the whole path, or ./{path}")
    return whole


def user_path(path: str | Path, named: str = "") -> Path:
    """`expand_home` as a Path."""
    return Path(expand_home(str(path), named))


def prepare_folder(folder: str | Path) -> Path:
    """The folder, made if need be and proven writable before minutes are spent on a picture."""
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(folder)
        probe.touch(exist_ok=False)
        probe.unlink()
    return folder


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write a file that is there whole or not at all, in the place of an older one of that name. DiskError."""
    temporary = temporary_beside(path.parent)
    with disk_errors(path):
        try:
            write_synced(temporary, data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def temporary_beside(folder: Path) -> Path:
    """A name in that folder for a file that is still being written."""
    return folder / f".flux_core.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def write_synced(path: Path, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
