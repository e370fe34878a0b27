"""Functions around a picture's velocity, and samplers in place of Euler's method.

They do not hook into a forward: the pipeline applies them around it (`pipeline/denoiser.py`). With true guidance the
velocity that they get is the guided one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import HookError, UsageError, is_foreign
from ..params import FluxParams
from ..strength import step_of
from .python import OfPython
from .seam import Placed

if TYPE_CHECKING:
    from torch import Tensor

    Velocity = Callable[[Tensor, float], Tensor]
    OnStep = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Sampling:
    """What a velocity wrapper is told of the picture."""

    sigmas: tuple[float, ...]
    params: FluxParams
    of: "Callable[..., Velocity]"
    """`of(plan)`: the picture's velocity with another plan in place of its own"""


class Wrap(OfPython):
    """`{"kind": "wrap", "fn": "my.py:away"}`: `away(velocity, sampling)` returns the velocity to follow.

    Both are functions `velocity(x, sigma)` of tokens [B, L, 64]. Outside its steps the velocity is as it was.
    """

    kind: Literal["wrap"] = "wrap"
    in_forward: ClassVar[bool] = False

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        return []

    def around(self, velocity: "Velocity", sampling: Sampling) -> "Velocity":
        """The velocity to follow. HookError."""
        with told(self.called):
            wrapped = self.function(velocity, sampling)
        if not callable(wrapped):
            raise HookError(f"{self.called} returned {wrapped!r:.60}; expected a function velocity(x, sigma)")

        def chosen(x: "Tensor", sigma: float) -> "Tensor":
            if not self.at_step(step_of(sigma, sampling.sigmas)):
                return velocity(x, sigma)
            with told(f"{self.called} at sigma {sigma:.3f}"):
                return like(wrapped(x, sigma), x, self.called)

        return chosen


class Sampler(OfPython):
    """`{"kind": "sampler", "fn": "my.py:midpoint"}`: `midpoint(velocity, x, sigmas, on_step)` returns the final tokens.

    As `sampling.euler`, which is called so without one. A plan has one at most.
    """

    kind: Literal["sampler"] = "sampler"
    in_forward: ClassVar[bool] = False

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        if self.steps is not None:
            raise UsageError("sampler: it draws all steps. Next: leave steps out")
        return []

    def sample(self, velocity: "Velocity", x: "Tensor", sigmas: Sequence[float], on_step: "OnStep | None") -> "Tensor":
        """The final tokens. HookError."""
        with told(self.called):
            return like(self.function(velocity, x, sigmas, on_step), x, self.called)


def like(new: Any, old: "Tensor", called: str) -> "Tensor":
    """`new`, if it is a tensor of the shape, dtype and device of `old`. HookError."""
    from .taps import Misfit, fitting

    try:
        return fitting(new, old.shape, old, like, called)
    except Misfit as misfit:
        raise HookError(f"{called} {misfit.text}") from None


@contextmanager
def told(called: str) -> Iterator[None]:
    """A context whose errors are HookErrors that name the function."""
    try:
        yield
    except Exception as error:
        if is_foreign(error):
            raise
        raise HookError(f"{called} raised {type(error).__name__}: {error}") from error
