"""Networks without weights: as many modules with the same shapes, for plans and for what is filled from files."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P")


def without_weights(kind: Callable[[P], M], params: P) -> M:
    """A network of these sizes on the meta device, which has shapes and no memory."""
    with torch.device("meta"), _SkipInit():
        return kind(params)


class _SkipInit(TorchFunctionMode):
    """Turns the functions of `torch.nn.init` into no-ops inside: on `meta` they are half of the time it takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)
