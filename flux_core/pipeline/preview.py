"""A picture of what a step is drawing, in no time and without the autoencoder: an eighth of its size, by a matrix, or
whole, by a tiny decoder.

With x = sigma * noise + (1 - sigma) * data and v = noise - data, the data that a step expects are x - sigma * v. Each
pixel of a latent has 16 channels, and a matrix fitted to an autoencoder (`variants.py`) makes colours of them.
"""

import torch
from PIL import Image

from ..model.tiny import TinyDecoder
from ..sampling import Step, unpack
from ..variants import Rgb


@torch.no_grad()
def preview(step: Step, size: tuple[int, int], rgb: Rgb, row: int = 0, tiny: TinyDecoder | None = None) -> Image.Image:
    """The picture of a row that a step expects, RGB. size: width and height in pixels, multiples of 16.

    tiny: decodes it instead of the matrix.
    """
    expected = (step.before - step.sigma * step.velocity)[row : row + 1].float()
    latent = unpack(expected, size[1], size[0])[0]
    if tiny is not None:
        return _picture(2 * tiny(latent[None])[0].movedim(0, -1) - 1)
    *matrix, constant = torch.tensor(rgb, dtype=torch.float32, device=latent.device)
    pixels = torch.einsum("chw,ck->hwk", latent, torch.stack(matrix)) + constant
    return _picture(pixels)


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Of pixels [H, W, 3] from -1 to 1."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy())
