"""Steering by a second prompt: true classifier-free guidance, CFG-Zero*, dynamic thresholding. Functions on velocities.

FLUX.1-dev has learned guidance: one forward, and its strength goes in as a number. So a negative prompt has no place in
it. True guidance asks the model twice, for the prompt and for what to steer away from, and goes on beyond the first (Ho
and Salimans, arXiv 2207.12598; beside the learned guidance, which is the same for both, as in diffusers' FluxPipeline):

    v = v- + scale * (v+ - v-)

Both velocities come from two rows of one batch (`one_batch`) or from two forwards (`two_passes`); `steered` makes one
velocity of them, which any sampler may follow.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .flow import Velocity

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""the velocities of the positive and of the negative prompt at (x, sigma), each [B, L, C]"""
PATCH_AREA = 4
"""latent pixels in a token: its C features are channels x pixels"""
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi / 2 * t),
}
"""the share of a scale's excess over 1 that is left, where t goes from 0 at the first step to 1 at the last"""


def one_batch(velocity: Velocity) -> Pair:
    """Of a model that holds the prompts of 2B rows: positive and negative of each image in turn."""

    def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        v = velocity(x.repeat_interleave(2, dim=0), sigma)
        return v[0::2], v[1::2]

    return pair


def two_passes(positive: Velocity, negative: Velocity) -> Pair:
    """One forward after the other: the same but for the last bits, with half the memory between the blocks."""
    return lambda x, sigma: (positive(x, sigma), negative(x, sigma))


def cfg_velocity(
    pair: Pair,
    sigmas: Sequence[float],
    scale: float,
    zero_steps: int | None = None,
    mimic_scale: float | None = None,
    percentile: float = 99.5,
    schedule: str = "constant",
) -> Velocity:
    """One velocity of two, along the schedule `sigmas`.

    zero_steps: CFG-Zero* (arXiv 2503.18886): the negative velocity at its best scale (`optimized_scale`), and for so
    many steps (section 4.2 there) velocity zero, without asking the model. None: neither.
    mimic_scale, percentile: see `threshold`; None: no thresholding. schedule: of SCHEDULES, for both scales.
    """
    steps = len(sigmas) - 1

    def velocity(x: Tensor, sigma: float) -> Tensor:
        step = bisect_right(sigmas, -sigma, key=lambda s: -s) - 1  # between two sigmas: the step that passes there
        if step < (zero_steps or 0):
            return torch.zeros_like(x)
        positive, negative = pair(x, sigma)
        if zero_steps is not None:
            negative = (optimized_scale(positive, negative) * negative).to(negative.dtype)
        left = SCHEDULES[schedule](step / max(steps - 1, 1))
        result = guided(positive, negative, 1 + left * (scale - 1))
        if mimic_scale is None:
            return result
        mimicked = guided(positive, negative, 1 + left * (mimic_scale - 1))
        return threshold(result, mimicked, x, sigma, percentile)

    return velocity


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """v- + scale * (v+ - v-). At scale 1 it is v+ to the bit."""
    return torch.lerp(negative, positive, scale)


def optimized_scale(positive: Tensor, negative: Tensor) -> Tensor:
    """s* = <v+, v-> / |v-|^2 of each row, [B, 1, 1], fp32: with it s* v- is nearest to v+ (arXiv 2503.18886, 4.1)."""
    one, other = positive.float().flatten(1), negative.float().flatten(1)
    return ((one * other).sum(1) / (other * other).sum(1).clamp_min(1e-8))[:, None, None]


def threshold(result: Tensor, mimicked: Tensor, x: Tensor, sigma: float, percentile: float) -> Tensor:
    """The velocity `result`, with tint and contrast of what it predicts held to those of another, `mimicked`.

    Imagen (arXiv 2205.11487, section 2.3) clips the predicted picture d to [-s, s] and divides by s, where s is a
    percentile of |d|, but at least 1, the bound of pixels. Latents have no bound, so 1 is replaced by what the picture
    m has that is predicted at a lower ("mimic") scale (after github.com/mcmonkeyprojects/sd-dynamic-thresholding). For
    each image and latent channel, with M the largest of |m - mean m|,

        d = x - sigma * v,    s = max(percentile of |d - mean d|, M),    d' = mean m + clip(d - mean d, -s, s) * M / s

    The extension named there keeps mean d: on flux-mini the ground then takes the colour of what stands on it. Where
    both velocities are equal nothing changes, to the bit.
    """

    def predicted(v: Tensor) -> tuple[Tensor, Tensor]:
        data = rearrange(x.float() - sigma * v.float(), "b l (c p) -> b c (l p)", p=PATCH_AREA)
        mean = data.mean(-1, keepdim=True)
        return data - mean, mean

    (high, tint), (low, tint_of_low) = predicted(result), predicted(mimicked)
    bound = low.abs().amax(-1, keepdim=True)
    s = torch.quantile(high.abs(), percentile / 100, dim=-1, keepdim=True).maximum(bound).clamp_min(1e-12)
    taken = high - high.clamp(-s, s) * (bound / s) + tint - tint_of_low
    return (result.float() + rearrange(taken, "b c (l p) -> b l (c p)", p=PATCH_AREA) / sigma).to(result.dtype)
