"""Output to the terminal: without Unicode, into a closed pipe, or without any stream."""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def tolerate_any_encoding() -> None:
    """Escape characters that stdout or stderr cannot encode (cp1252, C locale), instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """The text with a space for each control character but newline and tab, which PNG forbids or terminals act on."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", " ", text)


def one_line(text: str) -> str:
    """`printable`, with a space for newline and tab, too: a name from a file must not look like lines of ours."""
    return re.sub(r"[\n\t]", " ", printable(text))


def tell(text: str) -> None:
    """Print a result to stdout."""
    print(printable(text), flush=True)


def note(text: str) -> None:
    """Print what the user should know to stderr; nothing where there is no stderr."""
    if sys.stderr is not None:
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """A context in which our own warnings are notes, without the line of code that others' have."""
    show, ours = warnings.showwarning, os.path.dirname(__file__)

    def shown(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
        if filename.startswith(ours):
            note(str(message))
        else:
            show(message, category, filename, *rest, **named)

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = show


def no_bars() -> bool | None:
    """tqdm's `disable`: True without a stderr; None lets it look whether stderr is a terminal."""
    return True if sys.stderr is None else None


def abandon_stdout() -> None:
    """Send stdout to nowhere once its reader has gone (`| head`), so that Python's last flush raises nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
