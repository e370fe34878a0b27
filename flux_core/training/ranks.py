"""Several processes that train one adapter, a card each, started by torchrun.

What a step draws is a function of the seed and the step alone, so nobody deals out data: each rank draws a micro-batch
as if it were alone, and computes its share of the pictures, at the noise and the levels that they have in one process.
Gradients are added up once a step, in one tensor: factors are small beside the frozen model, so there is nothing to
gain from adding while the backward goes on, as `DistributedDataParallel` does. Then all ranks make the same update.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import FluxError, UsageError
from ..session.sharing import rank_and_world
from .recipe import Recipe

PATIENCE = timedelta(days=1)
"""how long a rank waits: the first one encodes all captions meanwhile. When a process ends, torchrun ends the others"""


class Share(NamedTuple):
    """What a rank computes of a step."""

    micros: slice
    """of the step's micro-batches"""
    rows: slice
    """of each of them"""
    parts: int
    """ranks that share a micro-batch"""


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together. Each method is called by all of them."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def share(self, recipe: Recipe) -> Share:
        """Whole micro-batches where they can be dealt out evenly, else equal parts of them. UsageError."""
        groups = math.gcd(recipe.accumulation, self.world)
        parts = self.world // groups
        if recipe.batch % parts:
            raise UsageError(
                f"{recipe.batch * recipe.accumulation} pictures of a step (--batch {recipe.batch}, --accumulation "
                f"{recipe.accumulation}) cannot be dealt out evenly to {self.world} processes. Next: a multiple of "
                f"{self.world} for one of them"
            )
        group, part = divmod(self.rank, parts)
        size = recipe.batch // parts
        return Share(slice(group, None, groups), slice(part * size, (part + 1) * size), parts)

    def total(self, x: float) -> float:
        """The sum of all ranks' numbers, the same everywhere."""
        if self.world == 1:
            return x
        number = torch.tensor(x, dtype=torch.float64, device="cpu")
        _reduce(number)
        return number.item()

    def any(self, x: bool) -> bool:
        """Whether it is true of any rank."""
        return self.total(float(x)) > 0

    def all_of(self, words: Sequence[str]) -> list[str]:
        """The words of all ranks, in their order."""
        if self.world == 1:
            return list(words)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, list(words))
        return list(chain.from_iterable(found))

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum of all ranks'; there is none where no rank has one."""
        if self.world == 1:
            return
        there = torch.tensor([x.grad is not None for x in parameters], dtype=torch.int64, device="cpu")
        _reduce(there)
        shared = [x for x, count in zip(parameters, there.tolist(), strict=True) if count]
        if not shared:
            return
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in shared]
        flat = torch.cat([x.flatten() for x in grads])
        _reduce(flat)
        parts = flat.split([x.numel() for x in grads])
        torch._foreach_copy_(grads, [part.view_as(x) for part, x in zip(parts, grads, strict=True)])
        for x, grad in zip(shared, grads, strict=True):
            x.grad = grad

    def check_equal(self, tensors: Sequence[Tensor]) -> None:
        """FluxError where these are not the same numbers on all ranks."""
        if self.world == 1:
            return
        digest = sha256()
        for x in tensors:
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        if len(set(self.all_of([digest.hexdigest()]))) > 1:
            raise FluxError(
                "the processes do not have the same factors any more, and nothing is saved. Next: the same machine, "
                "torch and card for each of them; the same command goes on from the last checkpoint"
            )

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context that the first rank has left before the others enter."""
        if not self.is_first:
            self.total(0.0)
        yield
        if self.is_first:
            self.total(0.0)


ALONE = Ranks()


def _reduce(x: Tensor) -> None:
    """Add up all ranks' tensors, in place. FluxError where another process has ended."""
    try:
        dist.all_reduce(x)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise FluxError("another process of this run has ended, and said why") from error


def own_device(name: str) -> str:
    """The device of this process: each of torchrun's has a GPU of its own, where there are any. UsageError."""
    rank, world = rank_and_world()
    if world == 1:
        return name
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise UsageError(f"--device {name} is one for {world} processes. Next: leave it out, and each has its own GPU")
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", world)), torch.cuda.device_count()
    if here > there:
        raise UsageError(f"{here} processes, but {there} GPUs. Next: torchrun --nproc-per-node {there}")
    return f"cuda:{os.environ.get('LOCAL_RANK', rank)}"


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """A context in which torchrun's processes work together, all but the first in silence.

    UsageError where they do not find each other, or have no library for GPUs.
    """
    if ranks.world == 1:
        yield
        return
    if device.type == "cuda" and not dist.is_nccl_available():
        raise UsageError(f"torch {torch.__version__} has no NCCL, by which GPUs add up gradients. Next: --device cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise UsageError(f"the {ranks.world} processes did not find each other: {error}") from None
    with ExitStack() as streams:
        if not ranks.is_first:  # a process may have no streams; an error is told behind the context
            streams.enter_context(redirect_stdout(None))
            streams.enter_context(redirect_stderr(None))
        yield
    dist.destroy_process_group()  # not after an error, when it might wait for ranks that wait for this one
