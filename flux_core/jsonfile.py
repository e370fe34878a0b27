"""Reading a user's JSON up to a size limit, and error texts for what is wrong with it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileError, UsageError, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

MAX_BYTES = 1 << 20
"""of a text that a user wrote: a file of JSON or of prompts, or a typed line"""


def read_json(path: str | Path, what: str, limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file. FileError if the file can't be read, UsageError if it is no JSON.

    what: the file's name in errors, as in "the job". limit: bytes.
    """
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
    """The finding to report: an unknown key before a missing key, which it may be a misspelling of."""
    return min(error.errors(), key=lambda finding: finding["type"] != "extra_forbidden")


def in_words(finding: "ErrorDetails", subject: str, key: str = "", known: Iterable[str] = ()) -> str:
    """The error text of a finding: an unknown key (with the nearest known key), a missing key, or a wrong value.

    subject: what has the key, as in "entry 3".
    """
    if finding["type"] == "extra_forbidden":
        return f"{subject} has no key {key[:60]!r}.{nearest(key, known)}"
    if finding["type"] == "missing":
        return f"{subject} lacks {key!r}"
    return f"{subject}{': ' + key if key else ''}: {finding['msg'].removeprefix('Value error, ')}"


def quoted(value: object) -> str:
    """A value as ASCII text of at most 61 characters, for an error message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "…"
