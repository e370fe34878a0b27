"""Encode pictures to tokens of latents and decode them, by the autoencoder: whole, or in strips."""

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..images.pictures import fitted
from ..model import strips
from ..request.fields import FIT
from ..sampling import pack, unpack
from .nonfinite import is_finite, nonfinite_error
from .placement import Placement


class Codec:
    """Encodes and decodes with a placement's autoencoder. Where memory runs out, strips are tried before offload: they
    cost less time than moving the other parts away."""

    def __init__(self, placement: Placement, dtype: torch.dtype) -> None:
        self.placement, self.dtype = placement, dtype

    def encode(self, image: Image.Image, width: int, height: int, fit: str = FIT) -> Tensor:
        """The latent's tokens [1, L, 64] of an RGB picture, fitted to width x height. fit: of `fields.FITS`."""
        pixels = torch.from_numpy(np.array(fitted(image, width, height, fit)))
        return self.encode_pixels(rearrange(pixels.float() / 127.5 - 1, "h w c -> 1 c h w"))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """The latent's tokens [1, L, 64] of pixels [1, 3, H, W] from -1 to 1."""
        ae, x = self.placement.components.ae, pixels.to(self.placement.device, self.dtype)
        what = f"encoding {x.shape[3]}x{x.shape[2]} pixels"
        return pack(self._with_ae(what, lambda: ae.encode(x), lambda: strips.encode(ae, x)))

    def decode(self, x: Tensor, width: int, height: int) -> Image.Image:
        """Tokens [1, L, 64] as an RGB picture. NonFiniteError if it is not finite.

        Rounded to the nearest of 256 levels; the official command cuts off and is darker by half a level.
        """
        ae, z = self.placement.components.ae, unpack(x, height, width)
        what = f"decoding {width}x{height} pixels"
        pixels = self._with_ae(what, lambda: ae.decode(z), lambda: strips.decode(ae, z))[0].float()
        if not is_finite(pixels):
            raise nonfinite_error("in the decoded picture", self.dtype, ae)
        levels = rearrange((pixels.clamp(-1, 1) + 1) * 127.5, "c h w -> h w c").round().to(torch.uint8)
        return Image.fromarray(levels.cpu().numpy())

    def _with_ae(self, what: str, whole: Callable[[], Tensor], in_strips: Callable[[], Tensor]) -> Tensor:
        fallback = self.placement.fallback

        def work() -> Tensor:
            with self.placement.using(self.placement.components.ae):
                return in_strips() if fallback.vae_tiling else whole()

        return fallback.run(what, work, "vae_tiling", "offload")
