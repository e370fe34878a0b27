"""What a model learns to see besides the prompt, as models of the family do: a map of each picture, or references.

A map is made of the picture as it is cut. Maps and references of one's own are named by the folder's table, as
`"control": "maps/a.png"` or `"reference": ["before/a.png"]`; they are cut as the picture is. What is kept of a picture,
and the mask, come from programs alone (`weights/recipe/train_family.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..errors import FileError
from ..images.pictures import as_rgb, open_picture
from ..lora.handle import widened
from ..model import Flux
from ..pipeline.conditions import Condition
from ..pipeline.family import behind, beside
from ..request.fields import MAPS
from ..vision.maps import load_map, map_picture
from .data import Picture
from .sizes import Cut, apply


class Way(NamedTuple):
    """A way to see."""

    key: str
    """of a row of the folder's table; empty: made of the picture itself"""
    condition: Callable[[Tensor], Condition]
    """of latents [B, N, 16, h, w]"""
    widens: int = 0
    """how many latents the model's input gets channels for"""


maker = lru_cache(maxsize=1)(load_map)
"""`load_map`, whose network stays until another is wanted, or `cache_clear`"""


def _beside(latents: Tensor) -> Condition:
    return beside(latents.flatten(1, 2))


def _behind(latents: Tensor) -> Condition:
    return behind(latents.unbind(1))


WAYS: Mapping[str, Way] = MappingProxyType(
    {name: Way("", _beside, widens=1) for name in MAPS}
    | {"control": Way("control", _beside, widens=1), "reference": Way("reference", _behind)}
    | {"fill": Way("", _beside, widens=5)}
)
"""by the values of `--takes`; and FLUX.1 Fill's: the latent of what is kept, and an 8x8 patch of the mask for each
pixel of it, as four more"""


def seen_of(
    takes: str, picture: Picture, cut: Cut, image: Image.Image, device: torch.device | str = "cpu"
) -> Sequence[Image.Image]:
    """What is seen beside a cut of a picture, whose pixels are `image`. FileError for a file that was changed."""
    if not WAYS[takes].key:
        return [map_picture(maker(takes, device)(image))]
    found = []
    for path, sha256 in picture.beside:
        opened, now = open_picture(path)
        if now != sha256:
            raise FileError(f"{path} was changed since it was found. Next: start again")
        found.append(apply(cut, as_rgb(opened, str(path)).resize(picture.shape, Image.Resampling.LANCZOS)))
    return found


def widen(model: Flux, takes: str) -> None:
    """Make the model's input wide enough for what it will see, with zeros: nothing that it draws changes."""
    if latents := WAYS[takes].widens:
        width = model.in_channels + latents * model.out_channels
        model.img_in = widened(model.img_in, width)
        model.params, model.in_channels = replace(model.params, in_channels=width), width


def condition_of(takes: str, seen: Sequence[Tensor]) -> Condition:
    """The condition of a batch, of what each of its pictures is seen beside: latents [N, 16, h, w]."""
    return WAYS[takes].condition(torch.stack([*seen]))
