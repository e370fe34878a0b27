"""Depth as FLUX.1-Depth sees it: Depth Anything's own numbers, divided by 127.5, less 1, and not stretched.

The network gives disparity, which is 0 far away, grows with nearness, and has no upper limit. So a map need not reach
white, and where it goes beyond, or resampling goes below black, the official code hands that on, too. Any relative
`DepthAnythingForDepthEstimation` of transformers works. Source: black-forest-labs/flux
`src/flux/modules/image_embedders.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..device.defaults import plain_defaults
from ..errors import FileError
from .maps import DEPTH_MODEL, official_levels
from .networks import Network, load_network

DEPTH = Network("depth model", "DepthAnythingForDepthEstimation", ("depth_anything",), DEPTH_MODEL)


class Depth:
    """Computes the depth of pictures."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.no_grad()
    @plain_defaults()
    def __call__(self, picture: Image.Image) -> Tensor:
        """The map of an RGB picture, fp32 [1, 3, H, W] on the model's device: see `depth_pixels`."""
        levels = Image.fromarray(official_levels(picture))
        pixels = self.processor(images=levels, return_tensors="pt")["pixel_values"]
        predicted = self.model(pixel_values=pixels.to(self.model.device)).predicted_depth
        return depth_pixels(predicted, picture.height, picture.width)


def depth_pixels(predicted: Tensor, height: int, width: int) -> Tensor:
    """A network's `predicted_depth` [B, h, w] as the map [B, 3, height, width] that the transformer is trained on."""
    depth = F.interpolate(predicted[:, None], (height, width), mode="bicubic", antialias=True)
    return depth.expand(-1, 3, -1, -1) / 127.5 - 1


def load_depth(name: str | None = None, device: torch.device | str = "cpu") -> Depth:
    """The network in fp32. name: a folder or a hub id, by default the official one. Errors as in `load_network`."""
    name = name or DEPTH_MODEL
    model, processor = load_network(DEPTH, name, device, torch.float32)
    if (kind := model.config.depth_estimation_type) != "relative":
        raise FileError(
            f"{name} gives {kind} depth, which grows with distance. Next: take a relative one, as {DEPTH_MODEL}."
        )
    return Depth(model, processor)
