"""How Triton kernels are launched, by a compiler and without one.

torch.compile wants operators of its own. To make one known imports torch._dynamo, which takes seconds, so that is done
when a compiler first comes to a call: a picture that nothing compiles waits for none of it.
"""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled, set_wrap_triton_enabled
from torch.library import custom_op, triton_op
from torch.library import wrap_triton as wrapped

_unknown: dict[str, Callable[[], object]] = {}
"""makes the operator of that name known"""
_registering = threading.RLock()


def known(name: str) -> bool:
    """Makes an operator known; True. In torch 2.13 other threads may come here while one compiles."""
    with _registering:
        if name in _unknown:
            _unknown[name]()
            del _unknown[name]
    return True


known._dynamo_marked_constant = True  # type: ignore[attr-defined]
"""what `torch.compiler.assume_constant_result` sets, so that a compiler calls it while it traces; that function would
import torch._dynamo"""


def wrap_triton(kernel: Any) -> Any:
    """The kernel, or in a trace what that sees of it. torch looks for calls of this name in the source of operators."""
    return wrapped(kernel) if is_wrap_triton_enabled() else kernel


def operator(name: str, changes: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: a `triton_op` of that name under tracing; else the function itself, without the dispatcher.

    Dispatch costs 50 to 100 µs of the host's time, more than most of these kernels take for a small picture.
    changes: arguments that it writes into.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        _unknown[name] = lambda: triton_op(f"flux_core::{name}", launch, mutates_args=changes)
        return _either(name, launch)

    return decorate


def opaque(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`operator` for functions that launch more than Triton's kernels, and that a compiler shall not take apart.

    fake: an output without values, of the same arguments.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launch)
        def body(*args: Any) -> Any:
            return _launched(launch, args)

        _unknown[name] = lambda: custom_op(f"flux_core::{name}", body, mutates_args=()).register_fake(fake)
        return _either(name, launch)

    return decorate


def _either(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the operator under tracing, else of the function."""

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() and known(name):
            return getattr(torch.ops.flux_core, name)(*args)
        return _launched(launch, args)

    return call


def _launched(launch: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with torch.cuda.device_of(args[0]), set_wrap_triton_enabled(False):  # Triton launches on the current device
        return launch(*args)


def cdiv(count: int, size: int) -> int:
    """How many pieces of that size hold so many. Triton's own, which kernels may call too, takes 5 µs of the host."""
    return -(-count // size)


def dense_rows(x: Tensor) -> Tensor:
    """The same values with contiguous features; the output of a Linear, or a slice of it, is returned as it is."""
    return x if x.stride(-1) == 1 else x.contiguous()
