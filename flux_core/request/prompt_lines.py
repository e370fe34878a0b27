"""Reading files of prompts.

In a text file each line is a prompt. The rows of a table (`.csv` or `.tsv`, with a header) and the entries of JSON
(`.json`: a list; `.jsonl`, `.ndjson`: line by line) may set other fields of a request too:

    prompt,negative-prompt,cfg-scale,seed
    a flower,a red flower,3,7

Spreadsheets write `;` for `,`, a first line `sep=;`, UTF-16, and other line ends: all of these are read.
"""

import codecs
import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pydantic_core

from ..errors import FileError, UsageError, nearest
from ..jsonfile import MAX_BYTES
from .fields import FIELDS, LORAS, PICTURE_FILES, REQUEST, key_of
from .generation import GenerationRequest
from .jobs import groups_of

csv.field_size_limit(max(MAX_BYTES, csv.field_size_limit()))  # Python's default is 131,072 characters
OF_A_RUN = ("name", "dtype", "t5_dtype", *PICTURE_FILES, "force", "allow_empty_prompt")
"""fields that a line cannot set: a run has one model and its pictures, and no file grants permissions"""
COLUMNS = {
    key_of(flag): field.name
    for field in (*REQUEST, *LORAS[:2])
    if field.name not in OF_A_RUN
    for flag in (field.flag, *field.flags)
    if flag.startswith("--")
}
"""keys and column names, which are the names of flags -> the fields that a line can set"""
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins as UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""byte order mark -> encoding"""
UNSUPPORTED = (
    *(".yaml", ".yml", ".toml", ".xml", ".htm", ".html", ".json5", ".jsonc", ".parquet"),
    *(".xls", ".xlsx", ".xlsm", ".xlsb", ".ods", ".numbers", ".doc", ".docx", ".odt", ".rtf", ".pdf"),
)
"""suffixes of files that are refused, because their lines are no prompts"""


@dataclass(frozen=True)
class Line:
    """A line of a file of prompts."""

    where: str
    """file and line, for errors"""
    fields: dict[str, Any]
    """the fields of a request that the line sets"""

    def request(self, defaults: dict[str, Any]) -> GenerationRequest:
        """The request of this line; `defaults` are for fields that it does not set. UsageError with file and line."""
        try:
            return GenerationRequest(**{**defaults, **self.fields})
        except UsageError as error:
            raise UsageError(f"{self.where}: {error}") from None


def read_lines(path: str) -> list[Line]:
    """The lines of a file (`-`: standard input): by its suffix a table or JSON, else a prompt on each line.

    FileError when it cannot be read or holds no prompt, UsageError for a line that is wrong.
    """
    name = "standard input" if path == "-" else path
    suffix = path[path.rfind(".") :].lower()
    if suffix in UNSUPPORTED:
        raise FileError(f"{name}: prompts cannot be read from {suffix}. Next: save them as .txt, {', '.join(READERS)}")
    lines = list(READERS.get(suffix, _read_text)(name, _decode(name, _read_bytes(path, name))))
    if not lines:
        raise FileError(f"{name} holds no prompt: write one on each line")
    return lines


def _decode(name: str, data: bytes) -> str:
    """The text of a file in UTF-8, or by its byte order mark, with "\n" for every line end. FileError.

    A mark inside the text, where two files were joined, ends a line.
    """
    mark, encoding = next((item for item in MARKS.items() if data.startswith(item[0])), (b"", "utf-8"))
    data = data.removeprefix(mark)
    try:
        text, valid = data.decode(encoding), True
    except UnicodeDecodeError as error:
        text, valid = data[: error.start].decode(encoding, errors="replace"), False
    text = re.sub("\r\n?", "\n", text)
    control = re.search("[\0-\x08]", text)  # in archives, and every other byte of UTF-16 without a mark
    if not valid or control:
        line = text[: control.start() if control else None].count("\n") + 1
        encodings = "UTF-8 text, nor UTF-16 or UTF-32 with a byte order mark"
        raise FileError(f"{name}, line {line} is no {encodings}. Next: save the file as UTF-8")
    return re.sub("\n?\ufeff", "\n", text.lstrip("\ufeff"))


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """Number and stripped text of every line that is not blank."""
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_text(name: str, text: str) -> Iterator[Line]:
    """Each line that is no comment (#), as a prompt."""
    for number, line in _numbered(text):
        if not line.startswith("#"):
            yield Line(f"{name}, line {number}", {"prompt": line})


def _read_table(name: str, text: str, delimiter: str = ",") -> Iterator[Line]:
    """The rows below a header of column names; an empty cell sets no field. delimiter: if the header shows none."""
    if declared := re.match(r'"?sep *= *([^\w\s"]|\t)[",;\t| ]*(?=\n|$)', text, re.IGNORECASE):
        delimiter, text = declared[1], text[declared.end() :]
    else:  # column names contain none of these
        delimiter = max((delimiter, *",;\t|"), key=next(_numbered(text), (0, ""))[1].count)
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = ((f"{name}, line {reader.line_num}", row) for row in reader if any(cell.strip() for cell in row))
    try:
        where, header = next(rows, ("", []))
        columns = _columns(header, where, " Next: name the columns in the first line, or call a file of prompts .txt")
        for where, row in rows:
            if row != header:  # joined tables repeat it
                yield Line(where, _cells(columns, row, where, delimiter))
    except csv.Error as error:
        advice = "put quotes around a whole cell, and double those in it"
        raise UsageError(f"{name}, line {reader.line_num} is no CSV: {error}. Next: {advice}") from None


def _cells(columns: Sequence[str], row: Sequence[str], where: str, delimiter: str) -> dict[str, str]:
    """The fields that a row sets. UsageError if its number of cells is not that of the header."""
    cells = [cell.strip() for cell in row]
    finding = f"{where} has {len(cells)} cell(s), the header {len(columns)}"
    if any(cells[len(columns) :]):
        raise UsageError(f"{finding}. Next: put quotes around a cell that holds {delimiter!r}")
    if len(cells) < len(columns):
        raise UsageError(f"{finding}. Next: write {delimiter!r} also before an empty cell")
    return {column: _with_point(column, cell) for column, cell in zip(columns, cells, strict=False) if cell}


def _with_point(column: str, cell: str) -> str:
    """The cell, with a point for the decimal comma of spreadsheets in many languages."""
    if FIELDS[column].kind is float:
        return re.sub(r"^([+-]?\d*),(\d+)$", r"\1.\2", cell)
    return re.sub(r"(\s[+-]?\d*),(\d+(?:@\S*)?)$", r"\1.\2", cell) if column == "lora" else cell


def _read_json(name: str, text: str) -> Iterator[Line]:
    """The entries of a list, or a single entry."""
    value = _parse_json(text, name) if text.strip() else []
    for number, entry in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"{name}, entry {number}"
        yield Line(where, _fields_of(entry, where))


def _read_jsonl(name: str, text: str) -> Iterator[Line]:
    """An entry on each line."""
    for number, line in _numbered(text):
        where = f"{name}, line {number}"
        yield Line(where, _fields_of(_parse_json(line, where), where))


def _parse_json(text: str, where: str) -> Any:
    try:
        return pydantic_core.from_json(text)  # unlike json.loads it bounds the depth
    except ValueError as error:
        advice = "name a list .json, entries on lines of their own .jsonl"
        raise UsageError(f"{where} is no JSON: {error}. Next: {advice}") from None


def _fields_of(entry: Any, where: str) -> dict[str, Any]:
    """The fields that an entry sets: an object, or a string, which is a prompt. UsageError."""
    entry = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise UsageError(f'{where} is neither an object nor a string: say {{"prompt": "a red apple", "seed": 1}}')
    fields = dict(zip(_columns(entry, where), entry.values(), strict=True))
    for name, value in fields.items():
        if isinstance(value, bool) and not FIELDS[name].const:
            raise UsageError(f"{where}: {FIELDS[name].flag} must be {FIELDS[name].expected}, not {str(value).lower()}")
    if fields.get("lora") is not None:
        fields["lora"] = groups_of(fields["lora"], f"{where}: lora")
    return {name: value for name, value in fields.items() if value is not None}


READERS: dict[str, Callable[[str, str], Iterator[Line]]] = {
    ".csv": _read_table,
    ".tsv": partial(_read_table, delimiter="\t"),
    ".tab": partial(_read_table, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".jsonlines": _read_jsonl,
    ".ndjson": _read_jsonl,
}
"""suffix -> reader, for files that are not plain text"""


def _columns(names: Iterable[str], where: str, advice: str = "") -> list[str]:
    """The request's fields for column names or keys; empty names at the end are dropped.

    UsageError for an unknown name, with the nearest known name or the advice, and for a field that occurs twice.
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


def _read_bytes(path: str, name: str) -> bytes:
    """The bytes of a file or of standard input. FileError."""
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
        raise FileError(f"{name}: a file of prompts has at most {MAX_BYTES:,} bytes. Next: split it")
    return data
