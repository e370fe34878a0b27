"""Encoded captions in a folder of parquet files: T5's tokens and CLIP's vector of each text that a run may draw.

A row is named by a hash of its text and of all else that its numbers depend on, so it is never taken for another one;
equal texts are one row, with the first picture that has it. The numbers are the encoders' own bytes. A file is a part
with a few rows and appears whole, so that a run that was killed goes on behind the last one. Each row is a row group,
read without the others. There is no date, path or host in a file: equal texts are equal bytes.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FileError, NonFiniteError
from ..files import disk_errors, write_whole
from ..terminal import note
from .captions import COMMON, variants
from .data import Picture
from .tables import parquet_modules

FORMAT = 1
ROWS = 16
"""of a part: 64 MB of FLUX.1-dev's"""
PART, FOUND = "texts-{:05d}.parquet", re.compile(r"texts-(\d{5,})\.parquet")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Encode = Callable[[str], tuple[Tensor, Tensor]]
"""text tokens [1, T, D] and vector [1, V] of a text"""


class Text(NamedTuple):
    """A text that a run may draw."""

    sha256: str
    """of the picture's file; empty for texts that all pictures have in common"""
    kind: str
    caption: str


class Row(NamedTuple):
    """A text and what the encoders make of it."""

    text: Text
    txt: Tensor
    """[T, D]"""
    vec: Tensor
    """[V]"""


def texts_of(
    pictures: Iterable[Picture],
    trigger: str = "",
    shuffles: int = 0,
    keep: int = 0,
    seed: int = 0,
    wildcards: int = 0,
    separator: str = "",
) -> list[Text]:
    """All texts that a run with these pictures may draw, as of `variants`: those in common, then each picture's."""
    common = {kind: text for kind, text in variants("", trigger).items() if kind in COMMON}
    found = [Text("", kind, text) for kind, text in common.items()]
    for one in pictures:
        own = variants(one.caption, one.word(trigger), shuffles, keep, seed, wildcards, separator)
        found += [Text(one.sha256, kind, text) for kind, text in own.items() if common.get(kind) != text]
    return found


class TextCache:
    """A folder of encoded texts. It is read when this is made, and written by `add` only."""

    def __init__(self, folder: Path, depends: str) -> None:
        """depends: all that an encoding depends on beside its text. UsageError without pyarrow.

        Every row is read once and checked; a part with a damaged one is told, and none of its rows is used.
        """
        parquet_modules()
        self.folder, self.depends = folder, depends
        self._keys = {path: _keys_of(path) for path in _parts(folder)}
        self._index()
        self._wanted: dict[tuple[str, str], str] = {}

    def key(self, caption: str) -> str:
        """A hash of a text and all else that its encoding depends on."""
        return sha256(json.dumps([FORMAT, self.depends, caption]).encode()).hexdigest()

    def missing(self, wanted: Iterable[Text]) -> list[Text]:
        """The texts of a run that are not there, each once. From now on `get`, `digest` and `stale` are of this run."""
        texts = list(wanted)
        self._wanted = {(text.sha256, text.kind): self.key(text.caption) for text in texts}
        first = {self.key(text.caption): text for text in reversed(texts)}
        return [first.pop(key) for key in self._wanted.values() if key in first and key not in self._places]

    @property
    def stale(self) -> int:
        """Rows that the run has no use for: of another text, or of encoders that were others."""
        return len(self._places.keys() - set(self._wanted.values()))

    @property
    def digest(self) -> str:
        """A short hash of what the run wants, in its order."""
        return sha256(json.dumps([[*place, key] for place, key in self._wanted.items()]).encode()).hexdigest()[:16]

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows as a new part, whole or not at all. DiskError."""
        with disk_errors(self.folder, "folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
        keys = [self.key(row.text.caption) for row in rows]
        table = [_written(row, key) for row, key in zip(rows, keys, strict=True)]
        path = self.folder / PART.format(max((_number(path) for path in self._keys), default=-1) + 1)
        write_whole(path, _parquet_bytes(table))
        self._keys[path] = keys
        self._index()

    def get(self, sha256: str, kind: str) -> tuple[Tensor, Tensor]:
        """Text tokens [T, D] and vector [V] of a picture's text of the run, on the CPU in the encoders' dtype.

        KeyError for one that the run of `missing` does not want, or that was not added. FileError.
        """
        key = self._wanted.get((sha256, kind)) or self._wanted["", kind]
        path, number = self._places[key]
        try:
            return _row(_open(path), number)[1:]
        except _damages() as error:
            raise FileError(f"{path} could not be read: {error}. Next: start again, and it is made again") from error

    def drop_stale(self) -> None:
        """Delete parts that hold nothing for the run, damaged ones too. DiskError."""
        wanted = set(self._wanted.values())
        for path in [path for path, keys in self._keys.items() if wanted.isdisjoint(keys)]:
            with disk_errors(path, "folder"):
                path.unlink(missing_ok=True)
            del self._keys[path]
        self._index()

    def _index(self) -> None:
        self._places = {key: (path, i) for path, keys in self._keys.items() for i, key in enumerate(keys)}


def build(
    cache: TextCache, texts: Sequence[Text], encode: Encode, on_row: Callable[[Text], object] | None = None
) -> None:
    """Encode what is missing of a run's texts, in their order. on_row: called after each.

    Whatever ends it, Ctrl-C too, rows that are encoded are written first. DiskError; NonFiniteError names the text.
    """
    missing = cache.missing(texts)
    if missing and cache.stale:
        note(
            f"{cache.folder} has {cache.stale} encoded captions of other captions, encoders or settings, which are not "
            f"used; {len(missing)} are encoded"
        )
    cache.drop_stale()
    rows: list[Row] = []
    try:
        for text in missing:
            txt, vec = (x[0].detach().cpu() for x in encode(text.caption))
            if not (txt.isfinite().all() and vec.isfinite().all()):
                raise NonFiniteError(
                    f"the encoders make NaN or infinity of {text.caption!r}. Next: another precision of theirs"
                )
            rows.append(Row(text, txt, vec))
            if len(rows) == ROWS:
                cache.add(rows)
                rows = []
            if on_row is not None:
                on_row(text)
    finally:
        if rows:
            cache.add(rows)


# Files -------------------------------------------------------------------------------------------------


def _parts(folder: Path) -> list[Path]:
    """A folder's parts, the oldest first."""
    return sorted((x for x in folder.iterdir() if FOUND.fullmatch(x.name)), key=_number) if folder.is_dir() else []


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _schema() -> Any:
    arrow, _ = parquet_modules()
    words = [(name, arrow.string()) for name in ("sha256", "kind", "caption", "key")]
    numbers = [
        (f"{name}{end}", kind)
        for name in ("txt", "vec")
        for end, kind in (("", arrow.binary()), ("_shape", arrow.list_(arrow.int64())), ("_dtype", arrow.string()))
    ]
    return arrow.schema([*words, *numbers])


def _parquet_bytes(table: list[dict[str, Any]]) -> bytes:
    """A file of rows, each a row group with a checksum for each column; numbers of encoders are not worth packing."""
    arrow, parquet = parquet_modules()
    sink = arrow.BufferOutputStream()
    parquet.write_table(
        arrow.Table.from_pylist(table, _schema()), sink, row_group_size=1, compression="none", use_dictionary=False,
        write_statistics=False, store_schema=False, write_page_checksum=True,
    )  # fmt: skip
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _open(path: Path) -> Any:
    """A part, of which checksums are compared when a row is read."""
    return parquet_modules()[1].ParquetFile(path, page_checksum_verification=True)


def _keys_of(path: Path) -> list[str]:
    """The keys of a part's rows, all of which are read; none where one is damaged."""
    try:
        part = _open(path)
        return [_row(part, number)[0] for number in range(part.num_row_groups)]
    except _damages():
        note(f"{path} is damaged, or could not be read: its captions are encoded again")
        return []


def _damages() -> tuple[type[Exception], ...]:
    """What reading a damaged part may raise."""
    return (parquet_modules()[0].ArrowException, OSError, ValueError, KeyError, TypeError, RuntimeError)


def _row(part: Any, number: int) -> tuple[str, Tensor, Tensor]:
    """Key, txt and vec of a part's row."""
    (row,) = part.read_row_group(number).to_pylist()
    txt, vec = (
        torch.frombuffer(bytearray(row[name]), dtype=DTYPES[row[f"{name}_dtype"]]).reshape(row[f"{name}_shape"])
        for name in ("txt", "vec")
    )
    return row["key"], txt, vec


def _written(row: Row, key: str) -> dict[str, Any]:
    """A row as the file has it."""
    found: dict[str, Any] = {**row.text._asdict(), "key": key}
    for name, x in (("txt", row.txt), ("vec", row.vec)):
        data = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        found |= {name: data, f"{name}_shape": list(x.shape), f"{name}_dtype": str(x.dtype).removeprefix("torch.")}
    return found
