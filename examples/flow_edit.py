"""FlowEdit (arXiv 2412.08629): edit a picture from a source to a target prompt, without inversion.

The edit starts at the source and integrates the difference of two velocities, at points with the same fresh noise:

    z_src = (1 - sigma) * x_src + sigma * noise,    z_tar = z_edit + z_src - x_src
    d z_edit / d sigma = v(z_tar, target) - v(z_src, source)

    python examples/flow_edit.py --source "a pig face" --target "a green pig face"
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.sampling import Velocity, euler
from flux_core.script import command


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


@command
def main(
    source="a pig face", target="a green pig face", guidance=(1.5, 5.5), start=0.85,
    seed=0, num_steps=28, output="flow_edit.png",
):  # fmt: skip
    """guidance: of the source and of the target; start: part of the schedule that is used."""
    pipeline = load_pipeline("flux-mini")
    sigmas, draw = pipeline.schedule(num_steps), torch.Generator().manual_seed(seed + 1)
    x = euler(pipeline.velocity(source), pipeline.noise(seed), sigmas)
    v_source, v_target = map(pipeline.velocity, (source, target), guidance)
    used = sigmas[int((1 - start) * num_steps) :]
    edited = flow_edit(x, v_source, v_target, used, lambda: torch.randn(x.shape, generator=draw).to(x))
    for tokens, path in ((x, output.replace(".png", "_source.png")), (edited, output)):
        pipeline.decode(tokens)[0].save(path)
