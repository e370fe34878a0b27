"""Perturbed-attention guidance (arXiv 2403.17377): guidance away from a forward with perturbed self-attention.

    v = v + scale * (v - v_blind)

In chosen blocks of the second forward every image token attends only to itself, so its output is its own value.

    python examples/perturbed_attention.py --prompt "a castle" --scale 2
    python cli.py --prompt "a castle" --plan examples/perturbed_attention.py
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import At, Custom, Wrap
from flux_core.params import FluxParams
from flux_core.sampling import Velocity
from flux_core.script import command


def blind(attend, q: Tensor, k: Tensor, v: Tensor, at: At) -> Tensor:
    """Attention in which an image token attends only to itself, and a text token to all."""
    out, own = attend(q, k, v), v.transpose(1, 2).flatten(2)
    return torch.cat((out[:, : at.txt_len], own[:, at.txt_len :]), dim=1)


def away_from(velocity: Velocity, worse: Velocity, scale: float) -> Velocity:
    """The velocity guided away from a worse velocity."""

    def guided(x: Tensor, sigma: float) -> Tensor:
        v = velocity(x, sigma)
        return v + scale * (v - worse(x, sigma))

    return guided


def plan(params: FluxParams, block: str = "single_blocks.0", scale: float = 2.0) -> list[Wrap]:
    """A picture's velocity, guided away from what it is with blind attention in a block."""
    perturbed = Custom(sites=f"{block}.attend", fn=blind)
    return [Wrap(fn=lambda velocity, sampling: away_from(velocity, sampling.of(perturbed), scale))]


@command
def main(prompt="a castle", block="single_blocks.0", scale=2.0, seed=0, num_steps=28, output="perturbed_attention.png"):
    pipeline = load_pipeline("flux-mini")
    guided = plan(pipeline.variant.params, block, scale)
    pipeline.generate(prompt, seed, num_steps=num_steps, plan=guided)[0].save(output)
