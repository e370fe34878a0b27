"""Networks in a device's memory as far as a budget goes; the blocks that have no room come when they compute.

Parts take turns, as with `--offload`. Of the part whose turn it is, everything but its blocks comes to the device, and
of its blocks as many as fit; the others go through a ring (`ring.py`), some computing while the next are copied. So the
bits are those of a model that is there whole: the same kernels on the same numbers.

What a forward needs beside weights is not guessed: on CUDA the first one runs with no block resident, and its peak says
how many have room. Where an allocation fails all the same, two of them go home, and that block is computed again.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, reduce
from typing import Any, TypeVar
from weakref import WeakSet, ref

import torch
from torch import nn

from ..device.budget import Budget, limited
from ..device.choice import empty_device_cache
from ..device.memory import ram
from ..device.oom import CPU, OomFallback
from ..model import Flux
from ..terminal import note
from ..text import TextEncoder
from .bundle import Bundle, bundled, tensors_of
from .components import Components
from .placement import Placement, is_modulation, move, move_layers
from .stream import Stream

PINNED = 0.5
"""of the CPU's memory, up to which blocks at home are pinned"""
BLOCKS: dict[type, tuple[str, ...]] = {
    Flux: ("double_blocks", "single_blocks"),
    TextEncoder: ("model.encoder.block",),
}
"""where a part has its blocks, in the order in which they compute"""
B = TypeVar("B")
_ALIVE: "WeakSet[Streamed]" = WeakSet()
"""all of the process"""


class Streamed(Placement):
    """Parts take turns in so many bytes of the device's memory: the most that the process may hold while they compute.

    Where a process has several such placements, all their parts take turns. Until the fallback's `offload` is on, all
    parts are there, as without a budget, and only the limit holds.
    """

    budget: Budget

    def __init__(self, components: Components, fallback: OomFallback, budget: Budget) -> None:
        super().__init__(components, fallback, budget)
        self._bundles: dict[int, tuple[object, list[Bundle]]] = {}
        """of a part's blocks, by the part, with the state of its layers that they were made of"""
        self._aside: dict[int, Bundle] = {}
        """what is never there as a whole, the modulation, by the part"""
        self._streams: dict[int, Stream] = {}
        """of the parts on the device"""
        self._uses = 0
        """contexts of `using` that are open"""
        _ALIVE.add(self)

    @contextmanager
    def using(self, *parts: Any) -> Iterator[None]:
        with self._limited():
            if self.is_fixed:
                yield
                return
            if self._present != parts or any(self._is_stale(part) for part in parts):
                self._exchange(parts)
            for stream in self._streams.values():
                stream.renew()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                yield
            finally:
                for stream in self._streams.values():
                    stream.rest()
            if self.device.type == "cuda":
                self._learn(parts)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """A context in which torch takes no more of the device than the budget, gaps between tensors included."""
        limits = bool(self.budget.asked) and not self._uses
        self._uses += 1
        try:
            with limited(self.budget.size, self.device) if limits else nullcontext():
                yield
        finally:
            self._uses -= 1

    def fetch(self, blocks: Iterable[B]) -> Iterator[B]:
        stream = self._streams.get(id(self.components.flux))
        return iter(blocks) if stream is None else stream.fetch(blocks)

    def evict(self, part: Any) -> bool:
        stream = self._streams.get(id(part))
        return stream is not None and stream.evict()

    def _learn(self, parts: tuple[Any, ...]) -> None:
        """Keep as many blocks resident as the forward's peak leaves room for."""
        spare = self.budget.size - torch.cuda.max_memory_allocated(self.device)
        for part in parts:
            if stream := self._streams.get(id(part)):
                stream.settle(spare + stream.held + stream.ring_size)

    def free(self, part: Any) -> None:
        if stream := self._streams.pop(id(part), None):
            stream.leave()
        for kept in (self._bundles, self._aside):
            kept.pop(id(part), None)  # type: ignore[attr-defined]
        super().free(part)

    def _exchange(self, parts: tuple[Any, ...]) -> None:
        for other in list(_ALIVE):  # those of other pipelines take turns with these
            if other is not self and other.device == self.device and other._present and not other._uses:
                other._exchange(())
        self._present = ()
        for part in self.components:
            if stream := self._streams.pop(id(part), None):
                stream.leave()
            if id(part) not in self._bundles or self._is_stale(part):  # layers may be on the device
                move(part, CPU)
            elif part not in parts:  # blocks are at home, and keep the way in which they multiply on the device
                move_layers(part, CPU, without=_prefixes(part))
        empty_device_cache(self.device)
        for part in reversed(parts):  # CLIP before T5, which may come in pieces
            self._enter(part)
        self._present = parts

    def _enter(self, part: Any) -> None:
        """Bring a part to the device: whole, if it fits, else with the blocks that fit. MemoryShortage."""
        if isinstance(part, TextEncoder):
            part.ready()
        blocks = {f"{name}{i}": one for name in _prefixes(part) for i, one in enumerate(_inside(part, name))}
        is_cut = id(part) in self._bundles and not self._is_stale(part)
        if not blocks or getattr(part, "home", None) is not None or (not is_cut and self._fits(part)):
            move(part, self.device)
            return
        move_layers(part, self.device, without=_prefixes(part))
        stream = Stream(list(blocks.values()), self._bundled(part, blocks), self.device)
        stream.enter(self._room(), 0 if self.device.type == "cuda" else self._room())
        if not isinstance(part, Flux):
            stream.hook()
        self._streams[id(part)] = stream

    def _room(self) -> int:
        """Bytes of the budget that are free."""
        return self.budget.size - (torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0)

    def _fits(self, part: nn.Module) -> bool:
        """Whether a text encoder may be there whole. What the transformer's forward leaves room for is seen later."""
        size = sum(x.nbytes for x in (*part.parameters(), *part.buffers()))
        return not isinstance(part, Flux) and size <= self._room()

    def _bundled(self, part: Any, blocks: dict[str, nn.Module]) -> list[Bundle]:
        """The blocks' bundles, made when the part first comes, and again when its layers were exchanged."""
        if self._is_stale(part) or id(part) not in self._bundles:
            made: list[Bundle] = []
            self._bundles[id(part)] = _state(part), made
            self._aside.pop(id(part), None)  # old ones unlock their memory
            try:
                for name, block in blocks.items():
                    layers = [x for inner, x in block.named_modules(prefix=name) if not is_modulation(inner)]
                    made.append(bundled(layers, partial(move_layers, block, self.device, name), self._pin))
            except BaseException:
                del self._bundles[id(part)]
                raise
            self._aside[id(part)] = aside = Bundle([x for _, x in tensors_of(_waiting(part))])
            self._pin(aside)
            self._say_where(made)
        return self._bundles[id(part)][1]

    def _is_stale(self, part: Any) -> bool:
        state, _ = self._bundles.get(id(part), (_state(part), []))
        return state != _state(part)

    def _say_where(self, blocks: list[Bundle]) -> None:
        """A line on blocks that are slower to copy."""
        slow = sum(one.size for one in blocks if not one.is_pinned)
        if slow and self.device.type == "cuda":
            locked = sum(one.size for one in blocks) - slow
            note(
                f"{locked / 1e9:.1f} GB of blocks are locked in the CPU's memory, {PINNED:.0%} of it at most; "
                f"{slow / 1e9:.1f} GB come from where they are, mapped files included, which is slower"
            )

    def _pin(self, bundle: Bundle) -> None:
        """Pin a block's memory at home, while that of all is below its share."""
        blocks = (one for _, made in self._bundles.values() for one in made)
        pinned = sum(one.size for one in (*blocks, *self._aside.values()) if one.is_pinned)
        if self.device.type == "cuda" and pinned + bundle.size <= PINNED * ram():
            with suppress(RuntimeError):
                bundle.pin()


def _prefixes(part: Any) -> tuple[str, ...]:
    """How the names of a part's blocks begin: "double_blocks."."""
    return next((tuple(f"{name}." for name in names) for kind, names in BLOCKS.items() if isinstance(part, kind)), ())


def _inside(part: Any, prefix: str) -> Any:
    """The blocks whose names begin so; none in a part that has no such (CLIP, which is small)."""
    return reduce(lambda module, key: getattr(module, key, ()), prefix.removesuffix(".").split("."), part)


def _waiting(part: nn.Module) -> list[nn.Module]:
    """The layers of modulation, of which a table of it copies one at a time."""
    return [layer for name, layer in part.named_modules() if is_modulation(name)]


def _state(part: Any) -> object:
    """What changes when layers of a part are exchanged."""
    if isinstance(part, Flux):
        return part.changes.layers
    model = getattr(part, "model", None)
    return None if model is None else ref(model)
