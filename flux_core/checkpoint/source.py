"""The files of one network's weights, by their headers: one file, or a folder of shards with an index. No torch."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..errors import FileError
from .header import Header, open_file, read_header

INDEX = ".safetensors.index.json"
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
MAX_INDEX = 16 << 20


class Span(NamedTuple):
    """Where a tensor's bytes are. Their order is that of files and of places in a file."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """The headers of all files of one network, not yet opened for reading."""

    path: Path
    """what was named: a file or a folder"""
    headers: tuple[Header, ...]

    @property
    def size(self) -> int:
        return sum(header.size for header in self.headers)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for header in self.headers for name, shape in header.shapes.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: entry.dtype for header in self.headers for name, entry in header.tensors.items()}

    @cached_property
    def spans(self) -> dict[str, Span]:
        return {
            name: Span(header.path, entry.start, entry.end)
            for header in self.headers
            for name, entry in header.tensors.items()
        }


def find_source(path: Path) -> Source:
    """The files behind a path: itself, or a folder's one safetensors file, or its shards. FileError.

    Shards are those that an index names or, where none came with them, a whole row of numbered ones.
    """
    if not path.is_dir():
        return Source(path, (read_header(path),))
    indices, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return Source(path, tuple(read_header(shard) for shard in _shards(indices[0])))
    if len(files) == 1 and not NUMBERED.fullmatch(files[0].name):
        return Source(path, (read_header(files[0]),))
    if not indices and files and len({_row(file) for file in files}) == 1 and _row(files[0]):
        return Source(path, tuple(read_header(shard) for shard in _numbered(files)))
    found = f"{len(files)} safetensors files and {len(indices)} indices" if files or indices else "no safetensors file"
    raise FileError(
        f"{path} is a folder with {found}. Next: name the file itself, or a folder with one set of weights."
    )


def _row(file: Path) -> tuple[str, int] | None:
    """Stem and length of the row of shards that a file's name puts it in."""
    found = NUMBERED.fullmatch(file.name)
    return (found[1], int(found[3])) if found else None


def _numbered(files: list[Path]) -> list[Path]:
    """All shards of a row. FileError names the first that is missing."""
    stem, count = _row(files[0]) or ("", 0)
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, min(count, 1000) + 1)]
    for name in names:
        if not (files[0].parent / name).is_file():
            raise FileError(f"{files[0].parent} lacks the shard {name}. Next: fetch it, too.")
    return [files[0].parent / name for name in names]


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each beside it and there."""
    try:
        with open_file(index) as file:
            names = json.loads(file.read(MAX_INDEX))["weight_map"].values()
            shards = sorted({str(name) for name in names})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FileError(f"{index} is no index of shards. Next: fetch it again.") from None
    for name in shards:
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
            raise FileError(f"{index} names the shard {name[:80]!a}, which is not a file beside it: it is not opened.")
        if not (index.parent / name).is_file():
            raise FileError(f"{index} names the shard {name[:80]!a}, which is missing. Next: fetch it, too.")
    return [index.parent / name for name in shards]
