"""A folder's table of pictures, as of Hugging Face's imagefolder: `metadata.jsonl`, or `metadata.parquet`."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FileError, UsageError

TABLES: Mapping[str, str] = MappingProxyType({"jsonl": "metadata.jsonl", "parquet": "metadata.parquet"})
"""files by their kind"""
CAPTIONS = ("text", "prompt", "caption")
"""the column of captions is one of these; pictures are in `file_name`"""


def parquet_modules() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. UsageError where they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UsageError("captions are kept in parquet, which needs pyarrow. Next: pip install pyarrow") from None
    return pyarrow, parquet


def table_in(folder: Path) -> Path | None:
    """A folder's table, if there is one. FileError where there are two."""
    found = [file for name in TABLES.values() if (file := folder / name).is_file()]
    if len(found) > 1:
        raise FileError(f"{folder} has {' and '.join(TABLES.values())}. Next: move one of them away")
    return found[0] if found else None


def rows_of(file: Path, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a table, each with where it is: `FILE, line 3` or `FILE, row 3`. A line's value may be anything.

    columns: those that are used: of parquet no others are read, which may be pictures. FileError for a table that
    cannot be read; UsageError for parquet without pyarrow.
    """
    yield from _of_parquet(file, columns) if file.name == TABLES["parquet"] else _of_lines(file)


def _of_lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield f"{file}, line {number}", value


def _of_parquet(file: Path, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Without what is null in a row."""
    arrow, parquet = parquet_modules()
    try:
        with parquet.ParquetFile(file) as table:
            rows = table.read([name for name in table.schema_arrow.names if name in columns]).to_pylist()
    except (OSError, ValueError, OverflowError, arrow.ArrowException) as error:  # of a date beyond Python's
        raise FileError(f"{file} cannot be read: {error}. Next: write it again, or move it away") from None
    for number, row in enumerate(rows, 1):
        yield f"{file}, row {number}", {key: value for key, value in row.items() if value is not None}
