"""What reaches the terminal, be it one without our letters, a closed pipe, or no stream at all."""

import os
import sys


def tolerate_any_encoding() -> None:
    """Characters that stdout or stderr cannot encode (cp1252, C locale) are escaped instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def tell(text: str) -> None:
    """A result, to stdout."""
    print(text, flush=True)


def note(text: str) -> None:
    """Something the user should know, to stderr; lost if there is none."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def no_bars() -> bool | None:
    """tqdm's `disable`: True without a stderr; None lets it look whether stderr is a terminal."""
    return True if sys.stderr is None else None


def abandon_stdout() -> None:
    """Nobody reads any more (`| head`): keep the interpreter from complaining when it flushes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
