"""JSON that a user wrote: read up to a limit, and what is wrong with the file told in words."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileError, UsageError, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MAX_BYTES = 1 << 20


def read_json(path: str | Path, what: str, limit: int = MAX_BYTES) -> Any:
    """What a file holds; `what` is it called in errors. FileError if it can't be read, UsageError if it is no JSON."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {what} could not be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > limit:
        raise UsageError(f"{path}: such a file has at most {limit:,} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}") from None


def first_finding(error: "ValidationError") -> "ErrorDetails":
    """The finding to tell of several: a misspelt key comes before the missing one that it was meant to be."""
    return min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")


def in_words(finding: "ErrorDetails", subject: str, key: str = "", known: Iterable[str] = ()) -> str:
    """`subject` has no such key (with the nearest of the known ones), lacks it, or what is wrong with its value."""
    if finding["type"] == "extra_forbidden":
        return f"{subject} has no key {key[:60]!r}.{nearest(key, known)}"
    if finding["type"] == "missing":
        return f"{subject} lacks {key!r}"
    return f"{subject}{': ' + key if key else ''}: {finding['msg'].removeprefix('Value error, ')}"
