"""How Triton kernels are launched, by a compiler and without one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.library import triton_op


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


def dense_rows(x: Tensor) -> Tensor:
    """The same values with contiguous features; the output of a Linear, or a slice of it, is returned as it is."""
    return x if x.stride(-1) == 1 else x.contiguous()
