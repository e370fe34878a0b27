"""Normalized Attention Guidance (Chen et al., arXiv 2505.21179): a negative prompt for models without true CFG.

In every block the image attends to the positive and to the negative text, with outputs z+ and z-; both are replaced by

    z~ = scale * z+ - (scale - 1) * z-,    r = |z~|_1 / |z+|_1,    z = alpha * z~ * min(r, tau) / r + (1 - alpha) * z+

The texts are two rows of one batch, with equal image tokens: both rows get z, and the positive text's modulation.

    python examples/nag.py --prompt "a heart" --negative "a red heart" --scale 10 --alpha 0.5 --steps 0-7
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import Custom
from flux_core.images.pictures import grid
from flux_core.sampling import Velocity, euler
from flux_core.script import command


def normalized_guidance(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """z, from outputs of attention [B, L, D]; the norms are taken for each token."""
    guided = scale * positive - (scale - 1) * negative
    ratio = guided.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
    return torch.lerp(positive, guided * (ratio.clamp(max=tau) / ratio), alpha)


def at_attention(scale: float, tau: float, alpha: float):
    """The function for `img.attn`, with rows of positive and negative in turn."""
    return lambda x, at: normalized_guidance(x[0::2], x[1::2], scale, tau, alpha).repeat_interleave(2, dim=0)


def of_positive(velocity: Velocity) -> Velocity:
    """The velocity of a single row, from the velocity of two rows with equal image tokens."""
    return lambda x, sigma: velocity(x.repeat_interleave(2, dim=0), sigma)[0::2]


@command
def main(
    prompt="a heart", negative="a red heart", scale=10.0, tau=2.5, alpha=0.5, steps=None,
    seed=0, num_steps=28, output="nag.png",
):  # fmt: skip
    """alpha: 0.25 in the released code; steps: at which attention is guided, by default 0-7 of 28."""
    pipeline = load_pipeline("flux-mini")
    x, sigmas = pipeline.noise(seed), pipeline.schedule(num_steps)
    same = Custom(sites="y", fn=lambda y, at: y[0::2].repeat_interleave(2, dim=0))
    guide = Custom(sites="layer.*.img.attn", fn=at_attention(scale, tau, alpha), steps=steps or f"0-{num_steps // 4}")
    run = pipeline.run([same, guide], sigmas, branches=("positive", "negative"))
    guided = of_positive(pipeline.velocity([prompt, negative], run=run))
    drawn = torch.cat([euler(velocity, x, sigmas) for velocity in (pipeline.velocity(prompt), guided)])
    grid(pipeline.decode(drawn)).save(output)
