"""The blocks of one network, some of them resident on a device, the others there only while they compute."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..device.choice import empty_device_cache
from ..device.oom import retried
from ..device.plan import SLOTS, spread
from ..errors import MemoryShortage, is_out_of_memory
from .bundle import Bundle
from .ring import Ring

EVICTED = 2
"""resident blocks that go home when an allocation fails"""
B = TypeVar("B")
T = TypeVar("T")


class Stream:
    """Blocks in the order in which they compute."""

    def __init__(self, blocks: Sequence[nn.Module], bundles: Sequence[Bundle], device: torch.device) -> None:
        """bundles: of each block. Nothing is on the device yet."""
        self.device, self.blocks, self.bundles = device, blocks, bundles
        self.of = {id(block): bundle for block, bundle in zip(blocks, bundles, strict=True)}
        self.place = {id(bundle): i for i, bundle in enumerate(bundles)}
        self.resident: dict[int, tuple[Bundle, Tensor]] = {}
        self.ring: Ring | None = None
        self.limit: int | None = None
        """bytes that resident blocks may take at most since memory ran out"""
        self.current: int | None = None
        """the bundle of the block that computes"""
        self.hooks: list[Any] = []

    @property
    def held(self) -> int:
        """Bytes of the device that resident blocks take."""
        return sum(buffer.nbytes for _, buffer in self.resident.values())

    @property
    def smallest(self) -> int:
        """Bytes of the device without which no block can compute."""
        return max(bundle.size for bundle in self.bundles)

    def renew(self) -> None:
        """Notice memory that changed at home."""
        for bundle in self.bundles:
            bundle.renew()

    def enter(self, room: int, resident: int) -> None:
        """Take memory for a ring in so many bytes, and for resident blocks in so many of these. MemoryShortage."""
        self.renew()
        total = sum(bundle.size for bundle in self.bundles)
        if total > min(room, resident):
            number = min(SLOTS, room // self.smallest)
            if number < 1:
                raise MemoryShortage(
                    f"{max(room, 0) / 1e9:.2f} GB are left for blocks of {self.smallest / 1e9:.2f} GB each. Next: a "
                    "larger --memory, or a smaller --dtype (nf4, then int8 or fp8)"
                )
            self.ring = Ring(self.device, number * self.smallest)
        self.settle(min(resident + self.ring_size, room))

    @property
    def ring_size(self) -> int:
        """Bytes of the device that blocks take which come and go."""
        return 0 if self.ring is None else self.ring.size

    def settle(self, room: int) -> None:
        """Keep as many blocks resident as so many bytes take, beside the ring; without it, if they take all."""
        sizes = [bundle.size for bundle in self.bundles]
        most = room if self.limit is None else min(room, self.limit)
        if self.ring is not None and sum(sizes) <= most:
            self._drop_ring()
        room = min(room - self.ring_size, most)
        stay = spread(sizes, room)
        if sum(sizes[i] for i in stay) <= self.held <= room:
            return  # others of the same number would only have to be copied
        wanted = {id(self.bundles[i]): self.bundles[i] for i in stay}
        for key in self.resident.keys() - wanted.keys():
            self._release(key)
        for key in wanted.keys() - self.resident.keys():
            bundle = wanted[key]
            buffer = _unless_short(partial(torch.empty, bundle.size, dtype=torch.uint8, device=self.device))
            if buffer is None:  # others hold what the budget promised
                self.limit = self.held
                return
            if self.ring is not None:
                self.ring.forget(bundle)
            bundle.copy(buffer)
            bundle.enter(buffer)
            self.resident[key] = bundle, buffer

    def evict(self) -> bool:
        """Send a few resident blocks home for good, last the one that computes, which then comes as the others do. With
        none left the ring becomes as small as it can be.

        Returns whether there was anything to free, and there is a ring.
        """
        while keys := [key for key in self.resident if key != self.current][-EVICTED:] or list(self.resident):
            for key in keys:
                self._release(key)
            self.limit = self.held
            empty_device_cache(self.device)
            if self.ring is not None or self._has_ring():
                self._bring_current()
                return True
        if self.ring is None or self.ring.size <= self.smallest:
            return False
        current, self.limit = self.current, 0
        self._drop_ring()
        empty_device_cache(self.device)
        self.ring, self.current = _unless_short(partial(Ring, self.device, self.smallest)), current
        self._bring_current()
        return self.ring is not None

    def _bring_current(self) -> None:
        """The block that computes is there."""
        if self.ring is not None and self.current is not None and self.current not in self.resident:
            self.ring.bring(self.bundles[self.place[self.current]])

    def _has_ring(self) -> bool:
        """Take memory for a ring, if there is any."""
        for number in range(SLOTS, 0, -1):
            self.ring = self.ring or _unless_short(partial(Ring, self.device, number * self.smallest))
        return self.ring is not None

    def _release(self, key: int) -> None:
        bundle, _ = self.resident.pop(key)
        bundle.leave()

    def fetch(self, blocks: Iterable[B]) -> Iterator[B]:
        """The blocks in order, each on the device until the next is asked for."""
        for block in blocks:
            self.begin(block)
            yield cast(B, Retried(cast(nn.Module, block), self.evict))
            self.end(block)

    def begin(self, block: Any) -> None:
        """Bring a block, and begin to copy those that come next, as far as there is room for them."""
        bundle = self.of[id(block)]
        self.current = id(bundle)
        if id(bundle) not in self.resident:
            if self.ring is None and not self._has_ring():
                raise torch.OutOfMemoryError(f"out of memory: there are no {self.smallest / 1e9:.2f} GB for a block")
            assert self.ring is not None
            self.ring.bring(bundle)
        if self.ring is None:
            return
        for following in self._coming(bundle):
            if not self.ring.prefetch(following):
                break

    def _coming(self, bundle: Bundle) -> Iterator[Bundle]:
        """Blocks that are not resident, in the order in which they come after this one; those of the next forward,
        too."""
        here = self.place[id(bundle)]
        following = (*self.bundles[here + 1 :], *self.bundles[:here])
        return (one for one in following if id(one) not in self.resident)

    def end(self, block: Any) -> None:
        if self.ring is not None:
            self.ring.done(self.of[id(block)])

    def rest(self) -> None:
        """Between two forwards blocks that are not resident are at home, where numbers in them may be set."""
        self.current = None
        if self.ring is not None:
            self.ring.rest()

    def hook(self) -> None:
        """Bring blocks when a network calls them that knows nothing of it."""
        for block in self.blocks:
            self.hooks.append(block.register_forward_pre_hook(lambda block, _: self.begin(block)))
            self.hooks.append(block.register_forward_hook(lambda block, *_: self.end(block)))

    def _drop_ring(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # copies may be on their way into buffers
        self.rest()
        self.ring = None

    def leave(self) -> None:
        """All blocks go home, and the device's memory is free."""
        for hook in self.hooks:
            hook.remove()
        self._drop_ring()
        self.hooks = []
        for key in list(self.resident):
            self._release(key)


class Retried:
    """A block that is computed again when memory runs out, as long as something can be freed."""

    def __init__(self, block: nn.Module, free: Callable[[], bool]) -> None:
        self.block, self.free = block, free

    def __call__(self, *args: Any, **fields: Any) -> Any:
        return retried(partial(self.block, *args, **fields), self.free)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _unless_short(make: Callable[[], T]) -> T | None:
    """What it makes; None where there is no memory for it."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
