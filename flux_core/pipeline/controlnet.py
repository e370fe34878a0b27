"""A picture that follows a condition by a ControlNet (`model/controlnet.py`), beside any plan and other conditions.

Its residuals are computed once for each forward, from the latents that come in, and added behind the blocks. Several
ControlNets, or several conditions of one, are as many `ControlNetCondition`s: their residuals add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..model import ControlNet
from ..model.blocks import DoubleStreamBlock, SingleStreamBlock
from ..request.generation import PATCH
from ..sampling import FlowInputs
from ..strength import step_of


@dataclass(frozen=True, eq=False)
class ControlNetCondition:
    """What a picture follows, by which ControlNet, how closely, and in which part of the steps. UsageError."""

    net: ControlNet
    cond: Tensor
    """for each picture or for all: tokens of its latent [B, L, C]; with XLabs' its pixels [B, 3, H, W] from -1 to 1"""
    scale: float = 1.0
    """of the residuals"""
    start: float = 0.0
    end: float = 1.0
    """step i of n is steered if all of it, from i/n to (i+1)/n, lies between them"""
    mode: int | None = None
    """the kind of condition, for a union: in InstantX's and Shakker's 0 canny, 1 tile, 2 depth, 3 blur, 4 pose, 5 grey,
    6 low quality"""

    def __post_init__(self) -> None:
        modes = self.net.params.modes
        if modes and (self.mode is None or not 0 <= self.mode < modes):
            raise UsageError(f"this ControlNet is a union of {modes} kinds. Next: give a mode from 0 to {modes - 1}")
        if not modes and self.mode is not None:
            raise UsageError("this ControlNet is for conditions of one kind. Next: leave the mode out")
        if not 0 <= self.start < self.end <= 1:
            raise UsageError(f"start {self.start} and end {self.end} must be in order, and between 0 and 1")

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        """The inputs as they are. UsageError for a condition of another size."""
        params, (width, height) = self.net.params, size
        tokens = height // PATCH * (width // PATCH)
        wanted = [3, height, width] if params.takes_pixels else [tokens, params.cond_channels]
        if list(self.cond.shape[1:]) != wanted:
            found = f"the ControlNet's condition is {list(self.cond.shape)}"
            raise UsageError(f"{found}, and for a picture of {width}x{height} pixels it takes {['B', *wanted]}")
        return inputs

    def run(self, inputs: FlowInputs) -> "ControlNetRun":
        return ControlNetRun(self, inputs)

    def is_active(self, step: int, steps: int) -> bool:
        """Whether that step of so many is steered."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)


class ControlNetRun:
    """Adds the residuals in the forwards of one sampling.

    inputs: rows of prompts. A forward may have more rows: then equally many in turn belong to each, and all get its
    residuals, as the negative prompts of true CFG do.
    """

    needs_vec = False

    def __init__(self, condition: ControlNetCondition, inputs: FlowInputs) -> None:
        self.condition, self.inputs, self.sigma = condition, inputs, 0.0
        self.residuals: Mapping[str, Tensor] = {}
        """those of this forward, by the block's name"""

    def begin(self, sigma: float) -> None:
        self.sigma, self.residuals = sigma, {}

    def see(self, x: Tensor, sigmas: Sequence[float]) -> None:
        """Compute the residuals, if the step is steered. Without known sigmas, a forward is the only step."""
        steps = sigmas or (self.sigma,)
        if self.condition.is_active(step_of(self.sigma, (*steps, -1.0)), len(steps)):
            self.residuals = self._computed(x)

    def _computed(self, x: Tensor) -> Mapping[str, Tensor]:
        condition, given = self.condition, self.inputs
        rows = x.shape[0] // given.txt.shape[0]
        x = x[::rows]
        ones = torch.ones(x.shape[0], device=x.device, dtype=x.dtype)
        residuals = condition.net(
            x,
            given.img_ids,
            condition.cond.to(x),
            given.txt,
            given.txt_ids,
            ones * self.sigma,
            given.vec,
            ones * given.guidance,
            condition.mode,
        )
        return condition.net.placed(residuals.map(lambda y: (condition.scale * y).repeat_interleave(rows, dim=0)))

    def value(self, name: str, x: Any) -> Any:
        return x

    def double_block(
        self, name: str, block: DoubleStreamBlock, img: Tensor, txt: Tensor, mods: Any, pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        img, txt = block(img, txt, *mods, pe)
        return self._added(name, img, 0), txt

    def single_block(
        self, name: str, block: SingleStreamBlock, x: Tensor, txt_len: int, mods: Any, pe: Tensor
    ) -> Tensor:
        return self._added(name, block(x, *mods, pe), txt_len)

    def _added(self, name: str, x: Tensor, first: int) -> Tensor:
        """x with the block's residual on the tokens that are drawn, which begin at `first`; Kontext's come after."""
        if (residual := self.residuals.get(name)) is None:
            return x
        return x + F.pad(residual, (0, 0, first, x.shape[1] - first - residual.shape[1]))
