"""The base class of interventions: a frozen object with a JSON form and the steps at which it is active.

An intervention is an entry of a plan; `place` turns it, for one model, into functions at blocks and sites
(`seam.py`). State (cached residuals, captured values) is created there and belongs to one run.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..errors import UsageError
from ..params import FluxParams
from .seam import Placed


def _split_commas(value: Any) -> Any:
    """The names in a comma-separated string, as a tuple; any other value as it is."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def parse_steps(value: Any) -> Any:
    """Sorted steps from `3`, `"0-14"`, `"0-14/2"` (every second step), `"0-4,9"`, or a list of these."""
    if value is None or isinstance(value, range):
        return value and tuple(value)
    if isinstance(value, str):
        value = value.split(",")
    parts: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    steps: set[int] = set()
    for part in parts:
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5})(?:/([1-9]\d{0,4}))?)?", str(part).strip())
        if not found or isinstance(part, bool):
            raise ValueError(f"{part!r} is no step: write 3, 0-14, or 0-14/2 for every second step")
        steps |= set(range(int(found[1]), int(found[2] or found[1]) + 1, int(found[3] or 1)))
    if not steps:
        raise ValueError("no steps are selected; leave steps out to select all")
    return tuple(sorted(steps))


def _parse_tokens(value: Any) -> Any:
    return value if value in (None, "img", "txt", "all") else parse_steps(value)


Tokens = Annotated[Literal["img", "txt", "all"] | tuple[int, ...], BeforeValidator(_parse_tokens)]
"""a stream's tokens, all, or indices, which are sorted"""
Patterns = Annotated[tuple[str, ...], BeforeValidator(_split_commas), Field(min_length=1)]
Steps = Annotated[tuple[int, ...] | None, BeforeValidator(parse_steps)]


class Intervention(BaseModel):
    """Base of all kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    in_forward: ClassVar[bool] = True
    """whether it hooks into a forward; else the pipeline does what it says"""

    kind: str
    steps: Steps = None
    """steps at which it is active, counted from 0; None: all"""
    follow: bool = False
    """whether it may write the same value as an intervention before it in the plan"""

    @property
    def portable(self) -> bool:
        """Whether a picture's metadata can hold it: it is no function, and reads and writes no file."""
        return True

    @property
    def is_code(self) -> bool:
        """Whether it holds a function of Python itself, so that it has no JSON form at all."""
        return False

    @property
    def changes_pixels(self) -> bool:
        return True

    @property
    def mixes_rows(self) -> bool:
        """Whether what it does to a picture depends on the others that are rows of the same batch."""
        return False

    @property
    def label(self) -> str:
        """Its description in metadata, if it is not portable."""
        return self.kind

    def for_request(self, name: str, num_steps: int) -> Self:
        """The entry as a request of that model and number of steps records it. UsageError if it is for another."""
        return self

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        """Its functions, with fresh state. UsageError for a name that the model does not have."""
        raise NotImplementedError

    def at_step(self, step: int) -> bool:
        return self.steps is None or step in self.steps

    def check_steps(self, num_steps: int) -> None:
        """UsageError for a step that the schedule does not have."""
        self._check_last(self.steps, num_steps)

    def _check_last(self, steps: tuple[int, ...] | None, num_steps: int) -> None:
        if steps is not None and steps[-1] >= num_steps:
            raise UsageError(f"{self.kind}: there is no step {steps[-1]}, the last is {num_steps - 1}")
