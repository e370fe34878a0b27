"""The files of one network's weights, by their headers: one file, or a folder of shards with an index. No torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import FileError
from ..linears.gguf_types import PLAIN, TYPES
from .header import Header, open_file, read_header
from .identify import Identity, Part, identify
from .stored import Storage, Stored

T = TypeVar("T")

SUFFIXES = (".safetensors", ".sft")
"""of safetensors; Black Forest Labs' first ones ended in the shorter"""
WEIGHTS = (*SUFFIXES, ".gguf")
"""of all files of weights"""
INDEX = re.compile(r"(?P<name>.+)\.(?:safetensors|sft)\.index(?P<variant>\.[^.]+)?\.json")
NUMBERED = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})(?P<variant>(?:\.[^.]+)?)")
"""a shard's name without its suffix. The variant is here where diffusers once wrote it, else it is in the name"""
MAX_INDEX = 16 << 20


class Span(NamedTuple):
    """The file and range of a tensor's bytes. Spans sort by file, then by start."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """The headers of all files of one network, not yet opened for reading."""

    path: Path
    """the file or folder that was named"""
    headers: tuple[Header, ...]
    index: Path | None = None
    """the file that names the shards"""

    @property
    def size(self) -> int:
        return sum(header.size for header in self.headers)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for header in self.headers for name, shape in header.shapes.items()}

    @cached_property
    def stored(self) -> Storage:
        """The weights of other shapes than their tensors, or with numbers in no dtype of torch's. FileError.

        Weights that have a scale besides are found by `scales.find_scales`.
        """
        from .bnb import find_bnb

        of, names = find_bnb(self)
        for header in self.headers:
            for name, entry in header.tensors.items():
                if header.is_gguf and entry.dtype in TYPES and entry.dtype not in PLAIN:
                    of[name] = Stored("gguf", entry.shape, {"weight": name}, {"type": entry.dtype})
        return Storage(of, names)

    @cached_property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights, without tensors that are a part of another."""
        of, names = self.stored
        return {x: of[x].shape if x in of else shape for x, shape in self.shapes.items() if x not in names}

    def identity(self, part: Part = "transformer") -> Identity:
        """The network in it. part: which to find where there are several."""
        architecture = next((header.metadata.get("general.architecture") for header in self.headers), None)
        return identify(self.weights, part, architecture)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: entry.dtype for header in self.headers for name, entry in header.tensors.items()}

    @cached_property
    def headers_of(self) -> dict[str, Header]:
        """The header of the file that has a tensor."""
        return {name: header for header in self.headers for name in header.tensors}

    @cached_property
    def spans(self) -> dict[str, Span]:
        return {
            name: Span(header.path, entry.start, entry.end)
            for header in self.headers
            for name, entry in header.tensors.items()
        }


def is_weights(path: Path) -> bool:
    """Whether a file's name says that it holds weights."""
    return path.suffix.lower() in WEIGHTS


def find_source(path: Path) -> Source:
    """The files of a path: itself, or a folder's only set of weights. FileError where it has none, or several.

    A set is one file, or the shards that an index names or that are numbered. A variant (`model.fp16`) is ignored where
    the folder has the plain set (`model`), too.
    """
    if not path.is_dir():
        return Source(path, (read_header(path),))
    files, indices = _sets(path)
    found = f"{sum(map(len, files.values()))} files of weights and {len(indices)} indices" if files or indices else ""
    indices, files = _plain(indices, {*indices, *files}), _plain(files, {*indices, *files})
    if len(indices) == 1:
        (index,) = indices.values()
        return Source(path, _headers(_shards(index)), index)
    if not indices and len(files) == 1:
        (parts,) = files.values()
        if (whole := _whole(parts)) is not None:
            return Source(path, _headers(whole))
    raise FileError(
        f"{path} is a folder with {found or 'no file of weights'}. Next: name the file itself, or a folder with one "
        "set of weights."
    )


def file_in(path: Path, names: Sequence[str]) -> Path:
    """The safetensors file that a path means: itself, or in a folder the one of these names (without suffixes), the
    first that is there, or the only one. FileError."""
    if not path.is_dir():
        return path
    files = [file for file in _listed(path) if file.suffix in SUFFIXES]
    named = [file for name in names for file in files if file.stem == name]
    if named or len(files) == 1:
        return (named or files)[0]
    found = f"{len(files)} safetensors files and no {names[0]}.safetensors" if files else "no safetensors file"
    raise FileError(f"{path} is a folder with {found}. Next: name the file itself.")


def _headers(shards: list[Path]) -> tuple[Header, ...]:
    """The headers of all shards. FileError for a tensor that two of them hold."""
    headers, homes = tuple(read_header(shard) for shard in shards), dict[str, Path]()
    for header in headers:
        for name in header.tensors:
            if (other := homes.setdefault(name, header.path)) != header.path:
                raise FileError(f"{header.path}: tensor {name[:80]!a} is in {other.name}, too. Next: fetch both again.")
    return headers


def _sets(folder: Path) -> tuple[dict[str, list[Path]], dict[str, Path]]:
    """The files and the indices in a folder, by the names of their sets, such as `model` and `model.fp16`."""
    files: dict[str, list[Path]] = {}
    indices = {}
    for file in _listed(folder):
        if is_weights(file):
            shard = NUMBERED.fullmatch(file.stem)
            files.setdefault(shard["name"] + shard["variant"] if shard else file.stem, []).append(file)
        elif index := INDEX.fullmatch(file.name):
            indices[index["name"] + (index["variant"] or "")] = file
    return files, indices


def _listed(folder: Path) -> list[Path]:
    """The files in a folder, sorted, without hidden ones (macOS leaves `._model.safetensors` on foreign disks)."""
    try:
        return sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{folder} could not be read: {reason}. Next: check its permissions.") from None


def _plain(sets: dict[str, T], names: set[str]) -> dict[str, T]:
    """The sets that are no variants of another."""
    return {name: files for name, files in sets.items() if not any(name.startswith(f"{x}.") for x in names)}


def _whole(files: list[Path]) -> list[Path] | None:
    """The one file, or all shards of one numbering; None for anything else. FileError for a missing shard."""
    shards = [NUMBERED.fullmatch(file.stem) for file in files]
    first, folder = shards[0], files[0].parent
    if first is None:
        return files if len(files) == 1 else None
    if len({(shard and shard["count"], file.suffix) for shard, file in zip(shards, files, strict=True)}) > 1:
        return None
    count, end = int(first["count"]), first["variant"] + files[0].suffix
    names = [f"{first['name']}-{i:05}-of-{count:05}{end}" for i in range(1, min(count, 1000) + 1)]
    for name in names:
        if not (folder / name).is_file():
            raise FileError(f"{folder} lacks the shard {name}. Next: fetch it, too.")
    return [folder / name for name in names]


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
