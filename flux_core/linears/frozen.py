"""What layers with a weight in few bits have in common: it is moved, never cast, and gradients pass it to the inputs.

A class of a format is `class Some(Frozen, Leaf)`. It names the tensors that are codes, or numbers about them (`CODES`),
and says what they stand for (`widen`). Its forward may be `multiply_widened`, a product in the dtype of x by a weight
in that dtype, which exists during the product only. So does the weight of a backward (`input_gradient`).

Some rows of a layer can be multiplied alone (`multiply_rows`): training computes those of an MLP again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import is_transformed, needs_grad

Multiply = Callable[[Tensor], Tensor]
"""[..., K] -> [..., N]"""
Rows = slice | None
"""of a weight; None: all"""


def take(x: Tensor, rows: Rows) -> Tensor:
    """Those rows, in place."""
    return x if rows is None else x[rows]


class Frozen(nn.Module):
    """Base, before `Leaf`, of layers whose weight is kept in few bits."""

    CODES: ClassVar[tuple[str, ...]] = ("weight",)
    """names of its tensors that a cast would spoil"""
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    weight: nn.Parameter

    def widen(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the codes stand for, rounded once."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What a file gets for its weight, by the ending behind its name."""
        raise NotImplementedError

    def input_gradient(self, grad: Tensor, rows: Rows = None) -> Tensor:
        """grad @ weight: the gradient of x for that of those rows' outputs, in its dtype. [..., N] -> [..., K]"""
        return grad @ take(self.widen(grad.dtype), rows)

    def bias_of(self, rows: Rows) -> Tensor | None:
        """Those rows' bias, in place."""
        return None if self.bias is None else take(self.bias, rows)

    def multiply_rows(self, x: Tensor, rows: Rows = None) -> Tensor:
        """Those rows of its forward. [..., K] -> [..., N]"""
        return self.multiply_widened(x, rows)

    def multiply_widened(self, x: Tensor, rows: Rows = None) -> Tensor:
        """x @ weight.T + bias, or those rows of it, in the dtype of x. [..., K] -> [..., N]"""
        return self.differentiable(x, partial(self._multiply_widened, rows=rows), rows)

    def _multiply_widened(self, x: Tensor, rows: Rows) -> Tensor:
        return F.linear(x, take(self.widen(x.dtype), rows), self.bias_of(rows))

    def differentiable(self, x: Tensor, multiply: Multiply, rows: Rows = None) -> Tensor:
        """`multiply(x)`, with a gradient of x and of the bias where one is wanted, past any rounding of x.

        rows: those that `multiply` returns.
        """
        if is_transformed():
            return self._multiply_widened(x, rows)  # which torch.func knows how to transform
        if needs_grad(x, self.bias, self.weight):
            return _Product.apply(x, self.weight, self.bias_of(rows), partial(self.input_gradient, rows=rows), multiply)
        return multiply(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A move applies to all tensors, a cast not to codes and scales, which mean nothing in bf16."""
        kept = {name: x.data for name in self.CODES if (x := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            if (new := getattr(self, name)).dtype != old.dtype:
                new.data = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Scaled(Frozen):
    """Base, before `Leaf`, of layers whose product runs in their few bits where a device has units for it."""

    CODES: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    weight_scale: Tensor
    scaled: bool
    """whether it does. May be set by hand: then the CPU, too, rounds tokens and multiplies as the units do"""

    def has_units(self, device: torch.device) -> bool:
        """Whether the device multiplies such codes in hardware."""
        raise NotImplementedError

    def numbers(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and bias of those rows, in place."""
        return take(self.weight, rows), take(self.weight_scale, rows), self.bias_of(rows)

    def input_gradient(self, grad: Tensor, rows: Rows = None) -> Tensor:
        """grad @ (codes * scale): since the sum is over rows, their scales go to grad, and no pass over the weight is
        spent on them. In bf16 every code is exact. In fp16 a gradient times a scale might be 0, so codes get it."""
        codes, scale, _ = self.numbers(rows)
        if grad.dtype == torch.float16:
            return grad @ (codes.float() * scale[:, None]).to(grad.dtype)
        return (grad * scale).to(grad.dtype) @ codes.to(grad.dtype)

    def takes_tokens(self) -> bool:
        """Whether its product runs in few bits, which has no backward for a trained bias."""
        return self.scaled and not needs_grad(self.bias)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """The widened weight, where the product runs in that dtype."""
        return None if self.scaled else (self.widen(dtype), self.bias)

    def scales_on(self, device: torch.device) -> bool:
        """Whether its product can run in few bits there. The units take sizes that are multiples of 16."""
        return self.in_features % 16 == self.out_features % 16 == 0 and self.has_units(device)

    def choose_matmul(self) -> None:
        """Choose how to multiply on the weights' device; to be called after weights are replaced."""
        self.scaled = self.scales_on(self.weight.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.choose_matmul()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.choose_matmul()
        return self


class _Product(torch.autograd.Function):
    """A product whose backward widens the weight once more: no wide weight is kept from forward to backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, input_gradient: Multiply, multiply: Multiply
    ) -> Tensor:
        ctx.input_gradient, ctx.dtype = input_gradient, x.dtype
        ctx.save_for_backward(weight)  # so that a change to it before the backward is noticed
        return multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), _ = grads, ctx.saved_tensors
        of_x, of_weight, of_bias, _, _ = ctx.needs_input_grad
        if of_weight:
            raise RuntimeError(
                "weights in few bits cannot be trained. Next: freeze them, and train a branch beside them"
            )
        x_grad = ctx.input_gradient(grad).to(ctx.dtype) if of_x else None
        return x_grad, None, grad.flatten(0, -2).sum(0) if of_bias else None, None, None
