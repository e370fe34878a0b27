"""Masks on the loss: how much each place of a picture is learned from, 1 where a mask is white.

A mask is the picture's own alpha channel, or a file of the picture's size. It is cut as the picture is, and its means
over 8 x 8 pixels are at the latents' places.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import FileError
from ..images.pictures import as_rgb, layers, open_picture
from .sizes import Cut, Size, apply

ALPHA, LISTED = "alpha", "metadata"
"""values of `--masks` that name no folder: the alpha channel, or files that the table names by `KEY`"""
KEY = "mask"
PIXELS = 8
"""of a side, for a place of the latents"""


def open_mask(path: Path, alpha: bool) -> tuple[Image.Image, str]:
    """A mask in mode L, upright, and the SHA-256 of its file. alpha: whether it is the file's opacity. FileError."""
    opened, sha256 = open_picture(path)
    if not alpha:
        return as_rgb(opened, path.name).convert("L"), sha256
    _, opacity = layers(opened, path.name)
    if opacity is None:
        raise FileError("it has no alpha channel to be its mask")
    return opacity, sha256


def checked_mask(path: Path, shape: Size, alpha: bool) -> tuple[Path, str]:
    """A mask's file and its SHA-256. FileError where it is not of its picture's size, or black everywhere."""
    mask, sha256 = open_mask(path, alpha)
    if mask.size != shape:
        raise FileError(f"its mask {path.name} has {Size(*mask.size)} pixels, not {shape}")
    if mask.getbbox() is None:
        raise FileError(f"its mask {'is' if alpha else f'{path.name} is'} black everywhere")
    return path, sha256


def cut_mask(cut: Cut, mask: Image.Image) -> Tensor:
    """A mask [H/8, W/8] in 0..1 of a cut of H x W pixels, fp32 on the CPU."""
    pixels = torch.tensor(np.asarray(apply(cut, mask)), dtype=torch.float32, device="cpu") / 255
    height, width = pixels.shape
    return pixels.view(height // PIXELS, PIXELS, width // PIXELS, PIXELS).mean(dim=(1, 3))
