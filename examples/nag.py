"""Normalized Attention Guidance (Chen et al., arXiv 2505.21179): a negative prompt for models without true CFG.

In every block the image attends to the positive and to the negative text, with outputs z+ and z-; both are replaced by

    z~ = scale * z+ - (scale - 1) * z-,    r = |z~|_1 / |z+|_1,    z = alpha * z~ * min(r, tau) / r + (1 - alpha) * z+

The texts are two rows of one batch, with equal image tokens: both rows get z.

    python examples/nag.py --prompt "a heart" --negative "a red heart" --scale 10 --alpha 0.5 --steps 0-7
"""

import argparse

import torch
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.hooks import Custom, HookRun
from flux_core.images.pictures import grid
from flux_core.sampling import Velocity, euler, flow_velocity, get_noise, get_schedule, prepare


def normalized_guidance(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """z, from outputs of attention [B, L, D]; the norms are taken for each token."""
    guided = scale * positive - (scale - 1) * negative
    ratio = guided.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
    return torch.lerp(positive, guided * (ratio.clamp(max=tau) / ratio), alpha)


def at_attention(scale: float, tau: float, alpha: float):
    """The function for `img.attn`, with rows of positive and negative in turn."""

    def guide(x: Tensor, at) -> Tensor:
        return normalized_guidance(x[0::2], x[1::2], scale, tau, alpha).repeat_interleave(2, dim=0)

    return guide


def of_positive(velocity: Velocity) -> Velocity:
    """The velocity of a single row, from the velocity of two rows with equal image tokens."""
    return lambda x, sigma: velocity(x.repeat_interleave(2, dim=0), sigma)[0::2]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a heart")
    parser.add_argument("--negative", default="a red heart")
    parser.add_argument("--scale", type=float, default=10.0)
    parser.add_argument("--tau", type=float, default=2.5)
    parser.add_argument("--alpha", type=float, default=0.5, help="0.25 in the released code")
    parser.add_argument("--steps", default="0-7", help="steps at which attention is guided")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="nag.png")
    args = parser.parse_args(argv)

    pipeline = load_pipeline("flux-mini")
    request = GenerationRequest(prompt=args.prompt, seed=args.seed, num_steps=args.num_steps)
    noise = get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, request.seed)
    inputs = prepare(pipeline.t5, pipeline.clip, noise, [args.prompt, args.negative])
    inputs["vec"] = inputs["vec"][:1].expand(2, -1)  # the same modulation keeps the image tokens equal
    x = inputs.pop("img")[:1]
    sigmas = get_schedule(request.num_steps, x.shape[1])
    fn = at_attention(args.scale, args.tau, args.alpha)
    guide = Custom(sites="layer.*.img.attn", fn=fn, steps=args.steps)
    run = HookRun([guide], pipeline.variant.params, sigmas, branches=("positive", "negative"))
    positive = {name: value[:1] for name, value in inputs.items()}
    plain = flow_velocity(pipeline.model, **positive, guidance=request.guidance)
    guided = of_positive(flow_velocity(pipeline.model, **inputs, guidance=request.guidance, run=run))
    grid([pipeline.picture(euler(velocity, x, sigmas), request) for velocity in (plain, guided)]).save(args.output)


if __name__ == "__main__":
    main()
