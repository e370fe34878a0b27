"""The modulation of a whole schedule, computed before its first step.

The adaLN projections hold 3.25 of FLUX.1's 11.9 billion parameters and see one vector a step, which depends on nothing
but sigma, guidance and the pooled prompt. Where a schedule is known, so is all that they will say: 2.1 MB a step at
full size. They are read once, and need not be on the device while it denoises.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .transformer import Flux, Modulations

MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")
"""how the names of the projections end"""


class ModulationTable:
    """`Flux.modulations` at every sigma of a schedule, equal to the bit to what a forward would compute itself."""

    def __init__(self, model: Flux, sigmas: Sequence[float], y: Tensor, guidance: Tensor) -> None:
        """y: pooled prompts [B, V]; guidance: [B], in the dtype that times are rounded to."""
        times = (torch.ones_like(guidance) * sigma for sigma in sigmas)
        given = guidance if model.params.guidance_embed else None
        vec = torch.stack([model.embed_vec(time, y, given) for time in times])
        self.sigmas = tuple(sigmas)
        self._rows = {sigma: row for row, sigma in enumerate(sigmas)}
        self._mods = model.modulations(vec)

    def at(self, sigma: float) -> Modulations:
        """Those of one forward, at a sigma of the schedule."""
        row = self._rows[sigma]
        return self._mods.map(lambda x: x[row])
