"""Extended attention: a picture also attends to the keys and values of a reference picture.

As in training-free consistent generation (ConsiStory, arXiv 2402.03286; Add-it, arXiv 2411.07232), keys and values of
the reference's image tokens, after norm and RoPE, are appended to the picture's own in chosen blocks and steps. Both
are drawn together; the reference's forward comes first at every step, and never uses the other picture.

    attention(q, [k ; k_reference], [v ; v_reference])

    python examples/extended_kv.py --reference "a blue heart" --prompt "a star" --layers all --steps 0-11
"""

import argparse

import torch
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.hooks import At, Custom, HookRun
from flux_core.hooks.layers import layers_of
from flux_core.images.pictures import grid
from flux_core.sampling import Velocity, euler, flow_velocity, get_noise, get_schedule, prepare


def storing(kept: dict[str, tuple[Tensor, Tensor]]):
    """Plain attention that stores the image's keys and values [B, H, L, P] in `kept`, by the name of the site."""

    def attend_and_store(attend, q: Tensor, k: Tensor, v: Tensor, at: At) -> Tensor:
        kept[at.name] = k[:, :, at.txt_len :], v[:, :, at.txt_len :]
        return attend(q, k, v)

    return attend_and_store


def extended(kept: dict[str, tuple[Tensor, Tensor]]):
    """Attention to the picture's own keys and values and to those in `kept`."""

    def attend_to_both(attend, q: Tensor, k: Tensor, v: Tensor, at: At) -> Tensor:
        k_reference, v_reference = kept[at.name]
        return attend(q, torch.cat((k, k_reference), dim=2), torch.cat((v, v_reference), dim=2))

    return attend_to_both


def side_by_side(*velocities: Velocity) -> Velocity:
    """A velocity that computes each row of x with its own of `velocities`, in this order."""
    return lambda x, sigma: torch.cat([v(row, sigma) for v, row in zip(velocities, x.split(1), strict=True)])


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default="a blue heart")
    parser.add_argument("--prompt", default="a star")
    parser.add_argument("--layers", default="all", help="all, none, or blocks as in single_blocks.0-3")
    parser.add_argument("--steps", default="0-11", help="steps at which the reference is used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="extended_kv.png")
    args = parser.parse_args(argv)

    pipeline, kept = load_pipeline("flux-mini"), {}
    request = GenerationRequest(prompt=args.prompt, seed=args.seed, num_steps=args.num_steps)
    sites = [f"{block}.attend" for block in layers_of(args.layers, request.name, pipeline.variant.params)]
    sigmas = get_schedule(request.num_steps, request.height * request.width // 256)
    starts, velocities = [], []
    rows = [(1, args.reference, storing(kept)), (0, args.prompt, None), (0, args.prompt, extended(kept))]
    for seed, prompt, fn in rows:
        noise = get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, args.seed + seed)
        inputs = prepare(pipeline.t5, pipeline.clip, noise, prompt)
        starts.append(inputs.pop("img"))
        plan = [Custom(sites=sites, fn=fn, steps=args.steps)] if sites and fn else []
        run = HookRun(plan, pipeline.variant.params, sigmas)
        velocities.append(flow_velocity(pipeline.model, **inputs, guidance=request.guidance, run=run))
    drawn = euler(side_by_side(*velocities), torch.cat(starts), sigmas)
    grid([pipeline.picture(x, request) for x in drawn.split(1)], columns=len(drawn)).save(args.output)


if __name__ == "__main__":
    main()
