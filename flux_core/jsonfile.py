"""JSON that a user wrote: read up to a limit, and what is wrong with the file told in words."""

import json
from pathlib import Path
from typing import Any

from .errors import FileError, UsageError

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
