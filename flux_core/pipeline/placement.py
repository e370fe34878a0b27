"""The devices of a model's parts: all on the computing device, or each only while it is used.

Code that computes runs inside `using(*parts)`, and loops over blocks iterate over `fetch(blocks)`. Another way of
placing weights is a subclass with its own `using` and `fetch`.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..device.budget import Budget
from ..device.choice import empty_device_cache
from ..device.memory import Picture
from ..device.oom import CPU, OomFallback
from ..linears.contract import Leaf
from ..model import MODULATION, Flux
from ..text import TextEncoder
from .components import Components

B = TypeVar("B")
_MODULATION = re.compile(f"({'|'.join(map(re.escape, MODULATION))})(\\.|$)")


class Placement:
    """All parts on the device; with the fallback's `offload` only those in use, the others on the CPU."""

    def __init__(self, components: Components, fallback: OomFallback, budget: Budget | None = None) -> None:
        """budget: what the user allows; pictures that do not fit are refused."""
        self.components, self.fallback, self.budget = components, fallback, budget
        self._present: tuple[Any, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.fallback.device

    @property
    def is_fixed(self) -> bool:
        """Whether weights keep their addresses between two steps, as a CUDA graph needs."""
        return not self.fallback.offload

    def admit(self, size: tuple[int, int], rows: int, steps: int | None, beside: int = 0, behind: int = 0) -> None:
        """MemoryShortage where a budget has no room for a picture. size: width and height; rows: of its batches;
        beside: bytes of networks that a model does not have by itself; behind: tokens of references."""
        if self.budget is not None:
            self.budget.admit(Picture(*size, rows, self.fallback.vae_tiling, steps, behind), beside)

    def release(self) -> None:
        """Where parts take turns, all go home: somebody else places them now."""
        if self.fallback.offload:
            self._exchange(())

    @contextmanager
    def visit(self, network: nn.Module) -> Iterator[None]:
        """A context in which a network that is none of the model's parts is on the device; alone, where these take
        turns, and then it goes home."""
        self.release()
        try:
            network.to(self.device)
            yield
        finally:
            if self.fallback.offload:
                network.to(CPU)

    def free(self, part: Any) -> None:
        """Free the memory of a text encoder, which is loaded again when it is used."""
        part.free()
        self._present = ()  # the next turn puts it where it computes
        empty_device_cache(self.device)

    @contextmanager
    def using(self, *parts: Any) -> Iterator[None]:
        """A context in which these parts are on the device."""
        if self.fallback.offload and self._present != parts:
            self._exchange(parts)
        yield

    def fetch(self, blocks: Iterable[B]) -> Iterator[B]:
        """The blocks in order, each with its weights on the device until the next is requested."""
        return iter(blocks)

    def evict(self, part: Any) -> bool:
        """Free some of the memory that a part has on the device. Whether there was any that it can do without."""
        return False

    def _exchange(self, parts: tuple[Any, ...]) -> None:
        self._present = ()  # until all moves are made: one may run out of memory
        for part in self.components:
            if part not in parts:
                move(part, CPU)
        empty_device_cache(self.device)
        for part in parts:
            if isinstance(part, TextEncoder):
                part.ready()
            move(part, self.device)
        self._present = parts


def move(part: Any, device: torch.device) -> None:
    """Move a part. The transformer's modulation stays on the CPU: a `ModulationTable` copies its layers one by one.

    Encoders that are plain functions have nothing to move, and one with a home stays there.
    """
    if isinstance(part, Flux):
        move_layers(part, device)
    elif hasattr(part, "to") and getattr(part, "home", None) is None:
        part.to(device)


def move_layers(part: nn.Module, device: torch.device, name: str = "", without: tuple[str, ...] = ()) -> None:
    """Move a part layer by layer, but for modulation, and for modules whose names begin with one of `without`.

    Modules that wrap others (adapters) are moved with their own parameters. name: the part's in its network.
    """
    for inner, module in part.named_modules(prefix=name):
        if without and inner.startswith(without):
            continue
        target = CPU if is_modulation(inner) else device
        if isinstance(module, Leaf) or not any(module.children()):  # a layer with a layer inside moves as one
            module.to(target)
        elif _has_own_tensors(module):
            module._apply(lambda x, target=target: x.to(target), recurse=False)  # type: ignore[misc]


def is_modulation(name: str) -> bool:
    """Whether a module of that name in the transformer is a projection of modulation, or inside one."""
    return _MODULATION.search(name) is not None


def _has_own_tensors(module: nn.Module) -> bool:
    return any(x is not None for x in (*module._parameters.values(), *module._buffers.values()))
