"""A session's `metadata.csv`: a row for every picture, with all that repeats it.

The first columns are those of exploration notebooks, ours follow them. `Request` is what counts: the JSON that the
picture itself carries. So missing rows are made from the pictures. What we never write (a byte order mark, CR, NUL,
other columns) is refused with its line. A last line without an end was cut off while it was written, and is ignored.
"""

import csv
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError, UsageError
from ..files import disk_errors, write_whole
from ..images.metadata import KEY, read_texts
from ..terminal import note, printable

NAME = "metadata.csv"
COLUMNS = (
    *("Time", "Seed", "Width", "Height", "Steps", "Guidance", "LoraScale", "Prompt"),
    *("File", "SHA256", "Model", "Version", "Request"),
)
Row = dict[str, str]
_FILE = re.compile(r"\w+_images/[\w.+-]+\.png")
"""our own names only, so that no row can point outside its folder"""
csv.field_size_limit(1 << 24)  # by itself 131,072 characters, fewer than a long prompt takes as JSON


def row_of(folder: Path, file: str) -> Row:
    """The row of a picture, from its own metadata. FileError, UsageError."""
    text = read_texts(folder / file).get(KEY)
    if text is None:
        raise UsageError(f"{folder / file} does not say how it was made: move it away, and it is drawn again")
    recorded: dict[str, Any] = json.loads(text)
    values = {
        "Time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime((folder / file).stat().st_mtime)),
        "Seed": recorded["seed"],
        "Width": recorded["width"],
        "Height": recorded["height"],
        "Steps": recorded["num_steps"],
        "Guidance": recorded.get("guidance", ""),
        "LoraScale": " ".join(f"{entry['scale']:g}" for entry in recorded.get("plan", ()) if entry["kind"] == "lora"),
        "Prompt": printable(recorded["prompt"]),
        "File": file,
        "SHA256": hashlib.sha256((folder / file).read_bytes()).hexdigest(),
        "Model": recorded["name"],
        "Version": recorded["version"],
        "Request": text,
    }
    return {column: str(values[column]) for column in COLUMNS}


def append(path: Path, row: Row) -> None:
    """Append a row, on the disk when this returns. A row that cannot be written whole is removed again. DiskError."""
    with disk_errors(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        data = _text([list(row.values())]).encode()
        try:
            while data:  # a full disk takes a part first, and says why with the next one
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


def mend(folder: Path, files: Sequence[str]) -> None:
    """Make the table hold the rows of all `files` that exist, in their order. Rows that it has are kept as they are."""
    path = folder / NAME
    known = {row["File"]: row for row in read_rows(path)} if path.is_file() else {}
    rows = [known.get(file) or row_of(folder, file) for file in files if (folder / file).is_file()]
    whole = _text([COLUMNS, *(list(row.values()) for row in rows)])
    if not path.is_file() or path.read_bytes() != whole.encode():
        write_whole(path, whole)


def _text(rows: Iterable[Sequence[str]]) -> str:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a table. FileError when it cannot be read, UsageError with the line of what is wrong."""
    rows = []
    for line, record in _records(path, _read(path)):
        try:
            values = next(csv.reader(io.StringIO(record, newline=""), strict=True))
        except csv.Error as error:
            raise _wrong(path, line, str(error)) from None
        if line == 1 and values != list(COLUMNS):
            raise _wrong(path, line, f"the columns are others than this version's, {', '.join(COLUMNS)}")
        if len(values) != len(COLUMNS):
            raise _wrong(path, line, f"{len(values)} columns, there should be {len(COLUMNS)}")
        row = dict(zip(COLUMNS, values, strict=True))
        if line > 1 and not _FILE.fullmatch(row["File"]):
            raise _wrong(path, line, f"{row['File']!a:.60} is no picture of a session")
        rows.append(row)
    return rows[1:]


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path} could not be read: {error.strerror}") from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if b"\n" in data[error.start :]:
            raise _wrong(path, data[: error.start].count(b"\n") + 1, "no UTF-8 text") from None
        text = data[: error.start].decode()  # the last line was cut off within a letter
    if text.startswith("\ufeff"):
        raise _wrong(path, 1, "a byte order mark: another program wrote it")
    if found := re.search("[\r\0]", text):
        what = "a carriage return" if found[0] == "\r" else "a NUL"
        raise _wrong(path, text[: found.start()].count("\n") + 1, f"{what}: another program wrote it")
    return text


def _records(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Line number and text of every row. A row ends where a line ends outside quotes."""
    first, lines, quotes = 1, [], 0
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        lines.append(line)
        quotes += line.count('"')
        if line.endswith("\n") and quotes % 2 == 0:
            yield first, "".join(lines)
            first, lines, quotes = number + 1, [], 0
    if lines:
        note(f"{path}, line {first}: half a line, cut off while it was written; it is left out")


def _wrong(path: Path, line: int, finding: str) -> UsageError:
    advice = "mend that line, or delete the file: explore --resume writes it anew from the pictures"
    return UsageError(f"{path}, line {line}: {finding}. Next: {advice}")
