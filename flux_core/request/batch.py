"""Pictures that are drawn at once, as rows of one batch: which may be, and what each records of it.

Rows share all but prompt, negative prompt, seed and guidance. What a row shows does not depend on the others, but its
last bits depend on how many there are, since kernels choose their tiles by it. So a picture records the number of
rows and its own, and is drawn again among copies of itself.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UsageError
from ..hooks import Intervention
from ..hooks.plan import expanded
from ..params import FluxParams
from .fields import MAX_ROWS

if TYPE_CHECKING:
    from .generation import GenerationRequest

T = TypeVar("T")
MOST_ROWS = 1024
_OF_A_ROW = {"prompt", "negative_prompt", "seed", "guidance"}
_SAME = (*_OF_A_ROW, "name", "width", "height", "num_steps")
"""what of a picture to repeat makes it another one"""


class Batch(BaseModel):
    """The batch that a picture was drawn in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=2, le=MOST_ROWS)
    row: int = Field(ge=0)
    """the picture's own, counted from 0"""

    @model_validator(mode="after")
    def _check_row(self) -> Self:
        if self.row >= self.rows:
            raise ValueError(f"there is no row {self.row} of {self.rows}")
        return self

    @property
    def told(self) -> str:
        """A line for who draws it again."""
        cost = "drawn among copies of itself, in the time of all, for the same bits"
        return f"as row {self.row + 1} of {self.rows}: {cost}; --from-image FILE --batch 1 draws it alone"

    def check_again(self) -> None:
        """UsageError for more rows than `--batch` may ask for: a foreign file may record as many as take all memory."""
        if self.rows > MAX_ROWS:
            raise UsageError(
                f"a picture is recorded as row {self.row + 1} of {self.rows}, and {MAX_ROWS} are drawn at most. "
                "Next: --from-image FILE --batch 1 draws it alone"
            )


def batches(items: Iterable[T], size: int, key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items in batches of at most `size`, each of items with equal keys, in the order of the batches' first."""
    found: list[list[T]] = []
    open_batches: dict[Hashable, list[T]] = {}
    for item in items:
        batch = open_batches.get(key(item))
        if batch is None or len(batch) == size:
            batch = open_batches[key(item)] = []
            found.append(batch)
        batch.append(item)
    return found


def common(request: "GenerationRequest") -> str:
    """What requests must have in common to be rows of one batch, as JSON."""
    return request.model_dump_json(exclude={*_OF_A_ROW, "batch"})


def numbered(requests: Sequence["GenerationRequest"]) -> list["GenerationRequest"]:
    """Requests that record that they are the rows of one batch. UsageError where they cannot be."""
    if len({common(request) for request in requests}) > 1:
        raise UsageError("rows of one batch differ in prompt, seed and guidance alone")
    rows = len(requests)
    return [one.model_copy(update={"batch": Batch(rows=rows, row=row)}) for row, one in enumerate(requests)]


def as_it_was(request: "GenerationRequest", old: "GenerationRequest") -> "GenerationRequest":
    """A request that began as that of an old picture; without the picture's batch where it is for another one."""
    same = all(getattr(request, name) == getattr(old, name) for name in _SAME)
    return request if same else request.model_copy(update={"batch": None})


def mixing(plan: Iterable[Intervention], params: FluxParams) -> str | None:
    """The kind of an intervention by which a picture would depend on the other rows of its batch, if there is one."""
    return next((entry.kind for entry in expanded(plan, params) if entry.mixes_rows), None)


def check_rows(plan: Iterable[Intervention], params: FluxParams, rows: int | None) -> None:
    """UsageError where there is one and may be more rows than 1; None: as many as fill the device."""
    if rows != 1 and (kind := mixing(plan, params)):
        raise UsageError(f"{kind} decides for all rows of a batch by one number. Next: leave --batch out")
