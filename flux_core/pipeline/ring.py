"""Buffers on a device through which blocks come and go, one computing while the next is copied.

Two buffers are enough: a block's successor is copied while it computes. On CUDA copies have a stream of their own, and
events keep the two in order; Python only queues.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from .bundle import Bundle


class _Slot:
    """A buffer, and who is in it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.bundle: Bundle | None = None
        self.copied: torch.cuda.Event | None = None
        """when its bytes are there"""
        self.used: torch.cuda.Event | None = None
        """when its block is done"""


class Ring:
    """So many buffers of a size."""

    def __init__(self, device: torch.device, number: int, size: int) -> None:
        """torch's error where there is no memory for them."""
        self.device = device
        self.slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(number)]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for slot in self.slots if self.stream is not None else ():  # work on what had that memory before may be queued
            slot.used = torch.cuda.current_stream(device).record_event()

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return sum(slot.buffer.nbytes for slot in self.slots)

    def bring(self, bundle: Bundle) -> None:
        """A block's tensors are on the device from here on, for what is queued on the current stream."""
        self.prefetch(bundle)
        slot = self._slot_of(bundle)
        assert slot is not None
        if not bundle.is_current:
            self._copy(slot, bundle)
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        bundle.enter(slot.buffer)

    def prefetch(self, bundle: Bundle) -> None:
        """Begin to copy a block's bytes, if they are not on their way, into the buffer that was used longest ago."""
        if self._slot_of(bundle) is not None:
            return
        slot = self.slots.pop(0)
        self.slots.append(slot)
        if slot.bundle is not None:
            slot.bundle.leave()
        slot.bundle = bundle
        self._copy(slot, bundle)

    def _copy(self, slot: _Slot, bundle: Bundle) -> None:
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            if self.stream is not None and slot.used is not None:
                self.stream.wait_event(slot.used)
            bundle.copy(slot.buffer)
            slot.copied = self.stream.record_event() if self.stream is not None else None

    def done(self, bundle: Bundle) -> None:
        """A block has been computed: its buffer may be used for another."""
        slot = self._slot_of(bundle)
        if slot is not None and self.stream is not None:
            slot.used = torch.cuda.current_stream(self.device).record_event()

    def rest(self) -> None:
        """All blocks go home, where they may be written; who is not comes back without a copy."""
        for slot in self.slots:
            if slot.bundle is not None:
                slot.bundle.leave()
            if self.stream is not None:  # a forward may have ended before its block was done
                slot.used = torch.cuda.current_stream(self.device).record_event()

    def forget(self, bundle: Bundle) -> None:
        """A block is not in a buffer any more: it has one of its own."""
        slot = self._slot_of(bundle)
        if slot is not None:
            bundle.leave()
            slot.bundle = None

    def _slot_of(self, bundle: Bundle) -> _Slot | None:
        return next((slot for slot in self.slots if slot.bundle is bundle), None)
