"""First-block cache: skip all blocks but the first when the first block's residual changed little, and reuse theirs.

After ParaAttention's FBCache (github.com/chengzeyi/ParaAttention): if the residual of block 0 changed by less than
`threshold` since the last full forward, as mean |now - then| / mean |then|, all other blocks are skipped and their
residual of then is added again. The first `warmup` steps, and the step after `max_in_row` cached steps in a row, run
all blocks. Threshold 0 caches nothing. The decision synchronizes with the device once in a forward, for one number.

A fixed `schedule` of cached steps replaces the measurement and all three numbers, and does not synchronize: with
`"1-27/2"` all blocks run in every second step.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..errors import UsageError
from ..params import FluxParams
from .intervention import Intervention, Steps
from .seam import Around, At, Placed
from .sites import block_names

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _State:
    """The state of one forward of a step: each pass of two-pass guidance has its own."""

    first: "Tensor | None" = None
    """residual of block 0 on the image, in the last full forward"""
    rest: "Tensor | None" = None
    """residual of all other blocks on the joined sequence, in the same forward"""
    entered: "Tensor | None" = None
    """the joined sequence after block 0, in this forward"""
    caching: bool = False
    in_row: int = 0


class FirstBlockCache(Intervention):
    """`{"kind": "first_block_cache", "threshold": 0.08}`"""

    kind: Literal["first_block_cache"] = "first_block_cache"
    threshold: float = Field(default=0.08, ge=0, allow_inf_nan=False)
    warmup: int = Field(default=1, ge=1)
    max_in_row: int = Field(default=4, ge=1)
    schedule: Steps = None
    """steps that are cached, whatever the threshold"""

    @property
    def mixes_rows(self) -> bool:
        return self.schedule is None and self.threshold > 0

    def check_steps(self, num_steps: int) -> None:
        super().check_steps(num_steps)
        self._check_last(self.schedule, num_steps)
        if self.schedule is not None and self.schedule[0] == 0:
            raise UsageError(f"{self.kind}: step 0 has none before it to repeat. Next: start the schedule at step 1")

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        states: dict[int, _State] = defaultdict(_State)

        def first(call: Any, x: tuple["Tensor", "Tensor"], at: At) -> tuple["Tensor", "Tensor"]:
            import torch

            state = states[at.call]
            img, txt = call(x)
            added = img - x[0]
            state.entered = torch.cat((txt, img), dim=1)
            state.caching = state.rest is not None and self._may_cache(state, added, at)
            state.in_row = state.in_row + 1 if state.caching else 0
            if not state.caching:
                state.first = added
            return img, txt

        def other(call: Any, x: Any, at: At) -> Any:
            return x if states[at.call].caching else call(x)

        def last(call: Any, x: "Tensor", at: At) -> "Tensor":
            state = states[at.call]
            assert state.entered is not None
            if state.caching and state.rest is not None:
                return state.entered + state.rest
            out = call(x)
            state.rest = out - state.entered
            return out

        names = block_names(params)
        return [Around(names[0], first), *(Around(name, other) for name in names[1:-1]), Around(names[-1], last)]

    def _may_cache(self, state: _State, added: "Tensor", at: At) -> bool:
        if self.schedule is not None:
            return at.step in self.schedule
        if at.step < self.warmup or state.in_row >= self.max_in_row:
            return False
        assert state.first is not None
        moved = (added - state.first).abs().mean() / state.first.abs().mean()
        return moved.item() < self.threshold
