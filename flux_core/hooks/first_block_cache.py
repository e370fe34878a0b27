"""First-block cache: where the first block changes the picture as it did a step ago, the others are not asked again.

After ParaAttention's FBCache (github.com/chengzeyi/ParaAttention): if the residual of block 0, mean |now - then| /
mean |then|, moved less than `threshold` since the last full forward, all further blocks are skipped and what they
added then is added again. A full forward is forced for the first `warmup` steps and after `max_in_row` cached ones.
Threshold 0 caches nothing. The decision waits for the device once in a forward, for one number.

A fixed `schedule` of cached steps takes the place of the measurement and of all three numbers, and waits for nothing:
`"1-27/2"` asks the blocks in every second step.
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
class _Memory:
    """What one pass of two-pass guidance remembers, since each has its own history."""

    first: "Tensor | None" = None
    """what block 0 added to the image, in the last full forward"""
    rest: "Tensor | None" = None
    """what all others added to the joined sequence then"""
    entered: "Tensor | None" = None
    """the joined sequence behind block 0, in this forward"""
    caching: bool = False
    in_row: int = 0


class FirstBlockCache(Intervention):
    """`{"kind": "first_block_cache", "threshold": 0.08}`"""

    kind: Literal["first_block_cache"] = "first_block_cache"
    threshold: float = Field(default=0.08, ge=0, allow_inf_nan=False)
    warmup: int = Field(default=1, ge=1)
    max_in_row: int = Field(default=4, ge=1)
    schedule: Steps = None
    """steps that are cached, whatever the threshold says"""

    def check_steps(self, num_steps: int) -> None:
        super().check_steps(num_steps)
        self._check_last(self.schedule, num_steps)
        if self.schedule is not None and self.schedule[0] == 0:
            raise UsageError(f"{self.kind}: step 0 has none before it to repeat. Next: begin the schedule with 1")

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        memories: dict[int, _Memory] = defaultdict(_Memory)

        def first(call: Any, x: tuple["Tensor", "Tensor"], at: At) -> tuple["Tensor", "Tensor"]:
            import torch

            memory = memories[at.call]
            img, txt = call(x)
            added = img - x[0]
            memory.entered = torch.cat((txt, img), dim=1)
            memory.caching = memory.rest is not None and self._may_cache(memory, added, at)
            memory.in_row = memory.in_row + 1 if memory.caching else 0
            if not memory.caching:
                memory.first = added
            return img, txt

        def other(call: Any, x: Any, at: At) -> Any:
            return x if memories[at.call].caching else call(x)

        def last(call: Any, x: "Tensor", at: At) -> "Tensor":
            memory = memories[at.call]
            assert memory.entered is not None
            if memory.caching and memory.rest is not None:
                return memory.entered + memory.rest
            out = call(x)
            memory.rest = out - memory.entered
            return out

        names = block_names(params)
        return [Around(names[0], first), *(Around(name, other) for name in names[1:-1]), Around(names[-1], last)]

    def _may_cache(self, memory: _Memory, added: "Tensor", at: At) -> bool:
        if self.schedule is not None:
            return at.step in self.schedule
        if at.step < self.warmup or memory.in_row >= self.max_in_row:
            return False
        assert memory.first is not None
        moved = (added - memory.first).abs().mean() / memory.first.abs().mean()
        return moved.item() < self.threshold
