"""A weight and the factor A of its branches one below the other in memory, [W; A], and the product of both.

Of the two thin products of a branch, B (s (A x)), the first reads x and the second reads and writes y. Where y is no
wider than x, the first costs more: x may be as large as a block's hidden features. Then one product gives [y | s A x]
for a few more rows, and only B is left, which is added to y in place. The result's rows lie apart by the room for A x.

In fp8 a row of A has two rows of codes, the second for what the first leaves over, so that A is rounded as in bf16. s
is a part of their scales.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import QuantizedTokens, sum_of_products
from .fp8 import product_of_tokens, quantize_rows


@dataclass
class Below:
    """The joined memory of one layer."""

    both: Tensor
    """[N + room, K]: the layer's weight, or its codes; A times its factor, or codes of A; and rows of zeros"""
    bias: Tensor
    """[N + room], 0 behind that of layer and branches"""
    up: Tensor
    """B [N, R], for codes of A twice: [N, 2 R]"""
    scale: Tensor | None = None
    """fp32 [N + room], of rows of codes"""
    unit: Tensor | None = None
    """fp32 [2 R], those of A's at factor 1"""

    def of(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        call = torch.ops.flux_core.below_of if torch.compiler.is_compiling() else below_of
        return call(x, self.both, self.bias, self.up)

    def of_two(self, x: Tensor, y: Tensor) -> Tensor:
        """Of [x | y]: [B, L, K], [B, L, M] -> [B, L, N]"""
        call = torch.ops.flux_core.below_of_two if torch.compiler.is_compiling() else below_of_two
        return call(x, y, self.both, self.bias, self.up)

    def of_tokens(self, x: QuantizedTokens) -> Tensor:
        """[..., K] -> [..., N]"""
        call = torch.ops.flux_core.below_of_tokens if torch.compiler.is_compiling() else below_of_tokens
        assert self.scale is not None
        return call(*x, self.both, self.scale, self.bias, self.up)

    def set_factor(self, down: Tensor, factor: Tensor) -> None:
        """Write A's factor, fp32 [R], in place."""
        N = len(self.up)
        if self.scale is None:
            torch.mul(down, factor[:, None], out=self.both[N : N + len(down)])
        else:
            assert self.unit is not None
            torch.mul(self.unit, torch.cat((factor, factor)), out=self.scale[N : N + len(self.unit)])

    def set_bias(self, bias: Tensor | None, shift: Tensor | None) -> None:
        """Write the bias of the layer and its branches' difference to it, in place."""
        own = self.bias[: len(self.up)].zero_()
        for one in (bias, shift):
            if one is not None:
                own += one


def join(weight: Tensor, rows: int, scale: Tensor | None, down: Tensor, up: Tensor) -> Below:
    """New memory for a weight [N, K] and, of `rows` below it, A. scale: of the weight's rows, if it is codes."""
    (N, K), dtype = weight.shape, up.dtype
    both = torch.zeros((N + rows, K), dtype=torch.uint8 if scale is not None else dtype, device=weight.device)
    both = both.view(weight.dtype)
    both[:N] = weight
    bias = torch.zeros(N + rows, dtype=dtype, device=weight.device)
    if scale is None:
        return Below(both, bias, up)
    codes, unit = quantize_rows(down)
    rest, rest_unit = quantize_rows(down.float() - codes.float() * unit)
    both[N : N + 2 * len(down)] = torch.cat((codes, rest))
    scales = torch.ones(N + rows, dtype=torch.float32, device=weight.device)
    scales[:N] = scale
    return Below(both, bias, torch.cat((up, up), dim=1), scales, torch.cat((unit, rest_unit)).flatten())


def raised(both: Tensor, up: Tensor) -> Tensor:
    """y + up @ t of [y | t | nothing], in place: [..., N + room] -> [..., N]."""
    N, R = up.shape
    rows = both.flatten(0, -2)
    rows[:, :N].addmm_(rows[:, N : N + R], up.t())
    return both[..., :N]


def below_of(x: Tensor, both: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    """`Below.of`. An operator of its own, as the next two: a compiler would copy y before it is added to."""
    return raised(F.linear(x, both, bias), up)


def below_of_two(x: Tensor, y: Tensor, both: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    return raised(sum_of_products(x, y, both, bias), up)


def below_of_tokens(codes: Tensor, scales: Tensor, both: Tensor, scale: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    return raised(product_of_tokens(QuantizedTokens(codes, scales), both, scale, bias), up)


def _without_values(x: Tensor, both: Tensor, up: Tensor) -> Tensor:
    """Rows of N numbers that lie as far apart as `both` has rows."""
    return torch.empty((*x.shape[:-1], len(both)), dtype=up.dtype, device=x.device)[..., : len(up)]


def _operator(function: object) -> object:
    return torch.library.custom_op(f"flux_core::{function.__name__}", function, mutates_args=())  # type: ignore


_operator(below_of).register_fake(lambda x, both, bias, up: _without_values(x, both, up))  # type: ignore[attr-defined]
_operator(below_of_two).register_fake(lambda x, y, both, bias, up: _without_values(x, both, up))  # type: ignore
_operator(below_of_tokens).register_fake(  # type: ignore[attr-defined]
    lambda codes, scales, both, scale, bias, up: _without_values(codes, both, up)
)
