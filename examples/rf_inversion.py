"""RF-Inversion (Rout et al., arXiv 2410.10792): invert a picture to noise and sample with another prompt.

Both ODEs are controlled: the velocity is mixed with that of the straight line to a goal. When inverting, without a
prompt, it is a given noise at sigma 1 (strength gamma); when sampling, the picture at sigma 0 (eta, at chosen steps):

    dx / d sigma = v(x) + gamma * ((noise - x) / (1 - sigma) - v(x)),    v(x) + eta * ((x - picture) / sigma - v(x))

    python examples/rf_inversion.py --source "a pig face" --target "a green pig face"
    python examples/rf_inversion.py --image photo.png --target "a green pig face" --eta 0.9
"""

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.images.pictures import grid, open_source
from flux_core.sampling import Velocity, euler, flow_velocity, get_noise, get_schedule, pack, prepare


def controlled(velocity: Velocity, goal: Tensor, end: float, strengths: Mapping[float, float]) -> Velocity:
    """The velocity mixed with the straight line to `goal` at sigma `end`. strengths: of the mix, by sigma; else 0."""

    def velocity_to_goal(x: Tensor, sigma: float) -> Tensor:
        v = velocity(x, sigma)
        return v + strengths.get(sigma, 0.0) * ((x - goal) / (sigma - end) - v)

    return velocity_to_goal


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="the picture to edit; by default the source prompt is drawn")
    parser.add_argument("--source", default="a pig face")
    parser.add_argument("--target", default="a green pig face")
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--eta", type=float, default=0.7)
    parser.add_argument("--start", type=float, default=0.0, help="part of the steps before eta begins")
    parser.add_argument("--stop", type=float, default=0.25, help="part of the steps after which eta ends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="rf_inversion.png")
    args = parser.parse_args(argv)

    pipeline = load_pipeline("flux-mini")
    request = GenerationRequest(prompt=args.target, seed=args.seed, num_steps=args.num_steps)
    latents = [
        get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, request.seed + i) for i in (0, 1)
    ]
    start, noise = (pack(latent) for latent in latents)

    def velocity(prompt: str, guidance: float) -> Velocity:
        inputs = prepare(pipeline.t5, pipeline.clip, latents[0], prompt)
        del inputs["img"]
        return flow_velocity(pipeline.model, **inputs, guidance=guidance)

    sigmas = get_schedule(request.num_steps, start.shape[1])
    if args.image:
        picture = pipeline.codec.encode(open_source(args.image)[0], request.width, request.height)
    else:
        picture = euler(velocity(args.source, request.guidance), start, sigmas)

    gammas = dict.fromkeys(sigmas, args.gamma)
    inverted = euler(controlled(velocity("", 1.0), noise, 1.0, gammas), picture, sigmas[::-1])
    etas = dict.fromkeys(sigmas[int(args.start * request.num_steps) : int(args.stop * request.num_steps)], args.eta)
    target = velocity(args.target, request.guidance)
    edited = euler(controlled(target, picture, 0.0, etas), inverted, sigmas)
    grid([pipeline.picture(x, request) for x in (picture, edited)]).save(args.output)


if __name__ == "__main__":
    main()
