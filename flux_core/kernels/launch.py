"""How Triton kernels are launched, by a compiler and without one."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.library import custom_op, triton_op


def operator(name: str, changes: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: a `triton_op` of that name under tracing; else the function itself, without the dispatcher.

    Dispatch costs 50 to 100 µs of the host's time, more than most of these kernels take for a small picture.
    changes: arguments that it writes into.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        triton_op(f"flux_core::{name}", launch, mutates_args=changes)
        traced = getattr(torch.ops.flux_core, name)

        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return traced(*args)
            with torch.cuda.device_of(args[0]), set_wrap_triton_enabled(False):  # Triton launches on the current device
                return launch(*args)

        return call

    return decorate


def opaque(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`operator` for functions that launch more than Triton's kernels, and that a compiler shall not take apart.

    fake: an output without values, of the same arguments.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launch)
        def body(*args: Any) -> Any:
            with torch.cuda.device_of(args[0]), set_wrap_triton_enabled(False):
                return launch(*args)

        custom_op(f"flux_core::{name}", body, mutates_args=()).register_fake(fake)
        traced = getattr(torch.ops.flux_core, name)

        def call(*args: Any) -> Any:
            return traced(*args) if torch.compiler.is_compiling() else body(*args)

        return call

    return decorate


def cdiv(count: int, size: int) -> int:
    """How many pieces of that size hold so many. Triton's own, which kernels may call too, takes 5 µs of the host."""
    return -(-count // size)


def dense_rows(x: Tensor) -> Tensor:
    """The same values with contiguous features; the output of a Linear, or a slice of it, is returned as it is."""
    return x if x.stride(-1) == 1 else x.contiguous()
