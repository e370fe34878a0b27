"""A module's tensors as bytes that come to a device together, and go home again without being copied back.

A block is frozen, so its memory at home stays what it is: to come is one copy of bytes into memory that is there
already, to go is to point its tensors back; only what was written meanwhile is copied. Tensors keep their places to
each other: what shares memory at home (a weight and the factor of a LoRA behind it) shares it on the device.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn

ALIGN = 512
"""bytes at whose multiples a span begins in a buffer, as in memory that torch allocates"""
LARGE = 2**20
"""bytes from which a span is worth locking by itself"""


Place = tuple[int | str, ...]
"""where a tensor is in a block: number of the layer, names of attributes"""


class Span(NamedTuple):
    """Bytes at home that a buffer holds in one piece."""

    home: Tensor
    """uint8, at home"""
    start: int
    """where it is in a buffer"""


class View(NamedTuple):
    """A tensor of a module, and where it is in a buffer."""

    tensor: Tensor
    home: Tensor
    """the same without autograd, at home"""
    start: int
    """its first byte in a buffer"""


class Lock:
    """Memory at home that is locked while this object is there."""

    def __init__(self, home: Tensor) -> None:
        """home: uint8. RuntimeError where it cannot be locked."""
        cuda = torch.cuda.cudart()
        error = cuda.cudaHostRegister(home.data_ptr(), len(home), 0)
        if error != cuda.cudaError.success:
            with suppress(RuntimeError):  # CUDA reports it to the next launch, too
                torch.zeros(1, dtype=torch.uint8, device="cuda")
            raise RuntimeError(f"memory cannot be locked: {error}")
        # keeps the memory until it is unlocked; when the process ends, the driver does it
        finalize(self, _unlock, home).atexit = False


def _unlock(home: Tensor) -> None:
    torch.cuda.synchronize()  # a copy from there may be on its way
    torch.cuda.cudart().cudaHostUnregister(home.data_ptr())


def locked(size: int) -> Tensor:
    """New locked memory of so many bytes. RuntimeError where there is none."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


class Bundle:
    """The tensors of a module whose memory is at home."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.is_pinned = False
        self.locks: list[Lock] = []
        self.entered: list[tuple[int, int]] = []
        """while it is in a buffer: address and version of each tensor, by which changes are seen"""
        self.copied: list[int] = []
        """version of each tensor when it was last copied"""
        self._hold(tensors)

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        self.spans: list[Span] = []
        """in the order of a buffer, small ones first"""
        self.size = 0
        """bytes of a buffer for it"""
        self.views: list[View] = []
        for first, length, group in sorted(map(_extent, _overlapping(tensors)), key=lambda one: one[1] >= LARGE):
            self.spans.append(Span(_bytes(group[0], first, length), self.size))
            self.views += [View(x, x.data, self.size + x.data_ptr() - first) for x in group]
            self.size += -(-length // ALIGN) * ALIGN

    def pin(self) -> None:
        """Lock its home in memory, which a device then reads fastest. RuntimeError where that cannot be.

        Large pieces are locked where they are, which takes a tenth of the time of new locked memory. Small ones move
        into one piece of that, and large ones where a file's mapping cannot be locked.
        """
        small = [span for span in self.spans if len(span.home) < LARGE]
        if small:
            self._move_home(0, small[-1].start + len(small[-1].home))
        for home, start in self.spans[bool(small) :]:
            if not home.is_pinned():
                try:
                    self.locks.append(Lock(home))
                except RuntimeError:
                    self._move_home(start, start + len(home))
        self.is_pinned = True
        self._point_home()

    def _move_home(self, first: int, last: int) -> None:
        """Give the spans between two places in a buffer one piece of new, locked memory at home."""
        piece = locked(last - first)
        inside = [span for span in self.spans if first <= span.start < last]
        for home, start in inside:
            piece[start - first : start - first + len(home)] = home
        self.views = [
            view._replace(home=_view(piece, view._replace(start=view.start - first)))
            if first <= view.start < last
            else view
            for view in self.views
        ]
        self.spans = sorted(
            [Span(piece, first), *(span for span in self.spans if not first <= span.start < last)],
            key=lambda span: span.start,
        )

    def copy(self, buffer: Tensor) -> None:
        """Copy its bytes into a buffer, queued on the current stream."""
        self.copied = [view.tensor._version for view in self.views]
        for home, start in self.spans:
            buffer[start : start + len(home)].copy_(home, non_blocking=True)

    @property
    def is_current(self) -> bool:
        """Whether nothing was written since it was last copied."""
        return self.copied == [view.tensor._version for view in self.views]

    def renew(self) -> None:
        """Take new memory that tensors got at home for their home: where a LoRA was merged into weights."""
        if not self.entered and any(view.tensor.data_ptr() != view.home.data_ptr() for view in self.views):
            self.is_pinned, self.locks, self.copied = False, [], []
            self._hold([view.tensor for view in self.views])

    def views_of(self, buffer: Tensor) -> list[Tensor]:
        """The module's tensors in a buffer."""
        return [_view(buffer, view) for view in self.views]

    def enter(self, buffer: Tensor, views: Sequence[Tensor] | None = None) -> None:
        """Point the module's tensors at a buffer that has its bytes, or will have them.

        views: they in the buffer, if known.
        """
        for view, there in zip(self.views, views or self.views_of(buffer), strict=True):
            view.tensor.data = there
        self.entered = [(view.tensor.data_ptr(), view.tensor._version) for view in self.views]

    def leave(self) -> None:
        """Point the module's tensors at their memory at home.

        Those that were written in the buffer are copied first: the scales of LoRAs, weights that one is merged into.
        Nothing happens at home, where they may have got new memory.
        """
        if not self.entered:
            return
        for view, entered in zip(self.views, self.entered, strict=True):
            if entered != (view.tensor.data_ptr(), view.tensor._version):
                view.home.copy_(view.tensor)
        self._point_home()
        self.entered = []

    def _point_home(self) -> None:
        for view in self.views:
            view.tensor.data = view.home


def bundled(layers: Sequence[nn.Module], arrive: Callable[[], None], pin: Callable[[Bundle], None]) -> Bundle:
    """The bundle of a block's layers, pinned, after `arrive` has moved them to their device once: there they choose how
    to multiply, and may join their memory with that of branches.

    Home is where the tensors were before; memory that came about by the move is copied.
    """
    first = Bundle([x for _, x in tensors_of(layers)])
    pin(first)  # so that they arrive faster
    before = {place: x.data for place, x in tensors_of(layers)}
    arrive()  # which makes new objects of buffers
    places = {id(x): place for place, x in tensors_of(layers)}
    tensors = [x for _, x in tensors_of(layers)]
    for group in _overlapping(tensors):
        old = before.get(places[id(group[0])])
        if len(group) == 1 and old is not None and _layout(old) == _layout(group[0]):
            group[0].data = old
        else:
            there = Bundle(group)
            home = torch.empty(there.size, dtype=torch.uint8, device="cpu")
            there.copy(home)
            there.enter(home)
    found = Bundle(tensors)
    found.locks = first.locks
    pin(found)
    return found


def _layout(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.stride(), x.dtype


def tensors_of(layers: Sequence[nn.Module]) -> list[tuple[Place, Tensor]]:
    """The tensors that modules hold themselves, by place: parameters, buffers, other attributes, and in dataclasses."""
    found: list[tuple[Place, Tensor]] = []
    for i, layer in enumerate(layers):
        for values in (layer._parameters, layer._buffers, vars(layer)):
            found += [((i, name, *rest), x) for name, value in values.items() for rest, x in _inside(value)]
    return found


def _inside(value: Any) -> Iterator[tuple[Place, Tensor]]:
    if isinstance(value, Tensor):
        yield (), value
    elif is_dataclass(value) and not isinstance(value, type):
        for name in (field.name for field in fields(value)):
            yield from (((name, *rest), x) for rest, x in _inside(getattr(value, name)))


def _view(buffer: Tensor, view: View) -> Tensor:
    like, start = view.home, buffer.storage_offset() + view.start
    empty = torch.empty(0, dtype=like.dtype, device=buffer.device)
    return empty.set_(buffer.untyped_storage(), start // like.itemsize, like.shape, like.stride())


def _bytes(x: Tensor, first: int, length: int) -> Tensor:
    """The bytes from an address on, in the storage of x."""
    start = first - x.untyped_storage().data_ptr()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage(), start, (length,), (1,))


def _extent(group: list[Tensor]) -> tuple[int, int, list[Tensor]]:
    """Address and bytes of memory that tensors share, and these."""
    first = min(x.data_ptr() for x in group)
    return first, max(_end(x) for x in group) - first, group


def _end(x: Tensor) -> int:
    """The address behind its last number."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.itemsize


def _overlapping(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors by the memory that they share, without those that are empty."""
    groups: list[list[Tensor]] = []
    end = 0
    for x in sorted((x for x in {id(x): x for x in tensors}.values() if x.numel()), key=lambda x: x.data_ptr()):
        if not groups or x.data_ptr() >= end:
            groups.append([])
        groups[-1].append(x)
        end = max(end, _end(x))
    return groups
