"""FlowEdit (arXiv 2412.08629): edit a picture from a source to a target prompt, without inversion.

The edit starts at the source and integrates the difference of two velocities, at points with the same fresh noise:

    z_src = (1 - sigma) * x_src + sigma * noise,    z_tar = z_edit + z_src - x_src
    d z_edit / d sigma = v(z_tar, target) - v(z_src, source)

    python examples/flow_edit.py --source "a pig face" --target "a green pig face"
"""

import argparse
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.sampling import Velocity, euler, flow_velocity, get_noise, get_schedule, prepare


def flow_edit(
    source: Tensor, v_source: Velocity, v_target: Velocity, sigmas: list[float], noise: Callable[[], Tensor]
) -> Tensor:
    """The edited tokens. source: clean tokens [B, L, C]; sigmas: the used part of the schedule; noise: draws noise."""
    edit = source
    for sigma, sigma_next in pairwise(sigmas):
        z_source = (1 - sigma) * source + sigma * noise()
        z_target = edit + z_source - source
        edit = edit + (sigma_next - sigma) * (v_target(z_target, sigma) - v_source(z_source, sigma))
    return edit


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="a pig face")
    parser.add_argument("--target", default="a green pig face")
    parser.add_argument("--guidance", type=float, nargs=2, default=(1.5, 5.5), help="of the source and of the target")
    parser.add_argument("--start", type=float, default=0.85, help="part of the schedule that is used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="flow_edit.png")
    args = parser.parse_args(argv)

    pipeline = load_pipeline("flux-mini")
    request = GenerationRequest(prompt=args.source, seed=args.seed, num_steps=args.num_steps)
    latent = get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, request.seed)
    source, target = (prepare(pipeline.t5, pipeline.clip, latent, prompt) for prompt in (args.source, args.target))
    x = source.pop("img")
    start = target.pop("img")
    sigmas = get_schedule(request.num_steps, x.shape[1])
    drawn = euler(flow_velocity(pipeline.model, **source, guidance=request.guidance), start, sigmas)
    pipeline.picture(drawn, request).save(args.output.replace(".png", "_source.png"))

    draw = torch.Generator().manual_seed(request.seed + 1)
    v_source, v_target = (
        flow_velocity(pipeline.model, **inputs, guidance=strength)
        for inputs, strength in zip((source, target), args.guidance, strict=True)
    )
    used = sigmas[int((1 - args.start) * request.num_steps) :]
    edited = flow_edit(drawn, v_source, v_target, used, lambda: torch.randn(x.shape, generator=draw).to(x))
    pipeline.picture(edited, request.model_copy(update={"prompt": args.target})).save(args.output)


if __name__ == "__main__":
    main()
