"""fp8 weights in files: plain, ours, and ComfyUI's two layouts with scales.

| layout | beside `X.weight` in e4m3 (or e5m2) | elsewhere |
| --- | --- | --- |
| plain | nothing: the numbers are the weights | |
| ours | `X.weight_scale`, fp32 [N] | metadata `quantization` |
| ComfyUI, older | `X.scale_weight`, perhaps `X.scale_input` | an empty tensor `scaled_fp8` |
| ComfyUI, newer | `X.weight_scale`, perhaps `X.input_scale`, `X.comfy_quant` | or metadata `_quantization_metadata` |

In all of them weight = codes * scale, with one scale for the tensor, one for each row, or (kohya's scripts) one for
each of a row's blocks, [N, blocks, 1]. Scales of inputs come from a calibration; `linears/fp8.py` finds its own for
every token, so they are left out. torch is imported only where tensors are.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ..errors import FileError
from .header import WEIGHT_DTYPES
from .source import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALES = ("weight_scale", "scale_weight")
BESIDE = ("input_scale", "scale_input", "comfy_quant")
MARKER = "scaled_fp8"
FLOATS = ("F32", "BF16", "F16")
METADATA = {"quantization": "float8_e4m3fn, fp32 weight_scale for each row"}
"""what our own fp8 file says of itself"""


class Scales(NamedTuple):
    """The tensors of a file that say how to read its quantized weights."""

    of: dict[str, str]
    """a weight's name in the file -> its scale's"""
    names: frozenset[str]
    """all such tensors: scales, and those that are not used"""

    def among(self, names: Iterable[str]) -> list[str]:
        """Those names, each followed by its scale's, if there is one."""
        return [found for name in names for found in (name, self.of.get(name)) if found]


def find_scales(source: Source, prefix: str = "") -> Scales:
    """The scales of weights under that prefix. FileError for an unknown kind."""
    shapes, dtypes = source.shapes, source.dtypes
    stems = {
        name.removesuffix("weight"): name for name in shapes if name.startswith(prefix) and name.endswith(".weight")
    }
    of = {name: stem + end for stem, name in stems.items() for end in SCALES if stem + end in shapes}
    for name, scale in of.items():
        kinds = dtypes[name], dtypes[scale]
        if kinds[0] not in WEIGHT_DTYPES or kinds[1] not in FLOATS or not _fits(shapes[scale], shapes[name]):
            raise FileError(
                f"{source.path} is quantized in a way that is not known here: {name} is {kinds[0]} "
                f"{list(shapes[name])}, {scale} {kinds[1]} {list(shapes[scale])}. "
                "Next: take the bf16 file, or an fp8 file with a scale for each tensor or row."
            )
    beside = {stem + end for stem in stems for end in BESIDE}
    return Scales(of, frozenset({*of.values(), *(beside | {prefix + MARKER}) & shapes.keys()}))


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale has one number for the tensor, one for each row, or one for each of a row's blocks."""
    if scale in ((), (1,), (1, 1)):
        return True
    if len(weight) != 2 or not weight[1]:
        return False
    in_blocks = len(scale) == 3 and scale[0] == weight[0] and scale[2] == 1
    return scale in (weight[:1], (weight[0], 1)) or (in_blocks and scale[1] > 0 and weight[1] % scale[1] == 0)


def to_dense(weight: "Tensor", scale: "Tensor | None", dtype: "torch.dtype") -> "Tensor":
    """The plain weight: codes times scale, rounded once."""
    if scale is None:
        return weight.to(dtype)
    if scale.numel() == 1:
        return (weight.float() * scale.float().reshape(())).to(dtype)
    blocks = scale.float().reshape(len(weight), -1, 1)
    return (weight.float().reshape(*blocks.shape[:2], -1) * blocks).reshape(weight.shape).to(dtype)


def as_fp8(weight: "Tensor", scale: "Tensor | None") -> "tuple[Tensor, Tensor]":
    """The weight in e4m3 [N, K], and scales fp32 [N]. e4m3 keeps its codes; else bf16 is quantized, by rows."""
    import torch

    from ..linears.fp8 import E4M3, quantize_rows

    rows = len(weight)
    if weight.dtype != E4M3 or (scale is not None and scale.numel() not in (1, rows)):
        codes, found = quantize_rows(to_dense(weight, scale, torch.bfloat16))
        return codes, found.flatten()
    one = torch.ones(1, dtype=torch.float32, device=weight.device) if scale is None else scale.float()
    return weight, one.flatten().expand(rows).contiguous()
