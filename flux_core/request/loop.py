"""The lines that the user types between two pictures (`--loop`).

As in the official command, a line is the next prompt, an empty line repeats the last prompt, and a line that begins
with `/` changes settings.
"""

import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from ..errors import UsageError
from ..jsonfile import MAX_BYTES
from ..terminal import note
from .generation import GenerationRequest

SETTINGS = {
    "/w": "width",
    "/h": "height",
    "/g": "guidance",
    "/s": "seed",
    "/n": "num_steps",
    "/c": "true_cfg_scale",
    "/np": "negative_prompt",
}
QUESTION = "Next prompt (empty: the last prompt again with another seed; /h: help; /q: quit)"
HELP = (
    "/w WIDTH, /h HEIGHT, /g GUIDANCE, /n STEPS, /s SEED (of the next picture), /c TRUE CFG SCALE, /np NEGATIVE PROMPT "
    "(the whole line) and then a prompt; /q quits"
)


def read_typed_lines() -> Iterator[str]:
    """The lines of standard input, until `/q` or its end. A line that is no UTF-8 is skipped, with a note. UsageError.

    The question goes to stderr, so that scripts read only results, and only if standard input is a terminal.
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


def apply_command(line: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A request's fields with the changes of a typed line. UsageError for an unknown command or a wrong value."""
    if not line.startswith("/"):
        return {**fields, "prompt": line} if line else fields
    if line == "/h":
        note(HELP)
        return fields
    changed = {**fields, **_changes(line)}
    GenerationRequest(**changed)  # checks the values
    return changed


def _changes(line: str) -> dict[str, str]:
    """The fields that a line of commands sets. UsageError."""
    words, changes = line.split(), {}
    if words[0] == "/np":
        words = ["/np", line.removeprefix("/np").strip()]
    for command, value in zip_longest(words[::2], words[1::2]):
        if command not in SETTINGS:
            raise UsageError(f"there is no {command[:60]!a} here: {HELP}")
        if value is None:
            raise UsageError(f"{command} needs a value")
        changes[SETTINGS[command]] = value
    return changes
