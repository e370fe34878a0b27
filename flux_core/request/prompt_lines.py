"""Prompts that come as lines: those of a file, and those that somebody types between two pictures.

A file's lines are prompts; those of a `.csv` (under a header) and of a `.jsonl` may say more than a prompt:

    prompt,negative-prompt,cfg-scale,seed
    a flower,a red flower,3,7

What is typed follows the official command: a line is the next prompt, an empty line the last one again, and a line that
begins with `/` changes a setting.
"""

import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pydantic_core

from ..errors import FileError, UsageError, nearest
from ..terminal import note
from .fields import REQUEST
from .generation import GenerationRequest

MAX_BYTES = 1 << 20
"""of a file of prompts, and of a typed line"""
OF_A_RUN = ("name", "dtype", "init_image", "force", "allow_empty_prompt")
"""what a line cannot say: one model is loaded, from one picture, and no file grants permissions"""
COLUMNS = {
    flag.lstrip("-").replace("-", "_"): field.name
    for field in REQUEST
    if field.name not in OF_A_RUN
    for flag in (field.flag, *field.flags)
    if flag.startswith("--")
}
"""what a line can say, by the names of flags"""
SETTINGS = {
    "/w": "width",
    "/h": "height",
    "/g": "guidance",
    "/s": "seed",
    "/n": "num_steps",
    "/c": "true_cfg_scale",
    "/np": "negative_prompt",
}
QUESTION = "Next prompt (empty: the last one again with another seed; /h: help; /q: quit)"
HELP = (
    "/w WIDTH, /h HEIGHT, /g GUIDANCE, /n STEPS, /s SEED (of the next picture), /c TRUE CFG SCALE, /np NEGATIVE PROMPT "
    "(the whole line) and then a prompt; /q quits"
)


@dataclass(frozen=True)
class Line:
    """What one line of a file says of a picture, by the names of a request's fields, and where it stands."""

    where: str
    fields: dict[str, Any]


def read_lines(path: str) -> list[Line]:
    """The pictures of a UTF-8 file (`-`: standard input): CSV or JSONL by its suffix, else a prompt on each line.

    FileError when it cannot be read or holds nothing, UsageError for a line that cannot be understood.
    """
    name = "standard input" if path == "-" else path
    reader = {".csv": _of_csv, ".jsonl": _of_jsonl}.get(path[path.rfind(".") :].lower(), _of_text)
    lines = list(reader(name, _numbered(name, _bytes_of(path, name))))
    if not lines:
        raise FileError(f"{name} holds no prompt: write one on each line")
    return lines


def _numbered(name: str, data: bytes) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            raise FileError(f"{name}, line {number} is no UTF-8 text: save the file as UTF-8") from None


def _of_text(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[Line]:
    """All but blank lines and comments (#)."""
    for number, line in lines:
        if (text := line.strip()) and not text.startswith("#"):
            yield Line(f"{name}, line {number}", {"prompt": text})


def _of_csv(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[Line]:
    """Rows under a header that names columns; an empty cell says nothing."""
    rows = csv.reader((line + "\n" for _, line in lines), strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            where = f"{name}, line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = _columns(row, where)
                continue
            if len(row) != len(header):
                raise UsageError(f"{where} has {len(row)} cell(s), the header {len(header)}: put quotes around commas")
            yield Line(where, {key: cell.strip() for key, cell in zip(header, row, strict=True) if cell.strip()})
    except csv.Error as error:
        raise UsageError(f"{name}, line {rows.line_num} is no CSV: {error}") from None


def _of_jsonl(name: str, lines: Iterable[tuple[int, str]]) -> Iterator[Line]:
    """Objects, or strings that are prompts."""
    for number, line in lines:
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            found = pydantic_core.from_json(line)  # unlike json.loads it bounds the depth
        except ValueError as error:
            raise UsageError(f"{where} is no JSON: {error}") from None
        found = {"prompt": found} if isinstance(found, str) else found
        if not isinstance(found, dict):
            raise UsageError(f'{where} is neither an object nor a string: say {{"prompt": "a red apple", "seed": 1}}')
        values = zip(_columns(found, where), found.values(), strict=True)
        yield Line(where, {key: value for key, value in values if value is not None})


def _columns(names: Iterable[str], where: str) -> list[str]:
    """The request's fields of those names. UsageError for one that is none, with the nearest, and for one twice."""
    columns: list[str] = []
    for name in names:
        word = name.strip().lower().replace("-", "_").replace(" ", "_")
        if word not in COLUMNS:
            raise UsageError(f"{where}: there is no column {name[:60]!r}.{nearest(word, list(COLUMNS))}")
        if COLUMNS[word] in columns:
            raise UsageError(f"{where} names {COLUMNS[word]} twice")
        columns.append(COLUMNS[word])
    return columns


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
    if words[0] == "/np":
        words = ["/np", line.removeprefix("/np").strip()]
    for command, value in zip_longest(words[::2], words[1::2]):
        if command not in SETTINGS:
            raise UsageError(f"there is no {command[:60]!a} here: {HELP}")
        if value is None:
            raise UsageError(f"{command} needs a value")
        changes[SETTINGS[command]] = value
    GenerationRequest(**{**fields, **changes})
    return {**fields, **changes}
