"""NF4 and FP4 weights in files, as bitsandbytes writes them: found and checked by headers and small tensors. No torch.

| tensor | what it is |
| --- | --- |
| `X.weight` | [ceil(n / 2), 1] bytes, two codes in each; of dtype U8, or any with that many bytes |
| `X.weight.absmax` | one number for each block: F32, or U8 if it is quantized in its turn (double quantization) |
| `X.weight.quant_map` | F32 [16], the numbers that codes stand for |
| `X.weight.nested_absmax`, `nested_quant_map` | F32, of the blocks of absmax; F32 [256], what its codes stand for |
| `X.weight.quant_state.bitsandbytes__nf4`, or `__fp4` | JSON in U8: type, size of blocks, dtype, shape, `nested_…` |

`linears/nf4.py` has what they mean. Which weights are quantized differs from file to file; each has a quant_state, and
that alone decides. (bitsandbytes 0.50, `functional.QuantState`.)
"""

import json
import math
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import FileError
from ..jsonfile import quoted
from ..linears.codebooks import CODEBOOKS
from .header import WEIGHT_DTYPES, open_file, read_into
from .source import Source
from .stored import Stored

STATE = ".quant_state.bitsandbytes__"
ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STORAGE = ("U8", "I8", *WEIGHT_DTYPES)
"""the dtypes that packed codes may have (`bnb_4bit_quant_storage`)"""
KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
BLOCKS = frozenset(32 << i for i in range(8))
"""the sizes that bitsandbytes knows: 32 to 4096"""
KNOWN: dict[str, Collection[Any]] = {
    "quant_type": CODEBOOKS,
    "blocksize": BLOCKS,
    "dtype": ("bfloat16", "float16", "float32"),
    "nested_blocksize": BLOCKS,
    "nested_dtype": ("float32",),
}
"""the values that a quant_state may have"""
MAX_STATE = 1 << 16
"""bytes of a quant_state; real ones have fewer than 200"""
LARGEST = 3.4e38
"""that fp32 can keep, rounded down"""


def find_bnb(source: Source, prefix: str = "") -> tuple[dict[str, Stored], frozenset[str]]:
    """The weights under that prefix that bitsandbytes quantized, by their names in the file, and the names beside them.

    FileError, which names the tensor, for whatever is missing, of a wrong size or unknown. Values of absmax are data
    and not read here.
    """
    states = {name: name.rpartition(STATE) for name in source.shapes if name.startswith(prefix) and STATE in name}
    found: dict[str, Stored] = {}
    for name, text in _contents(source, states, MAX_STATE):
        weight, _, kind = states[name]
        if weight in found:
            raise _wrong(source, name, "is the second quant_state of its weight")
        found[weight] = _stored(source, name, weight, kind, text)
    beside = {part for one in found.values() for part in list(one.parts.values())[1:]} | states.keys()
    for name in source.shapes:
        owned = name in beside
        if owned and name in found:
            raise _wrong(source, name, "is a quantized weight and belongs to another")
        if not owned and name.startswith(prefix) and name.rpartition(".")[2] in ROLES:
            raise _wrong(source, name, "belongs to a quantized weight whose quant_state does not tell of it")
    _check_codebooks(source, found)
    return found, frozenset(beside)


def _stored(source: Source, name: str, weight: str, kind: str, text: bytes) -> Stored:
    """The weight that a quant_state describes, checked against the headers."""
    if kind not in CODEBOOKS or source.dtypes[name] != "U8":
        raise _wrong(source, name, "is no quant_state of nf4 or fp4 in U8")
    try:
        shape, details = _state(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(source, name, f"is no quant_state that is known here: {error}") from None
    if details["quant_type"] != kind:
        raise _wrong(source, name, f"says quant_type {details['quant_type']}")
    count, parts = math.prod(shape), {"weight": weight}
    roles = _expected(count, details)
    parts |= {role: f"{weight}.{role}" for role in roles}
    for part in parts.values():
        if part not in source.shapes:
            raise _wrong(source, part, "is missing")
    if source.dtypes[weight] not in STORAGE:
        raise _wrong(source, weight, f"is {source.dtypes[weight]}, which no packed codes are")
    size, expected = source.spans[weight].end - source.spans[weight].start, -(-count // 2)
    if size != expected:
        raise _wrong(source, weight, f"has {size:,} bytes where a weight of {list(shape)} has {expected:,}")
    for role, (dtype, numbers) in roles.items():
        kept = source.dtypes[parts[role]], source.shapes[parts[role]]
        if kept != (dtype, (numbers,)):
            raise _wrong(source, parts[role], f"is {kept[0]} {list(kept[1])[:8]} instead of {dtype} [{numbers}]")
    return Stored("nf4", shape, parts, details)


def _expected(count: int, details: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """The dtype and the size of the tensors beside a weight of so many numbers."""
    blocks = -(-count // details["blocksize"])
    if "nested_offset" not in details:
        return {"absmax": ("F32", blocks), "quant_map": ("F32", 16)}
    return {
        "absmax": ("U8", blocks),
        "quant_map": ("F32", 16),
        "nested_absmax": ("F32", -(-blocks // details["nested_blocksize"])),
        "nested_quant_map": ("F32", 256),
    }


def _state(text: bytes) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape in a quant_state, and its other values. ValueError, or RecursionError, for what none has."""
    state = json.loads(text.decode())
    if not isinstance(state, dict) or state.keys() not in (KEYS, KEYS | NESTED_KEYS):
        raise ValueError(f"its keys are not {', '.join(sorted(KEYS))}, or these and {', '.join(sorted(NESTED_KEYS))}")
    shape = state.pop("shape")
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 8
        or not all(type(n) is int and 0 < n < 2**31 for n in shape)
    ):
        raise ValueError(f"shape {quoted(shape)}")
    for key, known in KNOWN.items():
        if key in state and (type(state[key]) not in (int, str) or state[key] not in known):
            raise ValueError(f"{key} {quoted(state[key])}")
    offset = state.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not -LARGEST <= offset <= LARGEST:
        raise ValueError(f"nested_offset {quoted(offset)}")
    state.pop("nested_dtype", None)
    return tuple(shape), state


def _check_codebooks(source: Source, found: dict[str, Stored]) -> None:
    """FileError where a file's numbers for the codes are not those of its type, which readers use in their place."""
    kinds = {one.parts["quant_map"]: one.details["quant_type"] for one in found.values()}
    for name, data in _contents(source, kinds, 64):
        if data != struct.pack("<16f", *CODEBOOKS[kinds[name]]):
            raise _wrong(source, name, f"is not the table of {kinds[name]}")


def _contents(source: Source, names: Collection[str], most: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each of these tensors, read one after the other. FileError for one of more bytes than `most`."""
    for header in source.headers:
        wanted = [name for name in header.tensors if name in names]
        if not wanted:
            continue
        with open_file(header.path) as file:
            for name in wanted:
                entry = header.tensors[name]
                if entry.end - entry.start > most:
                    raise _wrong(source, name, f"has {entry.end - entry.start:,} bytes, too many")
                memory = bytearray(entry.end - entry.start)
                read_into(memoryview(memory), file, header.path, entry.start)
                yield name, bytes(memory)


def _wrong(source: Source, name: str, finding: str) -> FileError:
    path = source.spans[name].path if name in source.spans else source.path
    return FileError(
        f"{path}: tensor {name[:120]!a} {finding}. Next: fetch the file again, or take it in another format."
    )
