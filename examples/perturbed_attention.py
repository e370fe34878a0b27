"""Perturbed-attention guidance (arXiv 2403.17377): guidance away from a forward with perturbed self-attention.

    v = v + scale * (v - v_blind)

In chosen blocks of the second forward every image token attends only to itself, so its output is its own value.

    python examples/perturbed_attention.py --prompt "a castle" --scale 2
"""

import argparse

import torch
from einops import rearrange
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.hooks import At, Custom, HookRun
from flux_core.sampling import Velocity, euler, flow_velocity, get_noise, get_schedule, prepare


def blind(attend, q: Tensor, k: Tensor, v: Tensor, at: At) -> Tensor:
    """Attention in which an image token attends only to itself, and a text token to all."""
    out, own = attend(q, k, v), rearrange(v, "B H L D -> B L (H D)")
    return torch.cat((out[:, : at.txt_len], own[:, at.txt_len :]), dim=1)


def away_from(velocity: Velocity, worse: Velocity, scale: float) -> Velocity:
    """The velocity guided away from a worse velocity."""

    def guided(x: Tensor, sigma: float) -> Tensor:
        v = velocity(x, sigma)
        return v + scale * (v - worse(x, sigma))

    return guided


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a castle")
    parser.add_argument("--block", default="single_blocks.0")
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="perturbed_attention.png")
    args = parser.parse_args(argv)

    pipeline = load_pipeline("flux-mini")
    request = GenerationRequest(prompt=args.prompt, seed=args.seed, num_steps=args.num_steps)
    noise = get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, request.seed)
    inputs = prepare(pipeline.t5, pipeline.clip, noise, request.prompt)
    x = inputs.pop("img")
    sigmas = get_schedule(request.num_steps, x.shape[1])
    run = HookRun([Custom(sites=f"{args.block}.attend", fn=blind)], pipeline.variant.params, sigmas)
    velocity = flow_velocity(pipeline.model, **inputs, guidance=request.guidance)
    worse = flow_velocity(pipeline.model, **inputs, guidance=request.guidance, run=run)
    pipeline.picture(euler(away_from(velocity, worse, args.scale), x, sigmas), request).save(args.output)


if __name__ == "__main__":
    main()
