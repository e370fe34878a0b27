"""Similarity of two pictures: the cosine of their DINOv2 features (arXiv 2304.07193).

DINOv2 features describe objects and structure and change little with a shift or a shade, unlike pixels. Any
`Dinov2Model` of transformers works, from a folder or the hub; `dinov2-mini`, a small model for flux-mini's pictures,
ships with the package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..device.defaults import plain_defaults
from ..hub.places import scorer_folder
from ..vision.networks import Network, load_network

Pooling = Literal["cls", "mean"]
SCORER = Network("scorer", "Dinov2Model", ("dinov2",), "facebook/dinov2-base")


class Scorer:
    """Computes features of pictures. pooling: the class token, or the mean of all patch tokens."""

    def __init__(self, name: str, model: Any, processor: Any, pooling: Pooling = "cls") -> None:
        self.name, self.model, self.processor, self.pooling = name, model, processor, pooling

    @torch.no_grad()
    @plain_defaults()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors, float32 [N, D] on the CPU; the dot product of two is their similarity."""
        device = next(self.model.parameters()).device
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(device)
        tokens = self.model(pixel_values=pixels).last_hidden_state
        return F.normalize(tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(1), dim=-1).cpu()


def load_scorer(name: str, device: torch.device, pooling: Pooling = "cls") -> Scorer:
    """A float32 scorer. name: a shipped scorer, a folder, or a hub id. FileError if it is not a DINOv2."""
    model, processor = load_network(SCORER, name, device, torch.float32, scorer_folder(name))
    return Scorer(Path(name).name, model, processor, pooling)
