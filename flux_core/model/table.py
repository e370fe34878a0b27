"""The modulation of a whole schedule, computed before its first step.

The adaLN projections hold 3.25 of FLUX.1's 11.9 billion parameters and take one vector a step, which depends only on
sigma, guidance and the pooled prompt. For a known schedule all their outputs are computed ahead: 2.1 MB a step at full
size. The projections are read once, and need not be on the device while it denoises.
"""

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from .transformer import Flux, Modulations

MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")
"""endings of the projections' names"""


class Adapt(Protocol):
    """What sets numbers inside a model from step to step, in place: the scales of LoRAs."""

    def group(self, sigma: float) -> Hashable:
        """A value that is equal for sigmas at which the numbers are the same."""
        ...

    def set(self, sigma: float) -> None:
        """Set the numbers for a step."""
        ...


class ModulationTable:
    """`Flux.modulations` at every sigma of a schedule, with the same bits as computed in a forward."""

    def __init__(
        self, model: Flux, sigmas: Sequence[float], y: Tensor, guidance: Tensor, adapt: Adapt | None = None
    ) -> None:
        """y: pooled prompts [B, V]; guidance: [B], in the dtype that times are rounded to. adapt: each row is computed
        with its own step's numbers; they are left at those of the last.
        """
        given = guidance if model.params.guidance_embed else None

        def rows(group: Sequence[float]) -> Modulations:
            if adapt is not None:
                adapt.set(group[0])
            times = (torch.ones_like(guidance) * sigma for sigma in group)
            return model.modulations(torch.stack([model.embed_vec(time, y, given) for time in times]))

        groups = [list(x) for _, x in groupby(sigmas, key=adapt.group)] if adapt else [list(sigmas)]
        self.sigmas = tuple(sigmas)
        self._rows = {sigma: row for row, sigma in enumerate(sigmas)}
        self._mods = Modulations.joined([rows(group) for group in groups])

    def at(self, sigma: float) -> Modulations:
        """The modulations at a sigma of the schedule."""
        row = self._rows[sigma]
        return self._mods.map(lambda x: x[row])
