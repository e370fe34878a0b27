"""TeaCache (Liu et al., arXiv 2411.19108): reuse the residual of all blocks while their input changes little.

The change of the first block's modulated input m is rescaled by a polynomial, fitted to FLUX.1-dev, and summed. While
the sum is below the threshold, no block runs; then it is reset. The first and the last step are always computed.

    distance += polynomial(mean |m - m_before| / mean |m_before|)

    python examples/teacache.py --prompt "a castle" --threshold 0.4
    python cli.py --prompt "a castle" --plan examples/teacache.py
"""

import numpy as np
import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import At, Custom
from flux_core.hooks.sites import block_names
from flux_core.images.pictures import grid
from flux_core.model.ops import modulate
from flux_core.params import FluxParams
from flux_core.script import command

COEFFICIENTS = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)  # the authors', highest power first


class TeaCache:
    """State and plan of one picture. blocks: the model's, in order; num_steps: known from the first forward on."""

    def __init__(self, threshold: float, blocks: list[str], num_steps: int = 0) -> None:
        self.threshold, self.first, self.last, self.num_steps = threshold, blocks[0], blocks[-1], num_steps
        self.modulation, self.before, self.distance, self.skipped = {}, torch.ones(()), 0.0, 0
        sites = [f"{self.first}.img_mod1.{name}" for name in ("shift", "scale")]
        store = Custom(sites=sites, fn=lambda at, x: self.modulation.update({at.name.split(".")[-1]: x}), reads=True)
        self.plan = [store, Custom(sites=blocks, fn=self.around)]

    def decide(self, m: Tensor, step: int) -> None:
        change = (m - self.before).abs().mean() / self.before.abs().mean()
        distance = self.distance + np.polyval(COEFFICIENTS, change.item())
        self.skipping = 0 < step < self.num_steps - 1 and distance < self.threshold
        self.before, self.distance, self.skipped = m, distance * self.skipping, self.skipped + self.skipping

    def around(self, call, x, at: At):
        if at.name == self.first:  # here x is (img, txt); in the last block, the joined sequence
            self.entered, self.num_steps = torch.cat(x[::-1], dim=1), at.num_steps
            self.decide(modulate(x[0], **self.modulation), at.step)
        if self.skipping:
            return x + self.residual if at.name == self.last else x
        out = call(x)
        if at.name == self.last:
            self.residual = out - self.entered
        return out


def plan(params: FluxParams, threshold: float = 0.4) -> list[Custom]:
    """A picture's own TeaCache: called for each, so that none sees another's residuals."""
    return TeaCache(threshold, block_names(params)).plan


@command
def main(prompt="a castle", threshold=0.4, seed=0, num_steps=28, output="teacache.png"):
    pipeline = load_pipeline("flux-mini")
    cache = TeaCache(threshold, block_names(pipeline.variant.params))
    pictures = [pipeline.generate(prompt, seed, num_steps=num_steps, plan=used)[0] for used in ([], cache.plan)]
    grid(pictures).save(output)
    print(f"{cache.skipped} of {num_steps} steps skipped")
