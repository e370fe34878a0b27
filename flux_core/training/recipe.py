"""How an adapter is trained, and what it learns from: a recipe, and examples, which come from sources."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from .objective import MAPS, WEIGHTINGS
from .optimizers import OPTIMIZERS
from .recompute import WAYS
from .seen import WAYS as SEEN

PRECISIONS = ("auto", "fp16")
"""of the products: as the model computes, or half precision under a scale of the loss, for cards without bf16"""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. Defaults are those of diffusers' script; two runs of one recipe are equal."""

    steps: int
    lr: float = 1e-4
    batch: int = 1
    accumulation: int = 1
    """micro-batches of a step, whose mean is taken"""
    warmup: int = 0
    """steps in which the rate grows from 0"""
    schedule: str = "constant"
    """of the rate after that: constant, or cosine to 0"""
    optimizer: str = "adamw"
    """a name in `OPTIMIZERS`"""
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema: float = 0.0
    """decay of an average of the factors, which is what is sampled and saved; 0: the factors themselves"""
    timesteps: str = "logit_normal"
    """a name in `MAPS`"""
    timestep_options: Mapping[str, float] = field(default_factory=dict)
    on_table: bool = True
    """whether levels are those of diffusers' table of 1000"""
    weighting: str = "none"
    """a name in `WEIGHTINGS`"""
    guidance: float = 3.5
    precision: str = "auto"
    """one of `PRECISIONS`"""
    seed: int = 0
    checkpointing: str = "none"
    """what is computed again for gradients: a name in `recompute.WAYS`"""
    takes: str = ""
    """what the model sees besides the prompt: a name in `seen.WAYS`, or nothing"""

    def __post_init__(self) -> None:
        """UsageError for a value that is none."""
        known: dict[str, Any] = {
            "timesteps": MAPS, "weighting": WEIGHTINGS, "schedule": SCHEDULES, "checkpointing": WAYS,
            "optimizer": OPTIMIZERS, "precision": PRECISIONS, "takes": ("", *SEEN),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")
        for name in ("steps", "batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
}
"""factors of the rate, by the share of steps behind the warm-up that is done"""


class Example(NamedTuple):
    """A picture to learn from, encoded."""

    name: str
    latents: Tensor
    """[16, H/8, W/8], as the transformer takes them"""
    txt: Tensor
    """[T, D], in the dtype that the model computes in"""
    vec: Tensor
    """[V]"""
    seen: Tensor | None = None
    """latents [N, 16, H/8, W/8] of what the model sees besides: a map, or references (`Recipe.takes`)"""

    @property
    def size(self) -> tuple[int, ...]:
        """Of its latents, and how many are seen beside them: examples of a batch have one size."""
        return *self.latents.shape, 0 if self.seen is None else len(self.seen)

    @property
    def digest(self) -> str:
        """A hash of all its numbers."""
        found = sha256()
        for x in (self.latents, self.txt, self.vec, *([] if self.seen is None else [self.seen])):
            found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def draw(self, generator: torch.Generator | None) -> "Example":
        """Itself: it has one crop and one caption."""
        return self


class Source(Protocol):
    """A picture from which examples come: an `Example`, or one that reads them from caches."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> tuple[int, ...]: ...

    @property
    def digest(self) -> str: ...

    def draw(self, generator: torch.Generator | None) -> Example:
        """One of its crops and captions; without a generator the first of each."""
        ...
