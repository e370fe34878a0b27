"""The header of a safetensors file, read and checked in plain Python, before torch is imported; GGUF is in `gguf.py`.

The format: eight bytes with the header's length, little-endian; the header, JSON, a tensor's dtype, shape and place for
each name; the tensors' bytes without holes (github.com/huggingface/safetensors). Everything that the library refuses is
refused here, and also a name that comes twice and more tensors than any FLUX file has. An error says what the file is
instead, where its first bytes show it.
"""

import io
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FileError

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
WEIGHT_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""the dtypes that weights may have, the file's name -> torch's; `scales.py` finds what fp8 is multiplied with"""
MAX_HEADER = 100_000_000
"""bytes, as in the library"""
MAX_TENSORS = 20_000
MOST = 2**30
"""bytes in one read: macOS takes no more than 2 GiB"""
METADATA = "__metadata__"
AGAIN = "Next: fetch it again."

_KINDS = (  # first bytes, lower case -> what the file is, and the next step
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the file itself. Next: run `git lfs pull` in its repository",
    ),
    (b"<!doctype", "is an HTML page, likely an error that was saved. Next: fetch the file again, logged in"),
    (b"<html", "is an HTML page, likely an error that was saved. Next: fetch the file again, logged in"),
    (b"{", "is JSON text, likely an error that was saved or an index. Next: fetch the file itself"),
    (b"pk\x03\x04", "is a zip, likely a PyTorch pickle, which is never opened. Next: fetch the safetensors file"),
    (b"\x80", "is a pickle, which is never opened. Next: fetch the safetensors file"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype as the file writes it, its shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    path: Path
    size: int
    """bytes of the whole file"""
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    is_gguf: bool = False
    """whether it is of a GGUF file (`gguf.py`), where tensors may be blocks of codes"""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.tensors.items()}


def read_header(path: str | Path) -> Header:
    """The header of a safetensors or GGUF file, checked. FileError says what is wrong with it or what it is instead."""
    path = Path(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(32)
        if start[:4] == b"GGUF" or path.suffix.lower() == ".gguf":
            from .gguf import read_gguf

            return replace(read_gguf(path), is_gguf=True)
        if len(start) < 8:
            raise FileError(f"{path} is empty or truncated ({size} bytes). {AGAIN}")
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER or start[8:9] != b"{":
            raise FileError(f"{path} ({size:,} bytes) {_kind_of(start)}.")
        if length > size - 8:
            raise FileError(f"{path} is cut off: its header takes {length:,} bytes, the file has {size:,}. {AGAIN}")
        file.seek(8)
        text = file.read(length)
    entries, metadata = _parse(path, text)
    data = 8 + length
    tensors = {name: _entry(path, name, entry, data) for name, entry in entries.items()}
    _check_places(path, tensors, data, size)
    return Header(path, size, tensors, metadata)


def _kind_of(start: bytes) -> str:
    """The kind of a file that is no safetensors file, by its first bytes."""
    first = start.lower().lstrip()
    known = (text for mark, text in _KINDS if first.startswith(mark))
    return next(known, "is no safetensors file, or its first bytes are damaged. Next: fetch it again")


def open_file(path: Path) -> io.BufferedReader:
    """A regular file, open for reading. FileError for anything else, so that nothing waits for a pipe."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise FileError(f"{path} is a folder. Next: give the .safetensors file in it.")
        if not stat.S_ISREG(mode):
            raise FileError(f"{path} is no regular file. Next: give a .safetensors file.")
        return path.open("rb")
    except FileNotFoundError:
        dangling = " is a link to something that" if path.is_symlink() else ""
        raise FileError(f"{path}{dangling} does not exist. Next: check the path.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} could not be read: {getattr(error, 'strerror', None) or error}.") from None


def read_into(memory: memoryview, file: io.BufferedReader, path: Path, start: int) -> None:
    """Fill `memory` with a file's bytes from `start` on. FileError if they can't be read or are no longer there."""
    try:
        while memory and (count := _read_at(file, memory, start)):
            memory, start = memory[count:], start + count
    except OSError as error:
        raise FileError(f"{path} could not be read: {error.strerror or error}.") from None
    if memory:
        raise FileError(f"{path} became shorter while it was read. Next: wait until it is all there, and try again.")


def read_tensor_bytes(header: Header, name: str, most: int) -> bytes:
    """The bytes of a small tensor. FileError if there are more than `most`."""
    entry = header.tensors[name]
    if (size := entry.end - entry.start) > most:
        raise _damaged(header.path, name, f"takes {size:,} bytes, and {most:,} are the most that make sense")
    memory = bytearray(size)
    with open_file(header.path) as file:
        read_into(memoryview(memory), file, header.path, entry.start)
    return bytes(memory)


def _read_at(file: io.BufferedReader, memory: memoryview, start: int) -> int:
    """Read as much as one call gives; the number of bytes, 0 at the file's end. `preadv` releases the GIL just once."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [memory[:MOST]], start)
    file.seek(start)
    return file.readinto(memory)


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's JSON as entries and metadata. FileError for what the library refuses: Python's parser takes more."""
    if text.count(b'"dtype"') > MAX_TENSORS:
        raise _too_many(path)
    objects = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MAX_TENSORS + 2:
            raise _too_many(path)
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice[:80]!a} comes twice")
        for name in found:
            name.encode()  # half a surrogate pair is no text
        return found

    def whole(digits: str) -> int:
        if digits.startswith("-") or len(digits) > 20:
            raise ValueError(f"{digits[:40]} is no size")
        return int(digits)

    def no_number(digits: str) -> float:
        raise ValueError(f"{digits[:40]} is no whole number")

    try:
        found = json.loads(
            text.decode(), object_pairs_hook=unique, parse_int=whole, parse_float=no_number, parse_constant=no_number
        )
        metadata = found.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"{METADATA} is no table of texts")
        for value in metadata.values():
            value.encode()
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: the header is damaged: {error}. {AGAIN}") from None
    return found, metadata


def _too_many(path: Path) -> FileError:
    return FileError(f"{path} lists more than {MAX_TENSORS:,} tensors: that is no FLUX file. {AGAIN}")


def _entry(path: Path, name: str, entry: Any, data: int) -> Entry:
    """One tensor's entry, with its place counted from the start of the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, name, "is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FileError(f"{path}: tensor {name[:80]!a} has the unknown dtype {str(dtype)[:20]!a}. {AGAIN}")
    whole = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**63 for n in whole) or len(offsets) != 2:
        raise _damaged(path, name, "has no sizes or places that are whole numbers")
    start, end = offsets
    if end - start != math.prod(shape) * BITS[dtype] // 8:
        raise _damaged(
            path, name, f"takes {end - start:,} bytes, {list(shape)[:8]} of {dtype} would take another number"
        )
    return Entry(dtype, tuple(shape), data + start, data + end)


def _check_places(path: Path, tensors: Mapping[str, Entry], data: int, size: int) -> None:
    """FileError unless every byte behind the header belongs to exactly one tensor."""
    end = data
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise _damaged(path, name, "overlaps another or leaves a hole before it")
        end = entry.end
    if size < end:
        raise FileError(f"{path} is cut off: it should have {end:,} bytes and has {size:,}. {AGAIN}")
    if size > end:
        raise FileError(f"{path} has {size - end:,} bytes more than its header knows of: it is damaged. {AGAIN}")


def _damaged(path: Path, name: str, finding: str) -> FileError:
    return FileError(f"{path}: the header is damaged: tensor {name[:80]!a} {finding}. {AGAIN}")
