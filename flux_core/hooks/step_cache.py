"""Step cache: leave whole steps out, and go on with the velocity of the steps that ran.

    {"kind": "step_cache", "steps": "7-27/3,8-27/3"}        two of three steps from step 7 on are left out

A step that is left out runs nothing of the model. Its velocity comes from the last two that ran, v0 and v1:

    v(sigma) = v1 + slope * (sigma - sigma1) / (sigma1 - sigma0) * (v1 - v0)

With slope 0 the last one is used again, with 1 this is a Taylor series of first order (as TaylorSeer's, arXiv
2503.06923, of the model's output, in sigma). Which steps run, and a slope for each of the others, decide what a number
of forwards is worth; `methods/step_search.py` finds both for a model, size and number of steps. What it writes is an
entry of a plan. The presets are two that it found.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UsageError
from ..params import FluxParams
from ..strength import step_of
from .intervention import Intervention
from .seam import Placed
from .velocity import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from .velocity import Velocity

FINE = 20
"""steps from which a schedule is fine enough to forecast where nothing was fitted"""
PresetName = Literal["fast", "faster"]
MOST_SLOPE = 10
Slope = Annotated[float, Field(allow_inf_nan=False, ge=-MOST_SLOPE, le=MOST_SLOPE)]


class Preset(NamedTuple):
    """Steps of a schedule that are left out, and the slope of each."""

    num_steps: int
    slopes: dict[int, float]

    def of(self, num_steps: int) -> dict[int, float]:
        """The same for another number of steps: the same share of them runs, two at least, at the same places.

        The k-th of K steps that run lies where a line through the preset's own has it, rounded, and behind the one
        before. Slopes are for one schedule: others get half a slope, and where steps are large none.
        """
        if num_steps == self.num_steps:
            return self.slopes
        own = [step for step in range(self.num_steps) if step not in self.slopes]
        knots, per = [*own, self.num_steps], num_steps / self.num_steps
        count = min(num_steps, max(2, round(len(own) * num_steps / self.num_steps)))
        forwards: list[int] = []
        for k in range(count):
            whole, part = divmod(k * len(own), count)
            place = knots[whole] + (knots[whole + 1] - knots[whole]) * part / count
            forwards.append(min(max(round(place * per), k and forwards[-1] + 1), num_steps - count + k))
        left_out = (step for step in range(num_steps) if step not in forwards)
        return dict.fromkeys(left_out, 0.5 if num_steps >= FINE else 0.0)


PRESETS: dict[PresetName, Preset] = {
    "fast": Preset(
        28,
        {
            7: 0.4, 9: 0.381, 10: 0.406, 12: 0.859, 13: 0.671, 14: 0.551, 16: 1.322, 17: 0.9, 19: 1.007,
            20: 0.872, 21: 0.774, 23: 1.455, 24: 1.16, 26: 2.277,
        },
    ),
    "faster": Preset(
        28,
        {
            4: 0.141, 6: 0.533, 7: 0.354, 8: 0.251, 10: 1.359, 11: 0.78, 12: 0.553, 13: 0.424, 14: 0.336,
            16: 1.99, 17: 1.148, 18: 0.833, 19: 0.659, 20: 0.543, 22: 2.967, 23: 1.738, 24: 1.289, 26: 2.883,
        },
    ),
}  # fmt: skip
"""found for flux-mini, 28 steps of 256x256 (docs/caching.md)"""


class Searched(BaseModel):
    """What a search says of the steps that it found. Pictures don't record it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forwards: int
    """steps that run"""
    width: int
    height: int
    guidance: float | None = None
    """None: the model takes none, or an earlier version searched"""
    weights: dict[str, str]
    """short hash of every weight file, by name"""
    prompts: tuple[str, ...]
    """those that it was searched on, with `seeds`"""
    seeds: tuple[int, ...]
    psnr_db: float
    """of pictures to the uncached ones, the mean over pictures: of those that it was searched on"""
    held_out_prompts: tuple[str, ...]
    held_out_seeds: tuple[int, ...]
    held_out_psnr_db: float
    """of those that it was not"""
    by_hand_psnr_db: dict[str, float]
    """the same of as many forwards that are placed by hand"""


class StepCache(Intervention):
    """`{"kind": "step_cache", "steps": "1-27/2"}`, or `{"kind": "step_cache", "preset": "fast"}`."""

    kind: Literal["step_cache"] = "step_cache"
    in_forward: ClassVar[bool] = False
    # `steps` are those that are left out.
    slope: Slope | tuple[Slope, ...] = 1.0
    """of all of them, or of each"""
    preset: PresetName | None = None
    """chooses steps and slopes for the request's number of steps"""
    num_steps: int | None = Field(default=None, ge=1)
    """of the schedule that `steps` are for, all of it where an init image leaves some out; None: any"""
    model: str | None = None
    """the name of the only one that they are for; None: any"""
    searched: Searched | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="after")
    def _says_steps(self) -> Self:
        if self.steps is None and self.preset is None:
            raise ValueError(f'no steps to leave out: write "steps": "1-27/2", or "preset": "{next(iter(PRESETS))}"')
        if isinstance(self.slope, tuple) and len(self.slope) != len(self.steps or ()):
            raise ValueError(f"{len(self.slope)} slopes for {len(self.steps or ())} steps that are left out")
        return self

    @property
    def called(self) -> str:
        return f"{self.kind} {self.preset}" if self.preset else f"{self.kind} without {len(self.steps or ())} steps"

    def for_request(self, name: str, num_steps: int) -> Self:
        """The entry with a preset's steps for a schedule of num_steps. UsageError where its own are for another."""
        if self.model not in (None, name):
            raise UsageError(
                f"{self.kind}: these steps were chosen for {self.model}, not for {name}. {_search(name, num_steps)}"
            )
        if self.num_steps in (None, num_steps) and self.steps is not None:
            return self
        if self.preset is None:
            raise UsageError(
                f"{self.kind}: these steps were chosen for {self.num_steps} steps, not for {num_steps}. "
                + _search(name, num_steps)
            )
        slopes = PRESETS[self.preset].of(num_steps)
        found = {"steps": tuple(slopes) or None, "slope": tuple(slopes.values()), "num_steps": num_steps}
        return self.model_copy(update=found)

    def notes(self, width: int, height: int, guidance: float | None) -> Iterator[str]:
        """What the user should know before a picture of that size is drawn, a line each."""
        if self.preset is not None and self.steps is None:
            yield f"{self.called} leaves out none of {self.num_steps} step(s)"
        if (found := self.searched) is not None:
            other = [f"{found.width}x{found.height}"] if (found.width, found.height) != (width, height) else []
            if found.guidance not in (None, guidance):
                other.append(f"guidance {found.guidance:g}")
            if other:
                yield f"{self.called} was searched for {' and '.join(other)}: for this picture it is a guess"

    def check_steps(self, num_steps: int) -> None:
        if self.steps is None and self.num_steps is None:
            raise UsageError(f"{self.kind}: a preset is for the plan of a request. Next: write the steps themselves")
        self._check_last(self.steps, self._first(num_steps) + num_steps)
        if self.steps is not None and self.steps[0] == 0:
            raise UsageError(f"{self.kind}: step 0 has none before it to repeat. Next: leave out steps from 1 on")

    def _first(self, num_steps: int) -> int:
        """The step of the whole schedule at which a sampling of its last num_steps begins."""
        return 0 if self.num_steps is None else max(self.num_steps - num_steps, 0)

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        return []

    def around(self, velocity: "Velocity", sampling: Sampling) -> "Velocity":
        """The velocity to follow."""
        return self.following(velocity, sampling.sigmas)

    def following(self, velocity: "Velocity", sigmas: Sequence[float]) -> "Velocity":
        """The velocity to follow over a schedule, with a memory of its own. The first step always runs."""
        first, ran, slopes = self._first(len(sigmas) - 1), dict[float, Any](), self.slopes()

        def followed(x: "Tensor", sigma: float) -> "Tensor":
            slope = slopes.get(first + step_of(sigma, sigmas))
            if ran and slope is not None:
                return forecast(ran, sigma, slope)
            ran.pop(sigma, None)  # by a sampler that comes back to it
            ran[sigma] = velocity(x, sigma)
            if len(ran) > 2:
                del ran[next(iter(ran))]
            return ran[sigma]

        return followed

    def slopes(self) -> dict[int, float]:
        """The slope of each step that is left out."""
        steps = self.steps or ()
        return dict(zip(steps, self.slope if isinstance(self.slope, tuple) else [self.slope] * len(steps), strict=True))


def forecast(ran: dict[float, "Tensor"], sigma: float, slope: float) -> "Tensor":
    """The velocity at a sigma, from the last one or two that ran, by their sigmas in order."""
    (sigma0, v0), (sigma1, v1) = (list(ran.items())[i] for i in (0, -1))
    return v1 if slope == 0 or len(ran) < 2 else v1 + slope * (sigma - sigma1) / (sigma1 - sigma0) * (v1 - v0)


def _search(name: str, num_steps: int) -> str:
    return f"Next: search for others, cache search --name {name} --num-steps {num_steps}"
