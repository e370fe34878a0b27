"""Maps that the control models draw by: a photograph's edges for Canny, its depth for Depth.

A Canny or Depth model sees a map as it sees a picture, by the autoencoder. Importing this costs neither torch nor
OpenCV. Source: black-forest-labs/flux `src/flux/modules/image_embedders.py`.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import UsageError, nearest
from ..request.fields import MAPS

if TYPE_CHECKING:
    from torch import Tensor, device

THRESHOLDS = 50, 200
"""of Canny's hysteresis, the official ones"""
DEPTH_MODEL = "LiheYoung/depth-anything-large-hf"


def load_map(name: str, device: "device | str" = "cpu", model: str | None = None) -> "Callable[[Image.Image], Tensor]":
    """A function from an RGB picture to its map, fp32 [1, 3, H, W] on `device`, of the picture's size.

    Black is -1 and white 1; a depth may lie outside. model: a folder or hub id for depth, instead of the official one.
    UsageError: no such map, or OpenCV is missing. Else as `load_depth`.
    """
    if name not in MAPS:
        raise UsageError(f"there is no map {name!a}: there are {', '.join(MAPS)}.{nearest(name, MAPS)}")
    if name == "depth":
        from .depth import load_depth

        return load_depth(model, device)
    from ..sampling.family import pixels_of

    opencv()
    return lambda picture: pixels_of(canny(picture)).to(device)


def check_maps(names: Iterable[str]) -> None:
    """UsageError where OpenCV is needed and missing: now, not after a model is loaded."""
    if "canny" in names:
        opencv()


def canny(picture: Image.Image) -> Image.Image:
    """The edges of an RGB picture, white on black, in RGB. UsageError without OpenCV."""
    return Image.fromarray(opencv().Canny(official_levels(picture), *THRESHOLDS)).convert("RGB")


def opencv() -> Any:
    """The module. UsageError where it is not installed, or does not run."""
    try:
        return import_module("cv2")
    except ImportError:
        raise UsageError("the map canny needs OpenCV. Next: pip install opencv-python-headless") from None


def official_levels(picture: Image.Image) -> np.ndarray:
    """The levels of an RGB picture, uint8 [H, W, 3], as the official code hands them to what makes a map.

    It scales them to -1 to 1 in fp32 and back, and cuts off: 63 of the 256 levels get one less, which moves edges.
    """
    scaled = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return ((scaled + 1) * 127.5).astype(np.uint8)


def map_picture(pixels: "Tensor") -> Image.Image:
    """A map [1, 3, H, W] as an RGB picture: what the model sees, rounded to 256 levels, cut off below 0 and above 255.

    Nothing is stretched, so a depth that keeps below 255 is a dark picture. A model that is given the picture sees the
    same map within half a level, but for what was cut off.
    """
    levels = ((pixels[0].clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
