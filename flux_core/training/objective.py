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


def _logit_normal(n: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.sigmoid(mean + std * n)


def _sigmoid(n: Tensor, scale: float = 1.0) -> Tensor:
    return torch.sigmoid(scale * n)


def _shift(n: Tensor, shift: float, scale: float = 1.0) -> Tensor:
    s = torch.sigmoid(scale * n)
    return shift * s / (1 + (shift - 1) * s)


def _flux_shift(n: Tensor, tokens: int, scale: float = 1.0) -> Tensor:
    return time_shift(resolution_mu(tokens), 1.0, torch.sigmoid(scale * n))


MAPS: Mapping[str, Map] = MappingProxyType(
    {
        "uniform": Map(False, lambda u: u, tabled=True),
        "logit_normal": Map(True, _logit_normal, tabled=True),
        "sigmoid": Map(True, _sigmoid),
        "shift": Map(True, _shift),
        "flux_shift": Map(True, _flux_shift),
    }
)
"""by name. `shift`: towards noise by a factor; `flux_shift`: by that of so many packed tokens, as when sampling"""


def on_table(u: Tensor) -> Tensor:
    """Noise levels, fp32 [B], of u [B] in [0, 1]: from diffusers' unshifted table of 1000, from most noise down."""
    index = (u.float() * STEPS).long().clamp(max=STEPS - 1)
    return (STEPS - index).float() / STEPS


WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "none": torch.ones_like,
        "sigma_sqrt": lambda sigma: sigma**-2.0,
        "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }
)
"""factors of the squared error at noise levels, by diffusers' names (`compute_loss_weighting_for_sd3`)"""


def noised(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) latents + sigma noise, in fp32. latents, noise: [B, C, H, W]; sigma: [B]"""
    level = sigma.float()[:, None, None, None]
    return (1 - level) * latents.float() + level * noise.float()


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity to be learned, noise - latents, in fp32."""
    return noise.float() - latents.float()


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

    latents: [B, 16, H/8, W/8], shifted and scaled as the model takes them; noise: likewise; sigma: [B], fp32. The model
    gets its tokens in the dtype of `inputs.txt`. fetch: iterates over blocks, as in `Flux.forward`.
    """
    x = pack(noised(latents, noise, sigma)).to(inputs.txt.dtype)
    guidance = inputs.guidance if model.params.guidance_embed else None
    time = sigma.to(x.dtype)  # rounded as when sampling
    img, ids, seen = with_seen(x, inputs.img_cond, inputs.img_cond_seq), inputs.img_ids, inputs.img_cond_seq_ids
    ids = ids if seen is None else torch.cat((ids, seen), dim=1)
    velocity = model(img, ids, inputs.txt, inputs.txt_ids, time, inputs.vec, guidance, fetch=fetch)
    error = (velocity[:, : x.shape[1]].float() - pack(flow_target(latents, noise))).square()
    return weighting(sigma.float()) * error.mean((1, 2))
