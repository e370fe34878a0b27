"""Training in a budget of a device's memory: blocks that have no room come when they compute, and once more in reverse.

Frozen weights are only ever copied to the device. What learns stays there, and so does all that is outside blocks, but
for the modulation, whose layers a forward copies one by one (`model/ops.py`). Each block keeps its inputs only. In the
backward it is computed again and its gradients at once, while it is there: so all that reads its bytes is queued before
they may be overwritten, and where memory runs out, this one piece of work is done again. `torch.utils.checkpoint` would
spread it over autograd's steps, and counts what a recomputation saves, which one that failed half-way upsets.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..device.budget import limited
from ..device.choice import empty_device_cache
from ..device.memory import ram
from ..device.oom import CPU, retried
from ..errors import UsageError
from ..model import Flux
from ..model.layers import ModulationOut
from ..pipeline.bundle import Bundle, bundled, tensors_of
from ..pipeline.placement import is_modulation, move, move_layers
from ..pipeline.stream import Stream
from ..pipeline.streamed import BLOCKS, PINNED
from .adapter import Factors

BEFORE_MODULATION = ("time_in", "guidance_in", "vector_in")
"""parts of the transformer whose gradients pass through the modulation"""
B = TypeVar("B")
T = TypeVar("T")


class RoundTrip(Stream):
    """Blocks that compute in order, and in a backward in reverse. `train` takes its `fetch`."""

    def __init__(self, blocks: Sequence[nn.Module], bundles: Sequence[Bundle], device: torch.device) -> None:
        super().__init__(blocks, bundles, device)
        self.learning = [[x for x in block.parameters() if x.requires_grad] for block in blocks]
        self.order = list(bundles)
        """of a forward and its backward, after which the next forward begins"""
        self.at = 0
        """where in it the block is that computes"""

    def fetch(self, blocks: Iterable[B]) -> Iterator[B]:
        """The blocks in order. Each is on the device while it computes, also in the backward."""
        for block in blocks:
            yield cast(B, _Visit(self, self.place[id(self.of[id(block)])]))

    def expect(self, number: int, learns: bool) -> None:
        """Know of a block's forward before it begins. learns: whether it has a backward, as all that follow then."""
        if number == 0:
            self.order = list(self.bundles)
        if learns and len(self.order) == len(self.bundles):
            self.order += reversed(self.bundles[number:])

    def forward(self, number: int, work: Callable[[], T]) -> T:
        """`work()` while a block is there."""
        return self._visit(number, number, work)

    def backward(self, number: int, work: Callable[[], T]) -> T:
        """`work()` while a block is there once more."""
        return self._visit(number, 2 * len(self.blocks) - 1 - number, work)

    def _visit(self, number: int, at: int, work: Callable[[], T]) -> T:
        self.at = at
        self.begin(self.blocks[number])
        try:
            return retried(work, self.evict)
        finally:
            self.end(self.blocks[number])

    def _coming(self, bundle: Bundle) -> Iterator[Bundle]:
        """Blocks that are not resident, in the order in which they come; the last one of a forward comes twice."""
        for following in (*self.order[self.at + 1 :], *self.order[: self.at]):
            if id(following) not in self.resident:
                self._keep(following)
                yield following

    def _keep(self, bundle: Bundle) -> None:
        """What is there and comes once more counts as if it had just come: what comes later does not overwrite it."""
        assert self.ring is not None
        for place in [place for place in self.ring.places if place.bundle is bundle and place.is_done]:
            place.is_done = False
            self.ring.places.remove(place)
            self.ring.places.append(place)


class _Visit:
    """A block as a forward calls it."""

    def __init__(self, trip: RoundTrip, number: int) -> None:
        self.trip, self.number = trip, number
        self.block, self.learning = trip.blocks[number], trip.learning[number]

    def __call__(self, *args: Tensor | ModulationOut) -> Any:
        tensors = [x for arg in args for x in (arg if isinstance(arg, ModulationOut) else (arg,))]
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *self.learning))
        self.trip.expect(self.number, learns)
        return _Recomputed.apply(self, tuple(map(type, args)), *tensors, *self.learning)

    def gradients(
        self,
        kinds: Sequence[type],
        tensors: Sequence[Tensor],
        needed: Sequence[bool],
        cast: torch.autocast,
        grads: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Of the inputs that need one, then of what learns, from those of the outputs."""
        inputs = [x.detach().requires_grad_(needs) for x, needs in zip(tensors, needed, strict=False)]
        with torch.enable_grad(), cast:
            found = self.block(*_arguments(kinds, inputs))
        outputs = (found,) if isinstance(found, Tensor) else found
        pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
        known = (*inputs, *self.learning)
        wanted = [x for x in known if x.requires_grad]
        learned, from_above = zip(*pairs, strict=True)
        # factors of its modulation have no part in it
        of_wanted = iter(torch.autograd.grad(learned, wanted, from_above, allow_unused=True))
        return [next(of_wanted) if x.requires_grad else None for x in known]


class _Recomputed(torch.autograd.Function):
    """A block's outputs; it keeps the inputs. What learns inside is an input, too, so that it gets its gradients."""

    @staticmethod
    def forward(ctx: Any, visit: _Visit, kinds: Sequence[type], *tensors: Tensor) -> Any:
        inputs, device = tensors[: len(tensors) - len(visit.learning)], visit.trip.device.type
        ctx.save_for_backward(*inputs)
        ctx.visit, ctx.kinds = visit, kinds
        ctx.cast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return visit.trip.forward(visit.number, partial(visit.block, *_arguments(kinds, inputs)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        visit = ctx.visit
        work = partial(visit.gradients, ctx.kinds, ctx.saved_tensors, ctx.needs_input_grad[2:], ctx.cast, grads)
        return None, None, *visit.trip.backward(visit.number, work)


def _arguments(kinds: Sequence[type], tensors: Sequence[Tensor]) -> list[Tensor | ModulationOut]:
    """A block's arguments of these kinds, made of all their tensors."""
    left = iter(tensors)
    return [
        ModulationOut(next(left), next(left), next(left)) if kind is ModulationOut else next(left) for kind in kinds
    ]


@contextmanager
def streaming(model: Flux, device: torch.device, budget: int, at_work: int) -> Iterator[RoundTrip]:
    """A context in which an adapted transformer learns in so many bytes of a device's memory. It is at home after it.

    at_work: bytes that a step takes beside the model: activations, gradients, the optimizer's. The blocks get the rest:
    as many as fit are resident, the others come and go. MemoryShortage where not even one has room; UsageError.
    """
    if found := [name for name in BEFORE_MODULATION if _learns(getattr(model, name))]:
        raise UsageError(
            f"{', '.join(found)} cannot learn while blocks are streamed: the gradient would have to pass the "
            "modulation, which is not on the device. Next: leave time_text_embed out of the targets, or a larger card"
        )
    blocks = {f"{kind}.{i}": block for kind in BLOCKS[Flux] for i, block in enumerate(getattr(model, kind))}
    move(model, CPU)
    try:
        with limited(budget, device):
            bundles = _bundles(blocks, device)
            aside = Bundle([x for _, x in tensors_of(_frozen(model.named_modules(), modulation=True))])
            _pin(bundles, device, aside)  # for as long as there is such an object
            move_layers(model, device, without=tuple(f"{kind}." for kind in BLOCKS[Flux]))
            for layer in model.modules():
                if isinstance(layer, Factors):
                    layer.to(device)
            trip = RoundTrip(list(blocks.values()), bundles, device)
            room = budget - at_work - (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
            try:
                trip.enter(room, room)
                yield trip
            finally:
                trip.leave()
    finally:
        move(model, CPU)
        empty_device_cache(device)


def _learns(part: nn.Module | None) -> bool:
    return part is not None and any(x.requires_grad for x in part.parameters())


def _frozen(modules: Iterable[tuple[str, nn.Module]], modulation: bool) -> list[nn.Module]:
    """Those that do not learn, of the modulation or of all else."""
    return [x for name, x in modules if is_modulation(name) == modulation and not isinstance(x, Factors)]


def _bundles(blocks: Mapping[str, nn.Module], device: torch.device) -> list[Bundle]:
    """The frozen bytes of each block, without its modulation."""
    made: list[Bundle] = []
    for name, block in blocks.items():
        layers = _frozen(block.named_modules(prefix=name), modulation=False)
        made.append(bundled(layers, partial(move_layers, block, device, name), partial(_pin, made, device)))
    return made


def _pin(others: Sequence[Bundle], device: torch.device, bundle: Bundle) -> None:
    """Pin memory at home, while that of all is below its share."""
    pinned = sum(one.size for one in others if one.is_pinned)
    if device.type == "cuda" and pinned + bundle.size <= PINNED * ram():
        with suppress(RuntimeError):
            bundle.pin()
