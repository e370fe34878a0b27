"""The captions of a folder's pictures: what is there, and how new ones are written, whole whenever a run is killed.

`txt` is a file beside each picture, `jsonl` and `parquet` are one table (`training/tables.py`). A caption is first a
line of a journal, one write and one fsync, and a .txt is written from that; a table is written once, from all of the
journal, which then is removed. So what a killed run did is in its journal, and the next run begins with that: where
settings are the same it goes on behind it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import FileError, UsageError
from ..files import append_synced, disk_errors, write_whole
from ..images.pictures import open_picture
from ..session.sharing import alone
from ..training.data import ENDINGS, caption_beside
from ..training.tables import CAPTIONS, TABLES, parquet_modules

JOURNAL, LOCK = "captions.part.jsonl", ".captions.lock"
Row = dict[str, Any]
"""of a table: file_name, text, sha256 of the picture's file, and whatever else a user's own has"""


def pictures_in(folder: Path) -> list[Path]:
    """The files in a folder, and in those in it, that are named as pictures. UsageError where there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder. Next: name a folder of pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise UsageError(f"{folder} has no pictures. Next: a folder with {', '.join(ENDINGS)}")
    return found


class Captions:
    """The captions of a folder."""

    def __init__(self, folder: Path, to: str, settings: Mapping[str, Any]) -> None:
        """to: txt, jsonl or parquet. settings: all that captions depend on, to tell whether a journal is of this run.

        FileError for a table that cannot be read, UsageError for parquet without pyarrow, DiskError.
        """
        self.folder, self.to, self.settings = folder, to, dict(settings, to=to)
        self.done: dict[str, Row] = {}
        """by this run, or by one of the same settings that was stopped"""
        if to == "parquet":
            parquet_modules()
        self._take_up()
        self.rows = _read_table(folder, to)

    def name_of(self, path: Path) -> str:
        """A picture's name in tables."""
        return path.relative_to(self.folder).as_posix()

    def of(self, path: Path) -> str:
        """A picture's caption: in the table, else beside it; empty without one. FileError for one that is no text."""
        row = self.rows.get(self.name_of(path), {})
        return next((row[key] for key in CAPTIONS if key in row), "") or caption_beside(path).strip()

    def doubles(self, paths: Iterable[Path]) -> dict[Path, Path]:
        """Pictures whose caption would be written over that of another before them, as `a.png` behind `a.jpg`."""
        if self.to != "txt":
            return {}
        firsts: dict[Path, Path] = {}
        pairs = [(path, firsts.setdefault(path.with_suffix(".txt"), path)) for path in paths]
        return {path: first for path, first in pairs if path != first}

    def put(self, path: Path, text: str, sha256: str) -> None:
        """Keep a caption. sha256: of the picture's file. DiskError."""
        row = {"file_name": self.name_of(path), "text": text, "sha256": sha256}
        self._append(row)
        self._apply(row)

    def adopt(self, path: Path, text: str) -> None:
        """Give a caption that is beside a picture a row in the table, if there is one: `train` reads no other then."""
        if self.to in TABLES and self.name_of(path) not in self.rows:
            self.put(path, " ".join(text.split()), open_picture(path)[1])

    def close(self) -> None:
        """Write the table, if there is one, and remove the journal. DiskError."""
        if self.to in TABLES:
            _write_table(self.folder, self.to, self.rows | self._merged())
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def _apply(self, row: Row) -> None:
        self.done[row["file_name"]] = row
        if self.to == "txt":
            write_whole((self.folder / row["file_name"]).with_suffix(".txt"), row["text"] + "\n")

    def _merged(self) -> dict[str, Row]:
        """The rows of this run, with what a table already had beside their captions."""
        merged = {}
        for name, row in self.done.items():
            old = self.rows.get(name, {})
            key = next((key for key in CAPTIONS if key in old), CAPTIONS[0])
            merged[name] = {"file_name": name, **old, key: row["text"], "sha256": row["sha256"]}
        return merged

    def _append(self, line: Mapping[str, Any]) -> None:
        """Add a line to the journal, whose first are the settings."""
        journal = self.folder / JOURNAL
        begun = journal.is_file() and journal.stat().st_size
        lines = [line] if begun else [{"settings": self.settings}, line]
        with disk_errors(journal):
            append_synced(journal, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines).encode())

    def _take_up(self) -> None:
        """Begin with the journal of a run that was stopped: go on with it, or first write what it has, as it would."""
        lines = list(_lines(self.folder / JOURNAL))
        if not lines:
            (self.folder / JOURNAL).unlink(missing_ok=True)
            return
        settings, *rows = lines
        if settings.get("settings") == self.settings:
            self.done = {row["file_name"]: row for row in rows}
            for row in rows[-1:]:  # it may have been killed between the two
                self._apply(row)
            write_whole(self.folder / JOURNAL, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
            return
        to = settings.get("settings", {}).get("to", "txt")
        other = object.__new__(Captions)
        other.folder, other.to, other.rows = self.folder, to, _read_table(self.folder, to)
        other.done = {row["file_name"]: row for row in rows}
        for row in rows[-1:]:
            other._apply(row)
        other.close()


def only_captioner(folder: Path) -> AbstractContextManager[None]:
    """Lock a folder while the block runs. UsageError where another process captions it, DiskError."""
    return alone(folder / LOCK, f"another process captions {folder}")


# Tables ------------------------------------------------------------------------------------------------


def _lines(journal: Path) -> Iterator[Row]:
    """The lines of a journal up to the first that is cut off."""
    for line in journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not line.endswith(b"\n") or not (_is_row(row, journal.parent) or _is_first(row)):
            return
        yield row


def _is_first(row: Any) -> bool:
    """Whether it is as the first line of a journal: the settings."""
    return isinstance(row, dict) and isinstance(row.get("settings"), dict)


def _is_row(row: Any, folder: Path) -> bool:
    """Whether it is as other lines: of a picture in that folder, so that nothing is ever written beside it."""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text", "sha256")):
        return False
    return (folder / row["file_name"]).parent.resolve().is_relative_to(folder.resolve())


def _read_table(folder: Path, to: str) -> dict[str, Row]:
    """The rows of a folder's table by the pictures' names; none for txt, or without a table. FileError."""
    if to not in TABLES or not (file := folder / TABLES[to]).is_file():
        return {}
    try:
        if to == "parquet":
            rows = parquet_modules()[1].read_table(file).to_pylist()
        else:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        for row in rows:
            if not all(isinstance(row[key], str) for key in ("file_name", *CAPTIONS) if row.get(key) is not None):
                raise ValueError(f"{row['file_name']!a} has a caption that is no text")
        return {row["file_name"]: {key: x for key, x in row.items() if x is not None} for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{file} could not be read, and is left as it is: {error}. Next: mend it, or move it away"
        ) from None


def _write_table(folder: Path, to: str, rows: Mapping[str, Row]) -> None:
    """Write a folder's table, whole."""
    if to == "jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
        write_whole(folder / TABLES[to], "".join(lines))
        return
    arrow, parquet = parquet_modules()
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    sink = arrow.BufferOutputStream()
    parquet.write_table(
        arrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows.values()]), sink
    )
    write_whole(folder / TABLES[to], sink.getvalue().to_pybytes())
