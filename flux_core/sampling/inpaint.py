"""Repaint a part of a picture with any model: what is kept is set to the source, noised anew, after every step.

A mask says how far each place may leave the source, as `strength` says it for a whole picture: white is painted from
the first step on, black is kept, and a grey place joins in at the step from which image-to-image of that strength would
start. (Blended latent diffusion, arXiv 2206.02779; grey as in Differential Diffusion, arXiv 2306.00950; for masks of
black and white the steps of diffusers' `FluxInpaintPipeline`.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..strength import skipped_steps
from .flow import OnStep, Step, pack


def mask_tokens(mask: Tensor, channels: int = 16) -> Tensor:
    """A mask [B, 1, H, W] from 0 to 1 as tokens [B, L, 4 * channels]: the mean of the pixels of each latent pixel."""
    return pack(F.avg_pool2d(mask, 8).expand(-1, channels, -1, -1))


def repaint(latent: Tensor, noise: Tensor, mask: Tensor, sigmas: Sequence[float]) -> OnStep:
    """A step callback that keeps the source where the mask says so.

    latent, noise: tokens of the source and of the noise that the picture starts from, [B, L, C]. mask: [B, L, C], of
    `mask_tokens`. sigmas: the whole schedule, also where a `strength` skips its first steps.
    """
    steps = len(sigmas) - 1
    strengths, which = mask.unique(return_inverse=True)
    starts = [sigmas[skipped_steps(steps, float(x))] for x in strengths]
    start = torch.tensor(starts, dtype=torch.float32, device=latent.device)[which.to(latent.device)]

    def keep(step: Step) -> Tensor:
        source = (1 - step.sigma_next) * latent + step.sigma_next * noise
        return torch.where(start <= step.sigma_next, source.to(step.x.dtype), step.x)

    return keep
