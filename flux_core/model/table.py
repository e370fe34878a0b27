"""The modulation of a whole schedule, computed before its first step.

The adaLN projections hold 3.25 of FLUX.1's 11.9 billion parameters and take one vector a step, which depends only on
sigma, guidance and the pooled prompt. For a known schedule all their outputs are computed ahead: 2.1 MB a step at full
size. The projections are read once, and need not be on the device while it denoises.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .transformer import Flux, Modulations

MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")
"""endings of the projections' names"""


class ModulationTable:
    """`Flux.modulations` at every sigma of a schedule, with the same bits as computed in a forward."""

    def __init__(self, model: Flux, sigmas: Sequence[float], y: Tensor, guidance: Tensor) -> None:
        """y: pooled prompts [B, V]; guidance: [B], in the dtype that times are rounded to."""
        times = (torch.ones_like(guidance) * sigma for sigma in sigmas)
        given = guidance if model.params.guidance_embed else None
        vec = torch.stack([model.embed_vec(time, y, given) for time in times])
        self.sigmas = tuple(sigmas)
        self._rows = {sigma: row for row, sigma in enumerate(sigmas)}
        self._mods = model.modulations(vec)

    def at(self, sigma: float) -> Modulations:
        """The modulations at a sigma of the schedule."""
        row = self._rows[sigma]
        return self._mods.map(lambda x: x[row])
