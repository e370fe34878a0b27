"""LoRAs written into weights: no cost a step, and the weights given back to the bit.

A merged weight is W + s D, summed in fp32 and rounded once, of all merged files together. The original weight is kept
in the CPU's memory (on the CPU it is the tensor that was there), so that a scale may change and a file be taken out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .delta import Delta

MERGEABLE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Written:
    """What an owner writes into a layer: differences to rows of its weight and bias, at a scale."""

    deltas: list[Delta]
    """without a weight of their own: they are to that of the layer"""
    scale: float = 1.0

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> "Written":
        return cls([replace(delta, weight=None) for delta in deltas])


@dataclass
class MergedLayer:
    """A layer's own weight and bias, and what is written into them."""

    layer: nn.Linear
    weight: Tensor
    bias: Tensor | None
    written: dict[object, Written] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: nn.Linear) -> "MergedLayer":
        bias = None if layer.bias is None else _kept(layer.bias)
        return cls(layer, _kept(layer.weight), bias)

    def write(self) -> None:
        """Give the layer the sum of its own weight and all differences, or its own weight."""
        device = self.layer.weight.device
        weights = self.weight if not self._changes("weight") else self._summed(self.weight.to(device))
        _put(self.layer.weight, weights)
        if self.bias is not None:
            _put(self.layer.bias, self._shifted(self.bias.to(device)) if self._changes("bias") else self.bias)

    def _changes(self, what: str) -> bool:
        return any(delta.changes(what) for written in self.written.values() for delta in written.deltas)

    def _summed(self, weight: Tensor) -> Tensor:
        """fp32, for one rounding to what the layer's dtype is by now."""
        total = weight.float()  # a copy, or in fp32 the weight itself
        total = total.clone() if total is weight else total
        for written in self.written.values():
            for delta in filter(lambda x: x.changes("weight"), written.deltas):
                change = delta.beside(weight).dense().to(total)  # the file may have been read onto another device
                total[delta.start : delta.start + delta.rows] += written.scale * change
        return total

    def _shifted(self, bias: Tensor) -> Tensor:
        total = bias.float().clone()
        for written in self.written.values():
            for delta in written.deltas:
                for shift in delta.shifts():
                    total[delta.start : delta.start + delta.rows] += written.scale * shift.to(total)
        return total


def _kept(parameter: Tensor) -> Tensor:
    """The parameter's values: on the CPU the tensor itself, which is replaced and not written to."""
    return parameter.detach().cpu()


def _put(parameter: Tensor, values: Tensor) -> None:
    """Replace a parameter's values: in place on a device, where graphs may have recorded their address."""
    if parameter.device.type == "cpu":
        parameter.data = values.to(parameter.dtype)
    else:
        parameter.detach().copy_(values)


def check_mergeable(name: str, layer: nn.Module) -> None:
    """UsageError for a layer whose weight cannot be written to."""
    if type(layer) is not nn.Linear or layer.weight.dtype not in MERGEABLE:
        raise UsageError(
            f"--lora-merge writes into bf16 or fp32 weights, and {name} is {type(layer).__name__}. Next: leave "
            "--lora-merge out: the LoRA is computed beside the weights"
        )
