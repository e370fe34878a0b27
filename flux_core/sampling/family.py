"""The inputs of FLUX.1's other models, by the official names: what Fill, Canny, Depth, Redux and Kontext see.

Each function returns the arguments of `denoise` without the schedule, as `prepare` does, and a condition beside them:
`img_cond` [B, L, C], channels beside the image's tokens (Fill 320, Canny and Depth 64); `img_cond_seq` [B, K, 64],
tokens behind them at `img_cond_seq_ids` (Kontext); or more text (Redux). A condition is rounded to bf16, as the
official code rounds it. Source: black-forest-labs/flux `src/flux/sampling.py`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ..model import AutoEncoder
from ..variants import KONTEXT_SIZES, nearest_size, of_ratio
from .flow import get_noise, image_ids, pack, prepare

Picture = str | Path | Image.Image
"""a file, or a picture"""
PREFERED_KONTEXT_RESOLUTIONS = [*KONTEXT_SIZES]
"""spelled as in the official code"""
KONTEXT = 1
"""the first of a reference's position ids, where the picture's own is 0"""


def prepare_control(
    t5: Callable[..., Tensor],
    clip: Callable[..., Tensor],
    img: Tensor,
    prompt: str | list[str],
    ae: AutoEncoder,
    encoder: Callable[[Tensor], Tensor],
    img_cond_path: Picture,
) -> dict[str, Tensor]:
    """With a map of edges or depth that `encoder` makes of the picture, resized to the noise img [B, 16, h, w].

    encoder: pixels [1, 3, H, W] from -1 to 1 -> a map in the same shape and range.
    """
    height, width = 8 * img.shape[2], 8 * img.shape[3]
    with torch.no_grad():
        seen = encoder(pixels_of(img_cond_path, (width, height)).to(img.device))
        latent = ae.encode(seen.to(_dtype(ae))).to(torch.bfloat16)
    return _with(prepare(t5, clip, img, prompt), img_cond=pack(latent))


def prepare_fill(
    t5: Callable[..., Tensor],
    clip: Callable[..., Tensor],
    img: Tensor,
    prompt: str | list[str],
    ae: AutoEncoder,
    img_cond_path: Picture,
    mask_path: Picture,
) -> dict[str, Tensor]:
    """With the picture that is kept, and a grey mask whose white is painted anew: both of the size of the noise.

    A mask is not rounded to black and white: what is grey is kept in part. ValueError for another size.
    """
    pixels, mask = pixels_of(img_cond_path).to(img.device), mask_of(mask_path).to(img.device)
    expected = 8 * img.shape[2], 8 * img.shape[3]
    for what, x in (("picture", pixels), ("mask", mask)):
        if tuple(x.shape[2:]) != expected:
            found, wanted = (f"{w}x{h}" for h, w in (x.shape[2:], expected))
            raise ValueError(f"the {what} has {found} pixels, and {wanted} are drawn")
    return _with(prepare(t5, clip, img, prompt), img_cond=fill_condition(ae, pixels, mask))


def fill_condition(ae: AutoEncoder, pixels: Tensor, mask: Tensor) -> Tensor:
    """Fill's channels [B, L, 320], bf16: the latent of what is kept, and the mask, an 8x8 patch for each latent pixel.

    pixels: [B, 3, H, W] from -1 to 1; mask: [B, 1, H, W], 1 where it is painted.
    """
    with torch.no_grad():
        latent = ae.encode((pixels * (1 - mask)).to(_dtype(ae))).to(torch.bfloat16)
    return torch.cat((pack(latent), mask_channels(mask)), dim=-1)


def mask_channels(mask: Tensor) -> Tensor:
    """A mask [B, 1, H, W] as channels [B, L, 256], bf16: 8x8 of its pixels for each latent pixel."""
    return pack(rearrange(mask[:, 0].to(torch.bfloat16), "b (h ph) (w pw) -> b (ph pw) h w", ph=8, pw=8))


def prepare_redux(
    t5: Callable[..., Tensor],
    clip: Callable[..., Tensor],
    img: Tensor,
    prompt: str | list[str],
    encoder: Callable[[Image.Image], Tensor],
    img_cond_path: Picture,
) -> dict[str, Tensor]:
    """With a picture as words: the tokens [1, T, D] that `encoder` makes of it follow those of T5."""
    inputs = prepare(t5, clip, img, prompt)
    with torch.no_grad():
        tokens = encoder(picture_of(img_cond_path)).to(inputs["txt"].device, torch.bfloat16)
    tokens = repeat(tokens, "1 t d -> b t d", b=len(inputs["txt"]))
    txt = torch.cat((inputs["txt"], tokens.to(inputs["txt"])), dim=1)
    return inputs | {"txt": txt, "txt_ids": torch.zeros(*txt.shape[:2], 3, dtype=torch.float32, device=txt.device)}


def prepare_kontext(
    t5: Callable[..., Tensor],
    clip: Callable[..., Tensor],
    prompt: str | list[str],
    ae: AutoEncoder,
    img_cond_path: Picture,
    seed: int,
    device: torch.device | str,
    target_width: int | None = None,
    target_height: int | None = None,
    bs: int = 1,
) -> tuple[dict[str, Tensor], int, int]:
    """With a picture to change, resized to the nearest of the preferred sizes; and height and width of what is drawn.

    target_width, target_height: by default the reference's size. bs: pictures, each of its own noise; several prompts
    are as many. `img_cond_orig` [1, 3, H, W] are the reference's pixels.
    """
    bs = len(prompt) if bs == 1 and not isinstance(prompt, str) else bs
    picture = picture_of(img_cond_path)
    width, height = kontext_size(*picture.size)
    pixels = pixels_of(picture, (width, height))
    target_width, target_height = target_width or width, target_height or height
    noise = get_noise(bs, target_height, target_width, device, torch.bfloat16, seed)
    with torch.no_grad():
        latent = ae.encode(pixels.to(device, _dtype(ae))).to(torch.bfloat16)
    condition = reference_tokens(latent, device)
    inputs = prepare(t5, clip, noise, prompt) | {
        name: repeat(x, "1 ... -> b ...", b=bs) for name, x in condition.items()
    }
    return inputs | {"img_cond_orig": pixels}, target_height, target_width


def reference_tokens(latent: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """A reference's tokens `img_cond_seq` [B, K, 64] and their positions, of its latent [B, 16, h, w]."""
    ids = image_ids(len(latent), latent.shape[2] // 2, latent.shape[3] // 2, device).clone()
    ids[..., 0] = KONTEXT
    return {"img_cond_seq": pack(latent).to(device), "img_cond_seq_ids": ids}


def kontext_size(width: int, height: int) -> tuple[int, int]:
    """The width and height at which Kontext sees a picture: those of the preferred that are nearest in shape."""
    wide, high = nearest_size((width, height), PREFERED_KONTEXT_RESOLUTIONS)
    return 16 * (wide // 16), 16 * (high // 16)


def aspect_ratio_to_height_width(aspect_ratio: str, area: int = 1024**2) -> tuple[int, int]:
    """Width and height, in this order, of `16:9`: about `area` pixels, multiples of 16. ValueError for no ratio."""
    wide, high = map(float, aspect_ratio.split(":"))
    return of_ratio(wide / high, area)


def picture_of(picture: Picture, mode: str = "RGB") -> Image.Image:
    """A picture in RGB, or in another mode of Pillow's."""
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as opened:
            return opened.convert(mode)
    return picture.convert(mode)


def pixels_of(picture: Picture, size: tuple[int, int] | None = None) -> Tensor:
    """Pixels [1, 3, H, W] from -1 to 1, resized to width and height by Lanczos."""
    image = picture_of(picture)
    image = image if size is None else image.resize(size, Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(image)).float() / 127.5 - 1.0, "h w c -> 1 c h w")


def mask_of(picture: Picture) -> Tensor:
    """A mask [1, 1, H, W] from 0 to 1, of a picture's brightness."""
    return torch.from_numpy(np.array(picture_of(picture, "L"))).float()[None, None] / 255.0


def _with(inputs: dict[str, Tensor], img_cond: Tensor) -> dict[str, Tensor]:
    """The inputs with a condition, repeated for each picture."""
    bs = inputs["img"].shape[0]
    return inputs | {"img_cond": repeat(img_cond, "1 ... -> b ...", b=bs) if img_cond.shape[0] == 1 else img_cond}


def _dtype(ae: AutoEncoder) -> torch.dtype:
    """What an autoencoder computes in."""
    return next((x.dtype for x in ae.parameters()), torch.float32)
