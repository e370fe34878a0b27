"""TeaCache (Liu et al., arXiv 2411.19108): reuse the residual of all blocks while their input changes little.

The change of the first block's modulated input m is rescaled by a polynomial, fitted to FLUX.1-dev, and summed. While
the sum is below the threshold, no block runs; then it is reset. The first and the last step are always computed.

    distance += polynomial(mean |m - m_before| / mean |m_before|)

    python examples/teacache.py --prompt "a castle" --threshold 0.4
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.hooks import At, Custom, HookRun
from flux_core.hooks.sites import block_names
from flux_core.images.pictures import grid
from flux_core.model.ops import modulate
from flux_core.sampling import euler, flow_velocity, get_noise, get_schedule, prepare

COEFFICIENTS = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)  # the authors', highest power first


class TeaCache:
    """State and plan of one sampling. blocks: the model's, in order."""

    def __init__(self, threshold: float, blocks: list[str], num_steps: int) -> None:
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
            self.entered = torch.cat(x[::-1], dim=1)
            self.decide(modulate(x[0], **self.modulation), at.step)
        if self.skipping:
            return x + self.residual if at.name == self.last else x
        out = call(x)
        if at.name == self.last:
            self.residual = out - self.entered
        return out


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a castle")
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="teacache.png")
    args = parser.parse_args(argv)

    pipeline = load_pipeline("flux-mini")
    request = GenerationRequest(prompt=args.prompt, seed=args.seed, num_steps=args.num_steps)
    noise = get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, request.seed)
    inputs = prepare(pipeline.t5, pipeline.clip, noise, request.prompt)
    x = inputs.pop("img")
    sigmas = get_schedule(request.num_steps, x.shape[1])
    cache = TeaCache(args.threshold, block_names(pipeline.variant.params), request.num_steps)
    run = HookRun(cache.plan, pipeline.variant.params, sigmas)
    plain, cached = (flow_velocity(pipeline.model, **inputs, guidance=request.guidance, run=r) for r in (None, run))
    grid([pipeline.picture(euler(velocity, x, sigmas), request) for velocity in (plain, cached)]).save(args.output)
    print(f"{cache.skipped} of {request.num_steps} steps skipped")


if __name__ == "__main__":
    main()
