"""Output to the terminal: without Unicode, into a closed pipe, or without any stream."""

import os
import sys


def tolerate_any_encoding() -> None:
    """Escape characters that stdout or stderr cannot encode (cp1252, C locale), instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def tell(text: str) -> None:
    """Print a result to stdout."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print what the user should know to stderr; nothing where there is no stderr."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def no_bars() -> bool | None:
    """tqdm's `disable`: True without a stderr; None lets it look whether stderr is a terminal."""
    return True if sys.stderr is None else None


def abandon_stdout() -> None:
    """Send stdout to nowhere once its reader has gone (`| head`), so that Python's last flush raises nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
