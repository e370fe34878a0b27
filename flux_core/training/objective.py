"""The loss of a rectified flow: which noise levels are drawn, how they are weighted, and the velocity's squared error.

x = (1 - sigma) latents + sigma noise moves along noise - latents, which the model learns to predict (Esser et al. 2024,
"Scaling Rectified Flow Transformers", section 2). The defaults are those of diffusers' recipe
(examples/dreambooth/train_dreambooth_lora_flux.py); the maps and weightings have its names, or kohya's.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Flux
from ..model.transformer import Fetch
from ..sampling import FlowInputs, pack, resolution_mu, time_shift
from ..sampling.flow import with_seen

STEPS = 1000
"""of the table that diffusers draws from"""


class Map(NamedTuple):
    """A way from a draw to a noise level."""

    is_normal: bool
    """whether draws are of a normal distribution, else uniform in [0, 1)"""
    sigma: Callable[..., Tensor]
    """the levels in [0, 1] of draws [B], in fp32"""
    tabled: bool = False
    """whether a trainer that has it takes the nearest level of diffusers' table"""
    weight: Callable[[Tensor], Tensor] = torch.ones_like
    """a factor of the loss at noise levels that belongs to it"""


def _logit_normal(n: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.sigmoid(mean + std * n)


def _sigmoid(n: Tensor, scale: float = 1.0) -> Tensor:
    return torch.sigmoid(scale * n)


def shifted(s: Tensor, shift: float) -> Tensor:
    """Levels moved towards noise by a factor: s / (1 - s) grows by it."""
    return shift * s / (1 + (shift - 1) * s)


def _shift(n: Tensor, shift: float, scale: float = 1.0) -> Tensor:
    return shifted(torch.sigmoid(scale * n), shift)


def _mode(u: Tensor, scale: float = 1.29) -> Tensor:
    return (1 - u - scale * (torch.cos(math.pi * u / 2).square() - 1 + u)).clamp(0, 1)


def _beta(u: Tensor) -> Tensor:
    return 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)  # where 3 x^2 - 2 x^3, the share below x, is u


def _bell(sigma: Tensor) -> Tensor:
    edge = math.exp(-0.5)
    mean = sum(math.exp(-2 * (i / STEPS - 0.5) ** 2) - edge for i in range(STEPS)) / STEPS
    return (torch.exp(-2 * (sigma - 0.5).square()) - edge) / mean


def _flux_shift(n: Tensor, tokens: int, scale: float = 1.0) -> Tensor:
    return time_shift(resolution_mu(tokens), 1.0, torch.sigmoid(scale * n))


MAPS: Mapping[str, Map] = MappingProxyType(
    {
        "uniform": Map(False, lambda u: u, tabled=True),
        "logit_normal": Map(True, _logit_normal, tabled=True),
        "sigmoid": Map(True, _sigmoid),
        "shift": Map(True, _shift),
        "flux_shift": Map(True, _flux_shift),
        "mode": Map(False, _mode, tabled=True),
        "content": Map(False, lambda u: u**3, tabled=True),
        "style": Map(False, lambda u: 1 - u**3, tabled=True),
        "linear_timesteps": Map(False, lambda u: u, tabled=True, weight=_bell),
        "linear_timesteps2": Map(False, lambda u: u, tabled=True, weight=lambda sigma: _bell(sigma.clamp(min=0.5))),
        "beta": Map(False, _beta),
        "mixflow": Map(False, lambda u: 1 - u.sqrt()),
    }
)
"""by name. `shift`: towards noise by a factor; `flux_shift`: by that of so many packed tokens, as when sampling;
`mode`: diffusers'; `beta` (2, 2), `mixflow`: SimpleTuner's; ai-toolkit's: `content` (much noise), `style` (little), and
`linear_timesteps`, whose loss counts most in the middle and not at all where all is noise; the second counts as much
where there is little. (Its table of 1000 fitted numbers, `weighted`, is not here.)"""


def on_table(u: Tensor) -> Tensor:
    """Noise levels, fp32 [B], of u [B] in [0, 1]: from diffusers' unshifted table of 1000, from most noise down."""
    index = (u.float() * STEPS).long().clamp(max=STEPS - 1)
    return (STEPS - index).float() / STEPS


def _soft(error: Tensor, c: Tensor) -> Tensor:
    return 2 * ((error.square() + c.square()).sqrt() - c)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "l2": lambda error, c: error.square(),
        "l1": lambda error, c: error.abs(),
        "huber": lambda error, c: c * _soft(error, c),
        "smooth_l1": _soft,
    }
)
"""of errors, by kohya's names. `huber`: pseudo-Huber, the square of errors far below c, and linear far above it, so
that a few wrong pictures count less (Khrapov et al. 2024, arXiv 2403.16728); `smooth_l1` is that, divided by c"""


WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "none": torch.ones_like,
        "sigma_sqrt": lambda sigma: sigma**-2.0,
        "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }
)
"""factors of the loss at noise levels, by diffusers' names (`compute_loss_weighting_for_sd3`)"""


def noised(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) latents + sigma noise, in fp32. latents, noise: [B, C, H, W]; sigma: [B]"""
    level = sigma.float()[:, None, None, None]
    return (1 - level) * latents.float() + level * noise.float()


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity to be learned, noise - latents, in fp32."""
    return noise.float() - latents.float()


def predicted(
    model: Flux, inputs: FlowInputs, latents: Tensor, noise: Tensor, sigma: Tensor, fetch: Fetch = iter
) -> Tensor:
    """A model's velocity of noised latents, packed, in fp32 [B, L, 64].

    latents: [B, 16, H/8, W/8], shifted and scaled as the model takes them; noise: likewise; sigma: [B], fp32. The model
    gets its tokens in the dtype of `inputs.txt`. fetch: iterates over blocks, as in `Flux.forward`.
    """
    x = pack(noised(latents, noise, sigma)).to(inputs.txt.dtype)
    guidance = inputs.guidance if model.params.guidance_embed else None
    time = sigma.to(x.dtype)  # rounded as when sampling
    img, ids, seen = with_seen(x, inputs.img_cond, inputs.img_cond_seq), inputs.img_ids, inputs.img_cond_seq_ids
    ids = ids if seen is None else torch.cat((ids, seen), dim=1)
    velocity = model(img, ids, inputs.txt, inputs.txt_ids, time, inputs.vec, guidance, fetch=fetch)
    return velocity[:, : x.shape[1]].float()


def flow_loss(
    model: Flux,
    inputs: FlowInputs,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    weighting: Callable[[Tensor], Tensor] = WEIGHTINGS["none"],
    fetch: Fetch = iter,
) -> Tensor:
    """The mean of the weighted squared error of each picture's velocity, fp32 [B]; its mean is the loss.

    The other arguments are those of `predicted`.
    """
    error = predicted(model, inputs, latents, noise, sigma, fetch) - pack(flow_target(latents, noise))
    return weighting(sigma.float()) * error.square().mean((1, 2))
