"""The header of a GGUF file, read and checked in plain Python before torch is imported, and a writer of such files.

The format, little-endian: `GGUF`; u32 version; u64 number of tensors; u64 number of key-value pairs; the pairs, each a
key, a u32 type and a value; for each tensor its name, u32 number of dimensions, u64 dimensions from the fastest to the
slowest, u32 type (`linears/gguf_types.py`) and u64 place; then the tensors' bytes, each at a multiple of the alignment
from where they begin. A string is a u64 length and its bytes. (github.com/ggml-org/ggml docs/gguf.md)

Every length and count comes from the file, so none of them is believed: nothing is allocated by one before the file has
been found to be that long, and what is counted is bounded. What ggml refuses is refused here, too.
"""

import io
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError
from ..files import disk_errors, temporary_beside
from ..linears.gguf_types import NAMES, PLAIN, TYPES, is_whole, size_of
from .header import AGAIN, MAX_HEADER, MAX_TENSORS, Entry, Header, open_file

if TYPE_CHECKING:
    from torch import Tensor

    Data = bytes | Tensor

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"
ORIG_SHAPE = "comfy.gguf.orig_shape."
"""key of the shape, in torch's order, of a tensor that is stored in another one; behind it stands the tensor's name"""

MAX_NAME = 127
"""bytes of a tensor's name, as stable-diffusion.cpp and city96's patch have it; plain ggml stops at 63"""
MAX_KEY = 65_535
MAX_DIMS = 4
MAX_PAIRS = 2 * MAX_TENSORS
MAX_ITEMS = 2**19
"""strings and arrays inside arrays: tokenizers of language models have up to 400,000"""
MAX_NESTING = 8
MAX_TEXT = 1000
"""bytes of a string that is kept as metadata"""

STRING, ARRAY, INT32, UINT32 = 8, 9, 5, 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""types of values -> struct's letters"""
SCALARS = {kind: struct.Struct(f"<{letter}") for kind, letter in _SCALARS.items()}

_KINDS = (  # first bytes, lower case -> what the file is, and the next step
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself. Next: run `git lfs pull` in its repository"),
    (b"<!doctype", "an HTML page, likely an error that was saved. Next: fetch the file again, logged in"),
    (b"<html", "an HTML page, likely an error that was saved. Next: fetch the file again, logged in"),
    (b"pk\x03\x04", "a zip, likely a PyTorch pickle, which is never opened. Next: fetch the GGUF or safetensors file"),
)


# Reading


def read_gguf(path: str | Path) -> Header:
    """The header of a GGUF file, checked. FileError says what is wrong with it, and with which tensor or key.

    Each entry's dtype is the name of its type ("Q4_K"), its shape is in torch's order. The metadata has the numbers and
    short strings among the pairs, as text.
    """
    path = Path(path)
    with open_file(path) as file:
        reader = _Reader(file, path)
        try:
            return reader.header()
        except OSError as error:
            raise FileError(f"{path} could not be read: {error.strerror or error}.") from None


class _Reader:
    """Reads one file from its start."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self.file, self.path, self.size, self.at = file, path, os.fstat(file.fileno()).st_size, 0
        self.here = "the start of the file"
        """what is being read, for errors"""
        self.alignment, self.items = 32, 0
        self.metadata: dict[str, str] = {}
        self.orig_shapes: dict[str, tuple[int, ...]] = {}

    def header(self) -> Header:
        tensors, pairs = self.counts()
        keys: set[str] = set()
        for i in range(pairs):
            self.pair(f"key {i + 1} of {pairs}", keys)
        found: dict[str, Entry] = {}
        for i in range(tensors):
            self.tensor(f"tensor {i + 1} of {tensors}", found)
        data = -(-self.at // self.alignment) * self.alignment
        found = {name: self.placed(name, entry, data) for name, entry in found.items()}
        self.check_overlaps(found)
        return Header(self.path, self.size, found, self.metadata)

    # What all parts are made of

    def damaged(self, finding: str, here: str | None = None) -> FileError:
        return FileError(f"{self.path}: the header is damaged: {here or self.here} {finding}. {AGAIN}")

    def need(self, count: int) -> None:
        """FileError unless the file has so many more bytes, in a header of bearable size."""
        if count > self.size - self.at:
            wanted = f"{self.at + count:,}" if count < 2**50 else f"2^{count.bit_length() - 1}"
            raise FileError(
                f"{self.path} is cut off or damaged: {self.here} should reach to byte {wanted}, the file has "
                f"{self.size:,}. {AGAIN}"
            )
        if self.at + count > MAX_HEADER:
            raise self.damaged(f"lies behind {MAX_HEADER:,} bytes, where no header reaches to")

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self.need(count)
        self.at += count
        self.file.seek(self.at)

    def number(self, kind: int) -> Any:
        """A value of a scalar type."""
        return SCALARS[kind].unpack(self.take(SCALARS[kind].size))[0]

    def u32(self) -> int:
        return self.number(UINT32)

    def u64(self) -> int:
        return self.number(10)

    def text(self, most: int) -> str:
        """A key or a name."""
        length = self.u64()
        if length > most:
            self.need(length)
            start = self.take(40).decode("ascii", "replace")
            raise self.damaged(f"has a name of {length:,} bytes, where {most:,} are the most: {start!a}…")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.damaged("has a name that is no text") from None

    def count_items(self, count: int) -> None:
        """Count elements that have to be looked at one by one."""
        self.need(8 * count)
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.damaged(f"has more than {MAX_ITEMS:,} strings: this is no file of an image model")

    # The parts

    def counts(self) -> tuple[int, int]:
        """The numbers of tensors and of pairs, behind magic and version."""
        if (magic := self.file.read(32))[:4] != MAGIC:
            raise FileError(f"{self.path} ({self.size:,} bytes) {_kind_of(magic)}.")
        self.skip(len(MAGIC))
        self.file.seek(self.at)
        version = self.u32()
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in (1, 2, 3):
                raise FileError(
                    f"{self.path} is big-endian (version {swapped} with its bytes swapped). "
                    "Next: fetch or make a little-endian file."
                )
            raise FileError(f"{self.path} is GGUF version {version}, and 2 and 3 are read. Next: fetch a newer file.")
        tensors, pairs = self.u64(), self.u64()
        if not tensors:
            raise FileError(f"{self.path} holds no tensors. Next: name a file of weights.")
        if tensors > MAX_TENSORS:
            raise FileError(f"{self.path} lists more than {MAX_TENSORS:,} tensors: that is no FLUX file. {AGAIN}")
        if pairs > MAX_PAIRS:
            raise FileError(f"{self.path} lists more than {MAX_PAIRS:,} key-value pairs: it is damaged. {AGAIN}")
        return tensors, pairs

    def pair(self, here: str, keys: set[str]) -> None:
        """Read a pair; keep it if it is short."""
        self.here = here
        key = self.text(MAX_KEY)
        self.here = f"key {key[:80]!a}"
        if key in keys:
            raise self.damaged("comes twice")
        keys.add(key)
        kind = self.u32()
        if key == ALIGNMENT:
            self.read_alignment(kind)
        elif key.startswith(ORIG_SHAPE):
            self.orig_shapes[key.removeprefix(ORIG_SHAPE)] = self.orig_shape(kind)
        elif kind in SCALARS:
            value = self.number(kind)
            self.metadata[key] = str(value).lower() if isinstance(value, bool) else str(value)
        elif kind == STRING:
            if (length := self.u64()) <= MAX_TEXT:
                self.metadata[key] = self.take(length).decode(errors="replace")
            else:
                self.skip(length)
        elif kind == ARRAY:
            self.skip_array()
        else:
            raise self.damaged(f"has a value of the unknown type {kind}")

    def read_alignment(self, kind: int) -> None:
        if kind != UINT32:
            raise self.damaged("is no u32")
        self.alignment = self.u32()
        if self.alignment.bit_count() != 1:
            raise self.damaged(f"is {self.alignment}, which is no power of two")
        self.metadata[ALIGNMENT] = str(self.alignment)

    def orig_shape(self, kind: int) -> tuple[int, ...]:
        if kind != ARRAY or self.u32() != INT32:
            raise self.damaged("is no array of i32")
        if (count := self.u64()) > 2 * MAX_DIMS:
            raise self.damaged(f"has {count} dimensions")
        shape = tuple(self.number(INT32) for _ in range(count))
        if any(n <= 0 for n in shape):
            raise self.damaged(f"is {list(shape)}, and dimensions are positive")
        return shape

    def skip_array(self) -> None:
        """Go past an array and those inside it, without a call inside a call."""
        left = [1]  # arrays still to come, for each depth
        while left:
            if not left[-1]:
                left.pop()
                continue
            left[-1] -= 1
            kind, count = self.u32(), self.u64()
            if kind in SCALARS:
                self.skip(count * SCALARS[kind].size)
            elif kind == STRING:
                self.count_items(count)
                for _ in range(count):
                    self.skip(self.u64())
            elif kind == ARRAY:
                self.count_items(count)
                left.append(count)
                if len(left) > MAX_NESTING:
                    raise self.damaged(f"has arrays nested more than {MAX_NESTING} deep")
            else:
                raise self.damaged(f"has elements of the unknown type {kind}")

    def tensor(self, here: str, found: dict[str, Entry]) -> None:
        """Read a tensor's entry, its place counted from where the tensors begin, into `found`."""
        self.here = here
        name = self.text(MAX_NAME)
        self.here = f"tensor {name!a}"
        if name in found:
            raise self.damaged("comes twice")
        if (count := self.u32()) > MAX_DIMS:
            raise self.damaged(f"has {count} dimensions, where {MAX_DIMS} are the most")
        shape = tuple(reversed([self.number(11) for _ in range(count)]))  # signed, as ggml has them
        if any(n <= 0 for n in shape) or math.prod(shape) >= 2**60:
            raise self.damaged(f"has the shape {list(shape)}, which no tensor can have")
        number, start = self.u32(), self.u64()
        kind = NAMES.get(number, f"of the unknown type {number}")
        if kind not in TYPES:
            raise FileError(
                f"{self.path}: tensor {name!a} is {kind}; the types that are read are {', '.join(TYPES)}. "
                "Next: take a file of one of these."
            )
        if not is_whole(kind, shape):
            raise self.damaged(
                f"has the shape {list(shape)}, whose rows are no whole blocks of {kind} ({TYPES[kind].block} values)"
            )
        if start % self.alignment:
            raise self.damaged(f"is at byte {start:,}, no multiple of the alignment {self.alignment}")
        found[name] = Entry(kind, self.true_shape(name, shape), start, start + size_of(kind, shape))

    def true_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the writer of a tensor says it had."""
        original = self.orig_shapes.get(name, shape)
        if math.prod(original) != math.prod(shape):
            raise self.damaged(f"is stored as {list(shape)} and {ORIG_SHAPE}… says {list(original)}, another number")
        return original

    def placed(self, name: str, entry: Entry, data: int) -> Entry:
        """The entry with its place counted from the start of the file."""
        if data + entry.end > self.size:
            raise FileError(
                f"{self.path} is cut off or damaged: tensor {name!a} should reach to byte {data + entry.end:,}, the "
                f"file has {self.size:,}. {AGAIN}"
            )
        return Entry(entry.dtype, entry.shape, data + entry.start, data + entry.end)

    def check_overlaps(self, found: Mapping[str, Entry]) -> None:
        end = 0
        for name, entry in sorted(found.items(), key=lambda item: item[1].start):
            if entry.start < end:
                raise self.damaged("overlaps another", f"tensor {name!a}")
            end = entry.end


def _kind_of(start: bytes) -> str:
    """What a file without GGUF's magic is, by its first bytes."""
    if start[8:9] == b"{":
        return "is a safetensors file, not GGUF. Next: give it a name that ends in .safetensors"
    first = start.lower().lstrip()
    known = (f"is {text}" for mark, text in _KINDS if first.startswith(mark))
    return next(known, f"is no GGUF file, or its first bytes are damaged. {AGAIN.removesuffix('.')}")


# Writing

Value = bool | int | float | str | Sequence[int]


def write_gguf(
    path: Path,
    tensors: "Mapping[str, tuple[str, tuple[int, ...], Data | Callable[[], Data]]]",
    metadata: Mapping[str, Value],
) -> None:
    """Write one GGUF file, version 3, on the disk before it takes its name. DiskError.

    tensors: type ("Q4_K"), shape in torch's order, and data or a function that returns them, called when their turn
    comes, so that one tensor is in memory at a time. Data are bytes, a uint8 tensor of them, or for a type without
    blocks (`PLAIN`) a tensor of numbers. ValueError for a tensor that can't be in a file, or for data of another
    size. metadata: e.g. "general.architecture"; whole numbers become u32 where they fit, and sequences of them arrays
    of i32.
    """
    pairs = [(key, value) for key, value in metadata.items() if key != ALIGNMENT]  # always that which readers assume
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(pairs))]
    parts += [_string(key) + _value(value) for key, value in pairs]
    places = _places((kind, shape) for kind, shape, _ in tensors.values())
    for (name, (kind, shape, _)), place in zip(tensors.items(), places, strict=True):
        if not name or len(name.encode()) > MAX_NAME or len(shape) > MAX_DIMS or 0 in shape:
            raise ValueError(f"tensor {name[:200]!a} {list(shape)} can't be in a GGUF file")
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_string(name) + dims + struct.pack("<IQ", TYPES[kind].number, place))
    temporary = temporary_beside(path.parent)
    with disk_errors(path, "--output"):
        try:
            with temporary.open("xb") as file:
                file.write(_padded(b"".join(parts)))
                for name, (kind, shape, data) in tensors.items():
                    raw = _raw(data() if callable(data) else data, kind)
                    if len(raw) != size_of(kind, shape):
                        raise ValueError(f"tensor {name!a}: {len(raw)} bytes for {list(shape)} of {kind}")
                    file.write(raw)
                    file.write(bytes(-len(raw) % 32))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _places(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> list[int]:
    """Where each tensor begins, from the first on."""
    at, places = 0, []
    for kind, shape in tensors:
        if not is_whole(kind, shape):
            raise ValueError(f"rows of {list(shape)} are no whole blocks of {kind}")
        places.append(at)
        at += -(-size_of(kind, shape) // 32) * 32
    return places


def _raw(data: Any, kind: str) -> memoryview:
    """The bytes of a tensor of that type."""
    if isinstance(data, bytes):
        return memoryview(data)
    import torch

    if data.dtype != torch.uint8:
        data = data.to(getattr(torch, PLAIN[kind]))
    return data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Value) -> bytes:
    """Type and value of a pair."""
    match value:
        case bool():
            kind = 7
        case int():
            kind = UINT32 if 0 <= value < 2**32 else 10 if value > 0 else 11
        case float():
            kind = 6
        case str():
            return struct.pack("<I", STRING) + _string(value)
        case _:
            return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    return struct.pack("<I", kind) + SCALARS[kind].pack(value)
