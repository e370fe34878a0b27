"""Prompts that come as lines: those of a file, and those that somebody types between two pictures.

What is typed follows the official command: a line is the next prompt, an empty line the last one again, and a line that
begins with `/` changes a setting.
"""

import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from .errors import FileError, UsageError
from .request import GenerationRequest
from .terminal import note

MAX_BYTES = 1 << 20
"""of a file of prompts, and of a typed line"""
SETTINGS = {"/w": "width", "/h": "height", "/g": "guidance", "/s": "seed", "/n": "num_steps"}
QUESTION = "Next prompt (empty: the last one again with another seed; /h: help; /q: quit)"
HELP = "/w WIDTH, /h HEIGHT, /g GUIDANCE, /n STEPS, /s SEED (of the next picture) and then a prompt; /q quits"


def prompts_of(path: str) -> list[str]:
    """The lines of a UTF-8 file (`-`: standard input) but blank ones and comments (#). FileError if none is left."""
    name = "standard input" if path == "-" else path
    prompts = []
    for number, line in enumerate(_bytes_of(path, name).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise FileError(f"{name}, line {number} is no UTF-8 text: save the file as UTF-8") from None
        if text and not text.startswith("#"):
            prompts.append(text)
    if not prompts:
        raise FileError(f"{name} holds no prompt: write one on each line")
    return prompts


def _bytes_of(path: str, name: str) -> bytes:
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1) if sys.stdin is not None else b""
        else:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{name}: the prompts could not be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise FileError(f"{name}: a file of prompts has at most {MAX_BYTES:,} bytes; make several of it")
    return data


def typed_lines() -> Iterator[str]:
    """What comes over standard input, until `/q` or its end; a line that is no text is told and left out.

    The question goes to stderr, where no script reads results, and only to somebody who sits at a terminal.
    """
    while sys.stdin is not None:
        if sys.stdin.isatty():
            note(QUESTION)
        data = sys.stdin.buffer.readline(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"a line has at most {MAX_BYTES:,} bytes")
        try:
            line = data.decode().strip()
        except UnicodeDecodeError:
            note("error: that line is no UTF-8 text")
            continue
        if not data or (line.startswith("/") and line.split()[-1] == "/q"):
            return
        yield line


def obey(line: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A request's fields after a typed line. UsageError, as a request words it, for a wrong command or value."""
    if not line.startswith("/"):
        return {**fields, "prompt": line} if line else fields
    if line == "/h":
        note(HELP)
        return fields
    words, changes = line.split(), {}
    for command, value in zip_longest(words[::2], words[1::2]):
        if command not in SETTINGS:
            raise UsageError(f"there is no {command[:60]!a} here: {HELP}")
        if value is None:
            raise UsageError(f"{command} needs a value")
        changes[SETTINGS[command]] = value
    GenerationRequest(**{**fields, **changes})
    return {**fields, **changes}
