"""Memory on a device through which blocks come and go, some computing while the next are copied.

It has room for two of the largest blocks, and for more of others: each block takes the place behind the one that came
before it, and at the end the first again. On CUDA copies have a stream of their own, and events keep the two in order;
Python only queues.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from .bundle import Bundle


class _Place:
    """Bytes of the ring, and who is in them."""

    def __init__(self, bundle: Bundle, start: int, buffer: Tensor) -> None:
        self.bundle, self.start, self.buffer = bundle, start, buffer
        self.is_done = False
        """whether its block has been computed"""
        self.copied: torch.cuda.Event | None = None
        """when its bytes are there"""

    @property
    def end(self) -> int:
        return self.start + len(self.buffer)


class Ring:
    """So many bytes of a device."""

    def __init__(self, device: torch.device, size: int) -> None:
        """torch's error where there is no memory for them."""
        self.device = device
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.places: list[_Place] = []
        """in the order in which they came"""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:  # which may still write when nobody holds the ring any more
            self.memory.record_stream(self.stream)
        self.free: list[tuple[int, int, torch.cuda.Event]] = []
        """bytes from and to which may be written after an event"""
        self.views: dict[tuple[int, int], tuple[object, list[Tensor]]] = {}
        """tensors of a bundle at a place, which are made once: the bundle's views, of which they are, and they"""
        self._mark(0, size)  # work on what had that memory before may be queued

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return len(self.memory)

    def bring(self, bundle: Bundle) -> None:
        """A block's tensors are on the device from here on, for what is queued on the current stream."""
        place = self._place_of(bundle) or self._copied(bundle)
        if not bundle.is_current:
            bundle.leave()
            self._copy(place)
        if place.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(place.copied)
        place.is_done = False
        of, views = self.views.get((id(bundle), place.start), (None, []))
        if of is not bundle.views:  # renewed since
            views = bundle.views_of(place.buffer)
            self.views[id(bundle), place.start] = bundle.views, views
        bundle.enter(place.buffer, views)

    def prefetch(self, bundle: Bundle) -> bool:
        """Begin to copy a block's bytes, if they are not there. Whether there is room beside those that are still to
        compute."""
        if self._place_of(bundle) is not None:
            return True
        start = self._next(bundle.size)
        if any(not place.is_done for place in self._over(start, start + bundle.size)):
            return False
        self._copied(bundle)
        return True

    def _copied(self, bundle: Bundle) -> _Place:
        start = self._next(bundle.size)
        for place in self._over(start, start + bundle.size):
            self._remove(place)
        place = _Place(bundle, start, self.memory[start : start + bundle.size])
        self.places.append(place)
        self._copy(place)
        return place

    def _copy(self, place: _Place) -> None:
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            for start, end, event in self.free:
                if start < place.end and place.start < end and self.stream is not None:
                    self.stream.wait_event(event)
            place.bundle.copy(place.buffer)
            place.copied = self.stream.record_event() if self.stream is not None else None

    def _next(self, size: int) -> int:
        start = self.places[-1].end if self.places else 0
        return start if start + size <= self.size else 0

    def _over(self, start: int, end: int) -> list[_Place]:
        return [place for place in self.places if place.start < end and start < place.end]

    def done(self, bundle: Bundle) -> None:
        """A block has been computed: its bytes may be overwritten."""
        place = self._place_of(bundle)
        if place is not None:
            place.is_done = True
            self._mark(place.start, place.end)

    def _mark(self, start: int, end: int) -> None:
        if self.stream is not None:
            event = torch.cuda.current_stream(self.device).record_event()
            self.free = [one for one in self.free if not (start <= one[0] and one[1] <= end)]
            self.free.append((start, end, event))

    def rest(self) -> None:
        """All blocks go home, where they may be written; who is not comes back without a copy."""
        for place in self.places:
            if place.bundle.entered:
                place.is_done = True
            place.bundle.leave()
        self._mark(0, self.size)  # a forward may have ended before its block was done

    def forget(self, bundle: Bundle) -> None:
        """A block is not here any more: it has memory of its own."""
        place = self._place_of(bundle)
        if place is not None:
            self._remove(place)

    def _remove(self, place: _Place) -> None:
        place.bundle.leave()
        self.places.remove(place)

    def _place_of(self, bundle: Bundle) -> _Place | None:
        return next((place for place in self.places if place.bundle is bundle), None)
