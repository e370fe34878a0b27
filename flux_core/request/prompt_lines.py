"""Prompts that come as lines: those of a file, and those that somebody types between two pictures.

A file's lines are prompts; those of a table (`.csv` or `.tsv`, under a header) and of JSON (`.json`: a list; `.jsonl`,
`.ndjson`: line by line) may say more than a prompt:

    prompt,negative-prompt,cfg-scale,seed
    a flower,a red flower,3,7

Spreadsheets write `;` for `,`, a first line `sep=;`, UTF-16, and other line ends: all of that is read.

What is typed follows the official command: a line is the next prompt, an empty line the last one again, and a line that
begins with `/` changes a setting.
"""

import codecs
import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import pydantic_core

from ..errors import FileError, UsageError, nearest
from ..terminal import note
from .fields import FIELDS, REQUEST
from .generation import GenerationRequest

MAX_BYTES = 1 << 20
"""of a file of prompts, and of a typed line"""
csv.field_size_limit(max(MAX_BYTES, csv.field_size_limit()))  # by itself 131,072 characters
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
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins as UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""encodings by what a file begins with"""
UNREAD = (
    *(".yaml", ".yml", ".toml", ".xml", ".htm", ".html", ".json5", ".jsonc", ".parquet"),
    *(".xls", ".xlsx", ".xlsm", ".xlsb", ".ods", ".numbers", ".doc", ".docx", ".odt", ".rtf", ".pdf"),
)
"""suffixes of files whose lines are no prompts"""
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
    """The pictures of a file (`-`: standard input), by its suffix a table or JSON, else a prompt on each line.

    FileError when it cannot be read or holds nothing, UsageError for a line that cannot be understood.
    """
    name = "standard input" if path == "-" else path
    suffix = path[path.rfind(".") :].lower()
    if suffix in UNREAD:
        raise FileError(f"{name}: prompts cannot be read from {suffix}. Next: save them as .txt, {', '.join(READERS)}")
    lines = list(READERS.get(suffix, _of_text)(name, _decoded(name, _bytes_of(path, name))))
    if not lines:
        raise FileError(f"{name} holds no prompt: write one on each line")
    return lines


def _decoded(name: str, data: bytes) -> str:
    """The text of a file in UTF-8, or as its byte order mark says, with "\n" for every line's end. FileError.

    A mark further on is where two files were put together.
    """
    mark, encoding = next((one for one in MARKS.items() if data.startswith(one[0])), (b"", "utf-8"))
    data = data.removeprefix(mark)
    try:
        text, valid = data.decode(encoding), True
    except UnicodeDecodeError as error:
        text, valid = data[: error.start].decode(encoding, errors="replace"), False
    text = re.sub("\r\n?", "\n", text)
    strange = re.search("[\0-\x08]", text)  # in archives, and every other byte of UTF-16 without a mark
    if not valid or strange:
        line = text[: strange.start() if strange else None].count("\n") + 1
        kinds = "UTF-8 text, nor UTF-16 or UTF-32 with a byte order mark"
        raise FileError(f"{name}, line {line} is no {kinds}. Next: save the file as UTF-8")
    return re.sub("\n?\ufeff", "\n", text.lstrip("\ufeff"))


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """All but blank lines, stripped, by their numbers."""
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _of_text(name: str, text: str) -> Iterator[Line]:
    """All lines but comments (#)."""
    for number, line in _numbered(text):
        if not line.startswith("#"):
            yield Line(f"{name}, line {number}", {"prompt": line})


def _of_table(name: str, text: str, delimiter: str = ",") -> Iterator[Line]:
    """Rows under a header that names columns; an empty cell says nothing. delimiter: where the header has none."""
    if declared := re.match(r'"?sep *= *([^\w\s"]|\t)[",;\t| ]*(?=\n|$)', text, re.IGNORECASE):
        delimiter, text = declared[1], text[declared.end() :]
    else:  # no name of a column has one in it
        delimiter = max((delimiter, *",;\t|"), key=next(_numbered(text), (0, ""))[1].count)
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = ((f"{name}, line {reader.line_num}", row) for row in reader if any(cell.strip() for cell in row))
    try:
        where, header = next(rows, ("", []))
        columns = _columns(header, where, " Next: name the columns in the first line, or call a file of prompts .txt")
        for where, row in rows:
            if row != header:  # which tables that were put together have twice
                yield Line(where, _cells(columns, row, where, delimiter))
    except csv.Error as error:
        advice = "put quotes around a whole cell, and double those in it"
        raise UsageError(f"{name}, line {reader.line_num} is no CSV: {error}. Next: {advice}") from None


def _cells(columns: Sequence[str], row: Sequence[str], where: str, delimiter: str) -> dict[str, str]:
    """What a row says. UsageError where it has other columns than the header."""
    cells = [cell.strip() for cell in row]
    found = f"{where} has {len(cells)} cell(s), the header {len(columns)}"
    if any(cells[len(columns) :]):
        raise UsageError(f"{found}. Next: put quotes around a cell that holds {delimiter!r}")
    if len(cells) < len(columns):
        raise UsageError(f"{found}. Next: write {delimiter!r} also before a cell that is empty")
    return {column: _number(column, cell) for column, cell in zip(columns, cells, strict=False) if cell}


def _number(column: str, cell: str) -> str:
    """The cell, with a point where a number has a comma, as spreadsheets write it in half of the world."""
    decimal = FIELDS[column].kind is float and re.fullmatch(r"\d*,\d+", cell)
    return cell.replace(",", ".") if decimal else cell


def _of_json(name: str, text: str) -> Iterator[Line]:
    """The entries of a list, or one by itself."""
    found = _json(text, name) if text.strip() else []
    for number, entry in enumerate(found if isinstance(found, list) else [found], 1):
        where = f"{name}, entry {number}"
        yield Line(where, _entry(entry, where))


def _of_jsonl(name: str, text: str) -> Iterator[Line]:
    """An entry on each line."""
    for number, line in _numbered(text):
        where = f"{name}, line {number}"
        yield Line(where, _entry(_json(line, where), where))


def _json(text: str, where: str) -> Any:
    try:
        return pydantic_core.from_json(text)  # unlike json.loads it bounds the depth
    except ValueError as error:
        advice = "a list is named .json, entries on lines of their own .jsonl"
        raise UsageError(f"{where} is no JSON: {error}. Next: {advice}") from None


def _entry(found: Any, where: str) -> dict[str, Any]:
    """What an object says, or a string, which is a prompt."""
    found = {"prompt": found} if isinstance(found, str) else found
    if not isinstance(found, dict):
        raise UsageError(f'{where} is neither an object nor a string: say {{"prompt": "a red apple", "seed": 1}}')
    fields = dict(zip(_columns(found, where), found.values(), strict=True))
    for name, value in fields.items():
        if isinstance(value, bool) and not FIELDS[name].const:
            raise UsageError(f"{where}: {FIELDS[name].flag} must be {FIELDS[name].expected}, not {str(value).lower()}")
    return {name: value for name, value in fields.items() if value is not None}


READERS: dict[str, Callable[[str, str], Iterator[Line]]] = {
    ".csv": _of_table,
    ".tsv": partial(_of_table, delimiter="\t"),
    ".json": _of_json,
    ".jsonl": _of_jsonl,
    ".ndjson": _of_jsonl,
    ".tab": partial(_of_table, delimiter="\t"),
    ".jsonlines": _of_jsonl,
}
"""of files that say more than prompts, by the suffix of their names"""


def _columns(names: Iterable[str], where: str, advice: str = "") -> list[str]:
    """The request's fields of those names, but for empty ones at the end.

    UsageError for one that is none, with the nearest or with the advice, and for one twice.
    """
    columns: list[str] = []
    words = [name.strip().lower().replace("-", "_").replace(" ", "_") for name in names]
    while words and not words[-1]:
        words.pop()
    for word, name in zip(words, names, strict=False):
        if word not in COLUMNS:
            hint = nearest(word, list(COLUMNS)) or f" There are {', '.join(COLUMNS)}.{advice}"
            raise UsageError(f"{where}: there is no column {name[:60]!r}.{hint}")
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
