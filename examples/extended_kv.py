"""Extended attention: a picture also attends to the keys and values of a reference picture.

As in training-free consistent generation (ConsiStory, arXiv 2402.03286; Add-it, arXiv 2411.07232), keys and values of
the reference's image tokens, after norm and RoPE, are appended to the picture's own in chosen blocks and steps. Both
are drawn together; the reference's forward comes first at every step, and never uses the other picture.

    attention(q, [k ; k_reference], [v ; v_reference])

    python examples/extended_kv.py --reference "a blue heart" --prompt "a star" --layers all --steps 0-11
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import At, Custom
from flux_core.hooks.layers import layers_of
from flux_core.images.pictures import grid
from flux_core.sampling import Velocity, euler
from flux_core.script import command


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


@command
def main(
    reference="a blue heart", prompt="a star", layers="all", steps=None,
    seed=0, num_steps=28, output="extended_kv.png",
):  # fmt: skip
    """layers: all, none, or blocks as in single_blocks.0-3; steps: that use the reference, by default 0-11 of 28."""
    pipeline, kept = load_pipeline("flux-mini"), {}
    sigmas, steps = pipeline.schedule(num_steps), steps or f"0-{num_steps * 2 // 5}"
    sites = [f"{block}.attend" for block in layers_of(layers, pipeline.variant.name, pipeline.variant.params)]
    velocities = []
    for text, fn in ((reference, storing(kept)), (prompt, None), (prompt, extended(kept))):
        run = pipeline.run([Custom(sites=sites, fn=fn, steps=steps)] if sites and fn else [], sigmas)
        velocities.append(pipeline.velocity(text, run=run))
    drawn = euler(side_by_side(*velocities), pipeline.noise([seed + 1, seed, seed]), sigmas)
    grid(pipeline.decode(drawn), columns=3).save(output)
