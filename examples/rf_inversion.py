"""RF-Inversion (Rout et al., arXiv 2410.10792): invert a picture to noise and sample with another prompt.

Both ODEs are controlled: the velocity is mixed with that of the straight line to a goal. When inverting, without a
prompt, it is a given noise at sigma 1 (strength gamma); when sampling, the picture at sigma 0 (eta, at chosen steps):

    dx / d sigma = v(x) + gamma * ((noise - x) / (1 - sigma) - v(x)),    v(x) + eta * ((x - picture) / sigma - v(x))

    python examples/rf_inversion.py --source "a pig face" --target "a green pig face"
    python examples/rf_inversion.py --image photo.png --target "a green pig face" --eta 0.9
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.images.pictures import grid
from flux_core.sampling import Velocity, euler
from flux_core.script import command


def controlled(velocity: Velocity, goal: Tensor, end: float, strengths: Mapping[float, float]) -> Velocity:
    """The velocity mixed with the straight line to `goal` at sigma `end`. strengths: of the mix, by sigma; else 0."""

    def velocity_to_goal(x: Tensor, sigma: float) -> Tensor:
        v = velocity(x, sigma)
        return v + strengths.get(sigma, 0.0) * ((x - goal) / (sigma - end) - v)

    return velocity_to_goal


@command
def main(
    image=None, source="a pig face", target="a green pig face", gamma=0.5, eta=0.7, start=0.0, stop=0.25,
    seed=0, num_steps=28, output="rf_inversion.png",
):  # fmt: skip
    """image: the picture to edit, by default the source prompt's; start, stop: the part of the steps that has eta."""
    pipeline = load_pipeline("flux-mini")
    x, noise = pipeline.noise([seed, seed + 1]).split(1)
    sigmas = pipeline.schedule(num_steps)
    picture = pipeline.encode(image) if image else euler(pipeline.velocity(source), x, sigmas)
    to_noise = controlled(pipeline.velocity("", 1.0), noise, 1.0, dict.fromkeys(sigmas, gamma))
    inverted = euler(to_noise, picture, sigmas[::-1])
    etas = dict.fromkeys(sigmas[int(start * num_steps) : int(stop * num_steps)], eta)
    edited = euler(controlled(pipeline.velocity(target), picture, 0.0, etas), inverted, sigmas)
    grid(pipeline.decode(torch.cat((picture, edited)))).save(output)
