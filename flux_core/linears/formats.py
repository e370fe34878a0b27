"""The formats of weights in few bits: one table, which loading, saving, kernels and plans of memory read."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import fp8, gguf, int8, nf4
from .frozen import Frozen


class Format(NamedTuple):
    """A format, and how a model is quantized to it."""

    kind: Any
    """the layer: a subclass of `Frozen` and `Leaf` with `read`, `of`, `joined`, `tensors`"""
    to_dense: Callable[..., Tensor]
    """what a file's tensors stand for"""
    stays: Callable[[str], bool]
    """whether the Linear of that name stays as it is when a model is quantized"""
    bits: float
    """of memory for a weight, with its scales"""


def outside_blocks(name: str) -> bool:
    """Whether a Linear is none of a block's: of the embeddings, or the last layer."""
    return "_blocks." not in name


FORMATS: Mapping[str, Format] = {
    "fp8": Format(fp8.Fp8Linear, fp8.to_dense, fp8.stays_bf16, 8),
    "int8": Format(int8.Int8Linear, int8.to_dense, fp8.stays_bf16, 8),
    "nf4": Format(nf4.Nf4Linear, nf4.to_dense, outside_blocks, 4.127),
    "gguf": Format(gguf.GgufLinear, gguf.to_dense, outside_blocks, 8.5),
}
"""by the name that requests and `--dtype` have for it"""


def to_dense(format: str, *stored: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that tensors in a file stand for, rounded once. stored: tensors by role, shape, details."""
    return FORMATS[format].to_dense(*stored, dtype)


def quantizable(model: nn.Module, format: str) -> dict[str, nn.Linear]:
    """The Linears of a model that become layers of that format, by name."""
    stays = FORMATS[format].stays
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and not stays(name)}


def quantize(model: nn.Module, format: str = "fp8") -> frozenset[str]:
    """Replace every Linear that does not stay as it is by a layer of that format. Returns their names."""
    linears = quantizable(model, format)
    names = frozenset(linears)
    while linears:  # each is freed before the next
        name, linear = linears.popitem()
        model.set_submodule(name, FORMATS[format].kind.of(linear))
    return names


def format_of(model: nn.Module) -> str | None:
    """The name of the format that its Linears are in, the first if they differ; None if none is quantized."""
    leaves = (module for module in model.modules() if isinstance(module, Frozen))
    return next((name for leaf in leaves for name, format in FORMATS.items() if isinstance(leaf, format.kind)), None)
