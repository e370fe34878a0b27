"""A Linear whose weight stays in its file: every product reads it from there, mapped, in the dtype of the tokens.

For a CPU with less memory than a model takes. What is read is what would have been loaded, so the numbers are the same;
the system keeps in memory as much of the file as there is room for.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .contract import Leaf
from .frozen import Frozen

Read = Callable[[torch.dtype], Tensor]
"""the weight [N, K] in a dtype, in new memory"""


class MappedLinear(Frozen, Leaf):
    """y = x W^T + b, with W read when it is used."""

    CODES = ()
    weight = None  # type: ignore[assignment]  # `Frozen` asks whether it wants a gradient

    def __init__(self, read: Read, shape: tuple[int, ...], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.read, self.bias = read, bias

    def widen(self, dtype: torch.dtype) -> Tensor:
        return self.read(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        return self.multiply_widened(x)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.widen(dtype), self.bias
