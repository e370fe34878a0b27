"""A small picture of what a step is drawing, an eighth of its size, in no time and without the autoencoder.

With x = sigma * noise + (1 - sigma) * data and v = noise - data, the data that a step expects are x - sigma * v. Each
pixel of a latent has 16 channels, and a matrix fitted to an autoencoder (`variants.py`) makes colours of them.
"""

import torch
from PIL import Image

from ..sampling import Step, unpack
from ..variants import Rgb


@torch.no_grad()
def preview(step: Step, size: tuple[int, int], rgb: Rgb, row: int = 0) -> Image.Image:
    """The picture of a row that a step expects, RGB. size: width and height in pixels, multiples of 16."""
    expected = (step.before - step.sigma * step.velocity)[row : row + 1].float()
    latent = unpack(expected, size[1], size[0])[0]
    *matrix, constant = torch.tensor(rgb, dtype=torch.float32, device=latent.device)
    pixels = torch.einsum("chw,ck->hwk", latent, torch.stack(matrix)) + constant
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy())
