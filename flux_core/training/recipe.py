"""How an adapter is trained, and what it learns from: a recipe, and examples, which come from sources."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..request.training import PRESERVE
from .objective import LOSSES, MAPS, WEIGHTINGS
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
    lora_plus: float = 1.0
    """times the rate is that of the factor that begins at zero, B (Hayou et al. 2024, arXiv 2402.12354)"""
    max_grad_norm: float = 1.0
    """to which gradients are clipped; 0: they are not"""
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
    loss: str = "l2"
    """of the velocity's errors: a name in `LOSSES`"""
    huber_c: float = 0.1
    """where `huber` and `smooth_l1` begin to be linear"""
    huber_schedule: str = "constant"
    """of that: constant, or exponential: c^sigma, from 1 without noise"""
    contrast: float = 0.0
    """guidance that the target has (`loss.py`); 0: none"""
    preserve: str = ""
    """what stays as it was: differential (the class), blank (the empty text), regularization (pictures), or nothing"""
    preserve_weight: float = 1.0
    mask_prior: float = 0.0
    """how much the frozen model is kept to where masks are black"""
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
            "loss": LOSSES, "huber_schedule": ("constant", "exponential"), "preserve": ("", *PRESERVE),
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")
        for name in ("steps", "batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")
        if self.loss == "huber" and self.huber_c <= 0:
            raise UsageError("huber's loss is 0 with a huber_c of 0, and nothing would learn. Next: 0.1, or loss l1")
        if self.optimizer == "adamw_schedulefree" and self.ema:
            raise UsageError("adamw_schedulefree keeps a mean of its own. Next: leave ema out")
        if self.optimizer == "adamw_schedulefree" and self.schedule != "constant":
            raise UsageError(
                f"adamw_schedulefree does by its mean what the schedule {self.schedule} does. Next: the schedule "
                "constant, with a warmup"
            )


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
}
"""factors of the rate, by the share of steps behind the warm-up that is done"""


Encoded = tuple[Tensor, Tensor]
"""a text: T5's tokens [T, D], in the dtype that the model computes in, and CLIP's vector [V]; or the token ids, int64
[length], of an encoder that learns"""


class Example(NamedTuple):
    """A picture to learn from, encoded."""

    name: str
    latents: Tensor
    """[16, H/8, W/8], as the transformer takes them"""
    txt: Tensor
    """[T, D], in the dtype that the model computes in; or T5's ids (`Encoded`)"""
    vec: Tensor
    """[V]; or CLIP's ids"""
    seen: Tensor | None = None
    """latents [N, 16, H/8, W/8] of what the model sees besides: a map, or references (`Recipe.takes`)"""

    mask: Tensor | None = None
    """[H/8, W/8], fp32 from 0 to 1: where it is black, the picture is not learned"""
    weight: float = 1.0
    """of its loss"""
    others: Mapping[str, Encoded] = MappingProxyType({})
    """texts beside its own that a loss asks for, by kind"""
    prior: bool = False
    """whether it is a regularization picture"""

    @property
    def size(self) -> tuple[int, ...]:
        """Of its latents, and how many are seen beside them: examples of a batch have one size."""
        return *self.latents.shape, 0 if self.seen is None else len(self.seen)

    @property
    def digest(self) -> str:
        """A hash of all its numbers."""
        found = sha256()
        if self.mask is not None or self.weight != 1:
            found.update(f"{self.mask is not None} {self.weight}".encode())
        if self.prior:
            found.update(b"prior")
        told = [self.latents, self.txt, self.vec, *(x for x in (self.seen, self.mask) if x is not None)]
        for x in (*told, *(x for kind in sorted(self.others) for x in self.others[kind])):
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
