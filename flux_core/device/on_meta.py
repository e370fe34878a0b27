"""What operators return on the meta device, by rules of our own.

Most of torch's functions for that are in Python, and the first call of one imports torch.compile and sympy: half of the
seconds in which a model of 24 GB is loaded. So here is a rule for each operator of a picture's networks. Tests compare
what is counted with torch's functions.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def computed(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator's results, contiguous; by torch's own function where there is no rule, or none for such arguments."""
    rule, tensors = RULES.get(operator), (x for x in tree_leaves(args) if isinstance(x, Tensor))
    if rule is None or not kwargs.keys() <= KNOWN or not all(x.is_floating_point() for x in tensors):
        return operator(*args, **kwargs)
    found = rule(*args, **kwargs)
    return operator(*args, **kwargs) if found is NotImplemented else found


KNOWN = {"approximate", "correction", "device", "dtype", "keepdim", "layout", "memory_format", "pin_memory"}
"""arguments that rules heed, or that change no size"""


def _pointwise(*args: Any, **_: object) -> Tensor:
    tensors = [x for x in args if isinstance(x, Tensor)]
    dtype = torch.result_type(*args) if len(args) == 2 else tensors[0].dtype
    return tensors[0].new_empty(torch.broadcast_tensors(*tensors)[0].shape, dtype=dtype)


def _in_place(x: Tensor, *_: object) -> Tensor:
    return x


def _like(x: Tensor, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _arange(*span: Any, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: object) -> Any:
    if dtype is None or not all(isinstance(x, int) for x in span):
        return NotImplemented
    return torch.empty(len(range(*span)), dtype=dtype, device=device)


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return tensors[0].new_empty(shape, dtype=reduce(torch.promote_types, (x.dtype for x in tensors)))


def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return _cat([x.unsqueeze(dim) for x in tensors], dim)


def _reduced(
    x: Tensor, dim: Iterable[int] | None = None, keepdim: bool = False, dtype: torch.dtype | None = None, **_: object
) -> Tensor:
    gone = {i % x.dim() for i in (range(x.dim()) if dim is None else dim)}
    shape = [1 if i in gone else size for i, size in enumerate(x.shape) if keepdim or i not in gone]
    return x.new_empty(shape, dtype=dtype)


def _repeat(x: Tensor, times: list[int]) -> Tensor:
    sizes = [1] * (len(times) - x.dim()) + list(x.shape)
    return x.new_empty([size * n for size, n in zip(sizes, times, strict=True)])


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    *_: object,
) -> Any:
    if transposed:
        return NotImplemented
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return x.new_empty(len(x), len(weight), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides))


def _batch_norm(x: Tensor, weight: Tensor | None, *_: object) -> Any:
    return NotImplemented if weight is None else (_like(x), _like(weight), _like(weight))


def _group_norm(x: Tensor, w: Any, b: Any, rows: int, c: int, n: int, groups: int, eps: float) -> tuple[Tensor, ...]:
    return _like(x), x.new_empty(rows, groups), x.new_empty(rows, groups)


def _layer_norm(x: Tensor, shape: list[int], *_: object) -> tuple[Tensor, ...]:
    of_row, dtype = [*x.shape[: -len(shape)], *(1 for _ in shape)], torch.promote_types(x.dtype, torch.float32)
    return _like(x), x.new_empty(of_row, dtype=dtype), x.new_empty(of_row, dtype=dtype)


_aten = torch.ops.aten
RULES: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: _pointwise,
    _aten.add_.Tensor: _in_place,
    _aten.addmm.default: lambda bias, a, b: a.new_empty(len(a), b.shape[1]),
    _aten.arange.default: _arange,
    _aten.arange.start_step: _arange,
    _aten.cat.default: _cat,
    _aten.clone.default: _like,
    _aten.convolution.default: _convolution,
    _aten.cos.default: _pointwise,
    _aten.div.Tensor: _pointwise,
    _aten.empty_like.default: _like,
    _aten.exp.default: _pointwise,
    _aten.gelu.default: _pointwise,
    _aten.mean.dim: _reduced,
    _aten.mul.Tensor: _pointwise,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.neg.default: _pointwise,
    _aten.pow.Scalar: _pointwise,
    _aten.pow.Tensor_Scalar: _pointwise,
    _aten.reciprocal.default: _pointwise,
    _aten.repeat.default: _repeat,
    _aten.rsqrt.default: _pointwise,
    _aten.silu.default: _pointwise,
    _aten.silu_.default: _in_place,
    _aten.sin.default: _pointwise,
    _aten.stack.default: _stack,
    _aten.sub.Tensor: _pointwise,
    _aten.sum.default: _reduced,
    _aten.sum.dim_IntList: _reduced,
    _aten.upsample_nearest2d.default: lambda x, size, *_: x.new_empty(*x.shape[:2], *size),
    _aten.var_mean.correction: lambda *args, **kwargs: (_reduced(*args, **kwargs), _reduced(*args, **kwargs)),
    _aten.zeros_like.default: _like,
}
"""by operator"""
