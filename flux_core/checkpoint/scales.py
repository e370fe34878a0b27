"""Weights with scales in files: fp8, plain, ours and ComfyUI's two layouts; and ComfyUI's int8.

| layout | beside `X.weight` | elsewhere |
| --- | --- | --- |
| fp8, plain | nothing: the numbers in e4m3 (or e5m2) are the weights | |
| fp8, ours | `X.weight_scale`, fp32 [N] | metadata `quantization` |
| fp8, ComfyUI's older | `X.scale_weight`, perhaps `X.scale_input` | an empty tensor `scaled_fp8` |
| fp8, int8, ComfyUI's newer | `X.weight_scale`, `X.comfy_quant`, perhaps `X.input_scale` | or it is in the metadata |

In all of them weight = codes * scale, with one scale for the tensor, one for each row, or (kohya's scripts) one for
each of a row's blocks, [N, blocks, 1]; int8 may be rotated (`linears/int8.py`), which `comfy_quant` says. Scales of
inputs come from a calibration; layers here find their own for every token, so they are left out. No torch.
"""

import json
import math
from typing import Any

from ..errors import FileError
from .header import read_tensor_bytes
from .source import Source
from .stored import Storage, Stored

SCALES = ("weight_scale", "scale_weight")
BESIDE = ("input_scale", "scale_input")
SAYS = "comfy_quant"
"""behind a module's name: JSON that says how its weight is quantized; or in the metadata, for all modules:"""
METADATA_KEY = "_quantization_metadata"
MARKER = "scaled_fp8"
FLOATS = ("F32", "BF16", "F16")
FORMATS = {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8", "int8_tensorwise": "int8"}
"""what ComfyUI calls a format -> what it is here"""
DTYPES = {"fp8": ("F8_E4M3", "F8_E5M2"), "int8": ("I8",)}
METADATA = {
    "fp8": {"quantization": "float8_e4m3fn, fp32 weight_scale for each row"},
    "int8": {"quantization": "int8, rotated, fp32 weight_scale for each row (ComfyUI's int8_tensorwise with convrot)"},
    "nf4": {"quantization": "nf4 with double quantization, as bitsandbytes writes it"},
}
"""what our own files say of themselves"""
MOST_JSON = 1 << 16
"""bytes"""
ADVICE = "Next: take the bf16 file, or an fp8 file with a scale for each tensor or row."


def find_scales(source: Source, prefix: str = "") -> Storage:
    """The weights under that prefix that are fp8, or have scales. FileError for an unknown kind."""
    shapes, dtypes = source.shapes, source.dtypes
    told, of = _in_metadata(source), {}
    beside = {name for name in shapes if name.startswith(prefix) and name.rpartition(".")[2] == MARKER}
    for name in shapes:
        stem = name.removesuffix("weight")
        if not (name.startswith(prefix) and name.endswith(".weight")):
            continue
        scale = next((stem + end for end in SCALES if stem + end in shapes), None)
        says = _said(source, stem) if stem + SAYS in shapes else told.get(stem.removesuffix("."))
        beside |= {stem + end for end in (*BESIDE, SAYS)} & shapes.keys()
        word, kind = (says or {}).get("format"), dtypes[name]
        format = FORMATS.get(str(word)) if says else "fp8" if kind in DTYPES["fp8"] or scale else None
        if not says and format is None:
            continue
        if format is None or not _is_known(source, name, scale, format, says):
            found = f"{scale} {dtypes[scale]} {list(shapes[scale])}" if scale else f"without {stem}{SCALES[0]}"
            words = f", {SAYS} {str(word)[:40]!a}" if says else ""
            raise FileError(
                f"{source.path} is quantized in a way that is not known here: {name} is {kind} "
                f"{list(shapes[name])}{words}, {found}. {ADVICE}"
            )
        if scale or len(shapes[name]) == 2:
            parts = {"weight": name} | ({"weight_scale": scale} if scale else {})
            keeps = format != "fp8" or _has_rows(source, name, scale)
            of[name] = Stored(format, shapes[name], parts, says or {}, keeps)
    scales = {stored.parts["weight_scale"] for stored in of.values() if "weight_scale" in stored.parts}
    return Storage(of, frozenset(scales | beside))


def _is_known(source: Source, name: str, scale: str | None, format: str, says: dict[str, Any] | None) -> bool:
    """Whether these tensors are codes and scales of that format. An fp8 scale may be beside a wider weight."""
    shapes, dtypes = source.shapes, source.dtypes
    if scale is None:
        return format == "fp8" and dtypes[name] in DTYPES["fp8"]
    wide = () if says else ("BF16", "F16", "F32", "F64")
    right = dtypes[name] in (*DTYPES[format], *wide) and dtypes[scale] in FLOATS
    if format == "int8" and not (len(shapes[scale]) < 3 and _can_rotate(shapes[name], says or {})):
        return False
    return right and _fits(shapes[scale], shapes[name])


def _has_rows(source: Source, name: str, scale: str | None) -> bool:
    """Whether an fp8 weight is in e4m3, with no finer scales than those of rows: what a layer has."""
    one_or_rows = scale is None or math.prod(source.shapes[scale]) in (1, *source.shapes[name][:1])
    return source.dtypes[name] == "F8_E4M3" and one_or_rows


def _can_rotate(weight: tuple[int, ...], says: dict[str, Any]) -> bool:
    """Whether a matrix has features in whole groups of those that are rotated, a power of 4."""
    group = says.get("convrot_groupsize", 256) if says.get("convrot") else 4
    if len(weight) != 2 or type(group) is not int or group < 4:
        return False
    is_power = group & (group - 1) == 0 and group.bit_length() % 2 == 1
    return is_power and (not says.get("convrot") or weight[1] % group == 0)


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale has one number for the tensor, one for each row, or one for each of a row's blocks."""
    if scale in ((), (1,), (1, 1)):
        return True
    if len(weight) != 2 or 0 in weight:
        return False
    in_blocks = len(scale) == 3 and scale[0] == weight[0] and scale[2] == 1
    return scale in (weight[:1], (weight[0], 1)) or (in_blocks and scale[1] > 0 and weight[1] % scale[1] == 0)


def _said(source: Source, stem: str) -> dict[str, Any]:
    """What a module's `comfy_quant` says. FileError."""
    return _parsed(source, stem + SAYS, read_tensor_bytes(source.headers_of[stem + SAYS], stem + SAYS, MOST_JSON))


def _in_metadata(source: Source) -> dict[str, dict[str, Any]]:
    """What the metadata say of modules, by their names. FileError."""
    found: dict[str, dict[str, Any]] = {}
    for header in source.headers:
        if METADATA_KEY in header.metadata:
            layers = _parsed(source, METADATA_KEY, header.metadata[METADATA_KEY].encode()).get("layers") or {}
            if not isinstance(layers, dict):
                raise _damaged(source, METADATA_KEY, "its layers are no table")
            found |= {name: says for name, says in layers.items() if isinstance(says, dict)}
    return found


def _parsed(source: Source, name: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no table")
        return found
    except (ValueError, RecursionError) as error:
        raise _damaged(source, name, str(error)[:80]) from None


def _damaged(source: Source, name: str, finding: str) -> FileError:
    return FileError(f"{source.path}: {name} is damaged: {finding}. Next: fetch the file again.")
