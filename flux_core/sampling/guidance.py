"""True classifier-free guidance (CFG), CFG-Zero* and dynamic thresholding, as functions on velocities.

FLUX.1-dev has distilled guidance: one forward, with the strength as an input. It has no input for a negative prompt.
True CFG runs the model twice, for the prompt and for the negative prompt, and extrapolates (Ho and Salimans, arXiv
2207.12598; the distilled guidance is kept, and the same for both, as in diffusers' FluxPipeline):

    v = v- + scale * (v+ - v-)

Both velocities come from two rows of one batch (`one_batch`) or from two forwards (`two_passes`); `cfg_velocity`
combines them to a velocity that any sampler can integrate.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .flow import Velocity

Pair = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""gives the velocities of positive and negative prompt at (x, sigma), each [B, L, C]"""
PATCH_AREA = 4
"""latent pixels of a token: its C features are channels x pixels"""
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi / 2 * t),
}
"""factor on (scale - 1), where t goes from 0 at the first step to 1 at the last"""


def one_batch(velocity: Velocity) -> Pair:
    """Both velocities from one forward. velocity: for 2B rows, whose prompts are positive and negative in turn."""

    def pair(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        v = velocity(x.repeat_interleave(2, dim=0), sigma)
        return v[0::2], v[1::2]

    return pair


def two_passes(positive: Velocity, negative: Velocity) -> Pair:
    """Both velocities from two forwards: equal to `one_batch` up to rounding, with half the memory for activations."""
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
    """The guided velocity of a pair, along the schedule `sigmas`.

    zero_steps: CFG-Zero* (arXiv 2503.18886): the negative velocity is scaled by `optimized_scale`, and in the first
    `zero_steps` steps (section 4.2 there) the velocity is zero, without a forward. None: neither.
    mimic_scale, percentile: see `threshold`; None: no thresholding. schedule: of SCHEDULES, for both scales.
    """
    steps = len(sigmas) - 1

    def velocity(x: Tensor, sigma: float) -> Tensor:
        step = bisect_right(sigmas, -sigma, key=lambda s: -s) - 1  # between two sigmas: the step across it
        if step < (zero_steps or 0):
            return torch.zeros_like(x)
        positive, negative = pair(x, sigma)
        if zero_steps is not None:
            negative = (optimized_scale(positive, negative) * negative).to(negative.dtype)
        factor = SCHEDULES[schedule](step / max(steps - 1, 1))
        result = guided(positive, negative, 1 + factor * (scale - 1))
        if mimic_scale is None:
            return result
        mimicked = guided(positive, negative, 1 + factor * (mimic_scale - 1))
        return threshold(result, mimicked, x, sigma, percentile)

    return velocity


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """v- + scale * (v+ - v-). At scale 1 exactly v+."""
    return torch.lerp(negative, positive, scale)


def optimized_scale(positive: Tensor, negative: Tensor) -> Tensor:
    """s* = <v+, v-> / |v-|^2 of each row, [B, 1, 1], fp32: s* v- is the nearest to v+ (arXiv 2503.18886, 4.1)."""
    positive, negative = positive.float().flatten(1), negative.float().flatten(1)
    return ((positive * negative).sum(1) / (negative * negative).sum(1).clamp_min(1e-8))[:, None, None]


def threshold(result: Tensor, mimicked: Tensor, x: Tensor, sigma: float, percentile: float) -> Tensor:
    """The velocity `result`, changed so that its predicted picture has the mean and at most the range of `mimicked`'s.

    Imagen (arXiv 2205.11487, section 2.3) clips the predicted picture d to [-s, s] and divides by s, where s is a
    percentile of |d|, but at least 1, the bound of pixels. Latents have no bound, so 1 is replaced by the range
    of m, the picture predicted at a lower ("mimic") scale (after github.com/mcmonkeyprojects/sd-dynamic-thresholding).
    For each image and latent channel, with M the largest of |m - mean m|,

        d = x - sigma * v,    s = max(percentile of |d - mean d|, M),    d' = mean m + clip(d - mean d, -s, s) * M / s

    That extension keeps mean d instead: on flux-mini the background then takes on the object's colour. Where both
    velocities are equal the result is exactly that velocity.
    """

    def predicted(v: Tensor) -> tuple[Tensor, Tensor]:
        data = rearrange(x.float() - sigma * v.float(), "b l (c p) -> b c (l p)", p=PATCH_AREA)
        mean = data.mean(-1, keepdim=True)
        return data - mean, mean

    (high, mean_of_high), (low, mean_of_low) = predicted(result), predicted(mimicked)
    bound = low.abs().amax(-1, keepdim=True)
    s = torch.quantile(high.abs(), percentile / 100, dim=-1, keepdim=True).maximum(bound).clamp_min(1e-12)
    change = high - high.clamp(-s, s) * (bound / s) + mean_of_high - mean_of_low
    return (result.float() + rearrange(change, "b c (l p) -> b l (c p)", p=PATCH_AREA) / sigma).to(result.dtype)
