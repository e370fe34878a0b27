"""A step as a CUDA graph, for pictures so small that Python cannot keep up with the device.

A forward of FLUX.1-dev is about a thousand launches. At a megapixel each runs long enough for the next to be
waiting when it ends; at 256x256 the device is idle most of the time. A graph is a single launch, recorded at the second
step of a schedule (the first has done all that is tried out, compiled or allocated once) and replayed from then on. It
runs the same kernels on the same numbers, so no bit of the picture changes.

Python code between two kernels runs when the graph is recorded, and not again. So there is no replay with a plan, nor
for a model in which `has_user_code` finds hooks or functions of the user's.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..linears.branch import BranchedLinear
from ..linears.contract import is_untouched
from ..linears.formats import format_of
from ..model import Modulations, ModulationTable
from ..model.ops import Ops
from ..terminal import note

TOKENS = 2048
"""of text and picture, in all rows of a batch, up to which launches bound the time of a step"""
MORE_LAUNCHES = 8192
"""the same where a step is short and has more launches: in fp8 with LoRAs, and with attention in eight bits"""
STEPS = 4
"""in a schedule from which a recording pays: it takes the host as long as a step"""


def is_worth_it(model: nn.Module, device: torch.device, tokens: int, steps: int, branched: bool | None = None) -> bool:
    """Whether so many steps of so many tokens are faster from a graph on that device, and may be recorded.

    branched: whether LoRAs will be beside the model's layers; None: as they are now.
    """
    if device.type != "cuda" or steps < STEPS or tokens > MORE_LAUNCHES or has_user_code(model):
        return False
    if tokens <= TOKENS or attends_in_eight_bits(model):
        return True
    if format_of(model) != "fp8":
        return False
    return has_branches(model) if branched is None else branched


def attends_in_eight_bits(model: nn.Module) -> bool:
    found = (getattr(part, "ops", None) for part in model.modules())
    return any(isinstance(ops, Ops) and hasattr(ops.attend, "way") for ops in found)


def has_branches(model: nn.Module) -> bool:
    """Whether LoRAs are beside any of its layers."""
    return any(isinstance(part, BranchedLinear) for part in model.modules())


def has_user_code(model: nn.Module) -> bool:
    """Whether a forward runs the user's Python: hooks, patched forwards, functions, classes that are not ours."""

    def is_ours(what: object) -> bool:
        return getattr(what, "__module__", "").split(".")[0] in ("flux_core", "torch")

    def functions(part: nn.Module) -> Iterator[object]:
        yield from (type(part), type(part).forward, *filter(callable, vars(part).values()))
        if is_ours(type(part)):
            yield from filter(callable, getattr(part, "ops", ()))

    return not all(is_untouched(part, type(part)) and all(map(is_ours, functions(part))) for part in model.modules())


class GraphedVelocity:
    """The velocity along a schedule: the first step computed launch by launch, the others replayed from a graph."""

    def __init__(self, forward: Callable[[Tensor, float, Modulations], Tensor], table: ModulationTable) -> None:
        """forward: of latents [B, L, C], sigma and modulation; sigma acts only through its modulation."""
        self.forward, self.table = forward, table
        self.next_sigma = dict(pairwise(table.sigmas))
        self.calls = 0
        self.graph: Graph | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self.graph = self._record(x, sigma)
        if self.graph is None:
            return self.forward(x, sigma, self.table.at(sigma))
        self._load(self.graph, sigma)
        velocity = self.graph.replay(x)
        self._load(self.graph, self.next_sigma.get(sigma, sigma))  # while the device computes
        return velocity

    def exchange(self, table: ModulationTable) -> None:
        """Use another table of the same sigmas from the next step on; the recording stays."""
        self.table = table
        if self.graph is not None:
            self.graph.sigma = math.nan  # what it has loaded is the old table's

    def _load(self, graph: "Graph", sigma: float) -> None:
        if sigma != graph.sigma:
            graph.load(sigma, self.table.at(sigma))

    def _record(self, x: Tensor, sigma: float) -> "Graph | None":
        try:
            return Graph(self.forward, x, sigma, self.table.at(sigma))
        except RuntimeError as error:  # no memory for it, or a launch that a driver does not record
            reason = (str(error).splitlines() or [""])[0][:120]
            note(f"the step could not be recorded as a CUDA graph ({reason}): it goes on launch by launch, slower")
            return None


class Graph:
    """A recorded forward with its input and output tensors."""

    def __init__(
        self, forward: Callable[[Tensor, float, Modulations], Tensor], x: Tensor, sigma: float, mods: Modulations
    ) -> None:
        self.x, self.mods, self.sigma = x.clone(), mods.map(_copy), sigma
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(x.device)
        with torch.cuda.device_of(x), torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.velocity = forward(self.x, sigma, self.mods)

    def load(self, sigma: float, mods: Modulations) -> None:
        """Copy the modulation of that sigma to where the graph reads it, queued behind the device's work."""
        torch._foreach_copy_(self.mods.tensors(), mods.tensors())
        self.sigma = sigma

    def replay(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.velocity.clone()


def _copy(x: Tensor) -> Tensor:
    """A copy with the same strides, on which compiled blocks are specialized."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
