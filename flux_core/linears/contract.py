"""The contract of a layer that replaces an nn.Linear, and when fused code may read its weight instead of calling it.

A block calls its Linears, or passes them to its `ops`. The plain ops (`model/ops.py`) only call them, so every module
with `in_features`, `out_features` and a forward will do. The fused ops (`kernels/`) are faster where they may read a
weight, or pass quantized tokens. The functions below say where; elsewhere fused ops call the layer, too.

|                                      | nn.Linear            | fp8, int8; GGUF and NF4   | any other module         |
| ------------------------------------ | -------------------- | ------------------------- | ------------------------ |
| `in_features`, `out_features`        | yes                  | yes                       | yes                      |
| forward of x [..., K] -> [..., N]    | yes                  | yes                       | yes                      |
| gradient of x; of its parameters     | yes; yes             | yes; of the bias          | as its forward has it    |
| `takes_tokens`: of `QuantizedTokens` | no                   | where units are; no       | no                       |
| `dense`: weight and bias to use      | its own              | widened, where no tokens  | no                       |
| `multiply_columns`: [x \\| y] apart   | a product for each   | by `dense`, else joined   | joined                   |
| a slice of its rows                  | of `dense`           | of `dense`, or its output | of its output            |

`branch.BranchedLinear` is a layer of any kind with low-rank branches beside it. `branches` says what they are, so that
fused code sees them without a call: `modulation` adds them to the product for all steps, and a function that computes
the layer's input leaves columns behind it and writes the thin product there (`Widened`), where weight and `up` are side
by side in memory, [W | up]. Then [x | t] @ [W | up].T is one product, with bias, activation and slices of rows as
without branches (`operands`).

A new format is one file with one class, a direct subclass of `Leaf`, that overrides what it supports:

- a branch around any layer: a forward that adds it, and `multiply_columns` of the layer and of the branch; `branches`
  if it is low-rank;
- a weight in few bits (`frozen.Frozen`): a forward that widens it, and `dense`, which does so for one call.

A class derived from such a format is only called: it may have changed the forward.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


class QuantizedTokens(NamedTuple):
    """Tokens x ~ codes * scale, which some leaves take instead of x; int8 ones are rotated in the layer's groups."""

    codes: Tensor
    """e4m3 or int8 [..., K]"""
    scale: Tensor
    """fp32 [..., 1]"""


class Widened(NamedTuple):
    """Inputs of a layer, and behind their features what its branches make of them: gain * factor * (x @ down.T), or 0.

    For tokens t = gain * factor * (codes @ down.T), in codes of the same scale. Where there is room (`parts`) t is the
    sum of codes and what those leave over, [codes | rest | codes] for up as [codes | codes | rest].
    """

    both: "Tensor | QuantizedTokens"
    """[..., K + room]"""


class Branches(NamedTuple):
    """Low-rank branches beside a layer: base(x) + up @ (factor * (down @ x)) + shift."""

    base: nn.Module
    down: Tensor
    """[R, K]"""
    up: Tensor
    """[N, R]"""
    factor: Tensor
    """fp32 [R], which may change between two calls"""
    scaled: Tensor | None
    """factor * down, with rows of zeros behind it up to `room`; None where inputs are quantized"""
    shift: Tensor | None
    """[N]"""
    wide: Tensor | None = None
    """[N, K + room], if joined: the layer's weight, or its codes, and behind it up, or that by rows' scales and gain"""
    gain: Tensor | None = None
    """fp32 [R] where inputs are quantized; see `Widened`"""

    @property
    def room(self) -> int:
        """Columns to leave behind the inputs' features."""
        return 0 if self.wide is None else self.wide.shape[1] - self.down.shape[1]

    @property
    def bias(self) -> Tensor | None:
        """Of layer and branches together."""
        own = cast("Tensor | None", self.base.bias)
        return own if self.shift is None else self.shift if own is None else own + self.shift


def parts(ranks: int, room: int) -> int:
    """How many columns in `room` behind tokens belong to each rank: codes; and the rest of t; and codes for that of up.

    A product multiplies that many columns anyway.
    """
    return min(3, room // ranks)


class Leaf(nn.Module):
    """Base of layers that replace an nn.Linear. The defaults are those of a layer that can only be called."""

    in_features: int
    out_features: int

    def takes_tokens(self) -> bool:
        """Whether its forward takes `QuantizedTokens` on its current device."""
        return False

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """Weight [N, K] and bias [N] for a product in that dtype; None without one, or where its forward is faster."""
        return None

    def branches(self) -> Branches | None:
        """What its forward is, where that is another layer and low-rank branches beside it. With `wide` in them its
        forward takes `Widened`, too."""
        return None

    def multiply_columns(self, x: Tensor, y: Tensor) -> Tensor:
        """Its forward of [x | y], features concatenated."""
        return self(torch.cat((x, y), dim=-1))


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors, or a transform of torch's differentiates them."""
    return is_transformed() or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def is_transformed() -> bool:
    """Whether this runs inside a transform of `torch.func` (grad, jvp, vmap, ...) or forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_bare(module: nn.Module, kind: type[nn.Module], *inputs: Tensor) -> bool:
    """Whether fused code may compute a module on these inputs itself, without calling it.

    True where the call computes that class's forward of the module's own parameters and nothing else (`is_untouched`),
    and no gradient is needed. A class whose forward was replaced is called.
    """
    own = kind.forward.__module__ == kind.__module__
    return own and is_untouched(module, kind) and not needs_grad(*inputs, *module._parameters.values())


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is no subclass, without a `forward` of the instance's own, hooks, or subclasses of parameters."""
    if type(module) is not kind or is_patched(module) or is_hooked(module):
        return False
    return all(x is None or type(x) is nn.Parameter for x in module._parameters.values())


def is_patched(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own."""
    # dynamo guards on attributes that are read, not on `vars`: by the second question a compiled block notices a patch
    return "forward" in vars(module) or module.forward is None


def is_hooked(module: nn.Module) -> bool:
    """Whether nn.Module.__call__ runs any hook. As always, a compiled block ignores hooks that are registered later."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook())


def is_leaf(linear: nn.Module, *inputs: Tensor) -> bool:
    """Whether the layer is a `Leaf` whose methods fused code may use instead of calling it."""
    return Leaf in type(linear).__bases__ and is_bare(linear, type(linear), *inputs)


def takes_tokens(consumer: nn.Module) -> bool:
    """Whether a layer, or the first layer of a Sequential, takes `QuantizedTokens` on its current device."""
    consumer = first_of(consumer)
    return is_leaf(consumer) and cast(Leaf, consumer).takes_tokens()


def first_of(consumer: nn.Module) -> nn.Module:
    """The layer itself, or the first of a Sequential."""
    if is_bare(consumer, nn.Sequential) and len(consumer):  # type: ignore[arg-type]
        return cast(nn.Sequential, consumer)[0]
    return consumer


def branches(linear: nn.Module, *inputs: Tensor) -> Branches | None:
    """The low-rank branches of a layer and the layer behind them, or None where it has to be called."""
    found = cast(Leaf, linear).branches() if is_leaf(linear, *inputs) else None
    return None if found is None or torch.is_autocast_enabled(found.down.device.type) else found


def widening(consumer: nn.Module | None) -> Branches | None:
    """The branches of a layer, or of the first of a Sequential, that takes inputs `Widened`; None without."""
    found = None if consumer is None else branches(first_of(consumer))
    return None if found is None or found.wide is None else found


def operands(linear: nn.Module, x: "Tensor | QuantizedTokens | Widened") -> tuple[Tensor, Tensor, Tensor] | None:
    """Inputs, weight and bias of the one product that is `linear(x)`, or None where it has to be called."""
    if isinstance(x, QuantizedTokens):
        return None
    if isinstance(x, Widened):
        wide = widening(linear) if isinstance(x.both, Tensor) else None
        bias = None if wide is None else wide.bias
        return None if bias is None else (cast(Tensor, x.both), cast(Tensor, cast(Branches, wide).wide), bias)
    found = dense(linear, x)
    return None if found is None else (x, *found)


def dense(linear: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight [N, K] and bias [N] that give `linear(x)` for inputs of that dtype, or None where it has to be called.

    Under autocast it has to be: operators of our own would not cast.
    """
    if torch.is_autocast_enabled(inputs[0].device.type):
        return None
    if is_bare(linear, nn.Linear, *inputs):
        found: Any = linear._parameters.get("weight"), linear.bias
    else:
        found = cast(Leaf, linear).dense(inputs[0].dtype) if is_leaf(linear, *inputs) else None
    return None if found is None or any(x is None for x in found) or needs_grad(*found) else found


def multiply_columns(linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`linear` of [x | y], as the sum of a product for each where possible. [B, L, K], [B, L, M] -> [B, L, N]"""
    if found := dense(linear, x, y):
        add_up = torch.ops.flux_core.sum_of_products if torch.compiler.is_compiling() else sum_of_products
        return add_up(x, y, *found)
    if is_leaf(linear):
        return cast(Leaf, linear).multiply_columns(x, y)
    return linear(torch.cat((x, y), dim=-1))


def sum_of_products(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[x | y] @ weight.T + bias, for x [B, L, K], y [B, L, M] and weight [N, K + M].

    An operator of its own, since inductor would copy the first sum before it adds the second to it.
    """
    of_x, of_y = weight.t().split([x.shape[2], y.shape[2]])
    return torch.addmm(bias, y.flatten(0, 1), of_y).addmm_(x.flatten(0, 1), of_x).unflatten(0, x.shape[:2])


@torch.library.custom_op("flux_core::sum_of_products", sum_of_products, mutates_args=()).register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])
