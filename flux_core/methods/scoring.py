"""Similarity of two pictures: the cosine of their DINOv2 features (arXiv 2304.07193).

DINOv2 features describe objects and structure and change little with a shift or a shade, unlike pixels. Any
`Dinov2Model` of transformers works, from a folder or the hub; `dinov2-mini`, a small model for flux-mini's pictures,
ships with the package.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..device.defaults import plain_defaults
from ..errors import FileError
from ..hub.places import scorer_folder
from ..text.encoders import load_model, quiet

Pooling = Literal["cls", "mean"]


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


@plain_defaults()
def load_scorer(name: str, device: torch.device, pooling: Pooling = "cls") -> Scorer:
    """A float32 scorer. name: a shipped scorer, a folder, or a hub id. FileError if it is not a DINOv2."""
    folder = scorer_folder(name)
    _check(name, folder)
    with quiet():
        from transformers import AutoImageProcessor, Dinov2Model

        try:
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise FileError(f"{name}: its image processor could not be read: {error}") from error
        model = load_model(Dinov2Model, folder, device, torch.float32, "scorer")
    return Scorer(Path(name).name, model, processor, pooling)


def _check(name: str, folder: Path) -> None:
    """FileError if a folder does not hold a DINOv2."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{name} holds no model: a scorer is a folder with config.json and model.safetensors") from None
    if kind != "dinov2":
        raise FileError(f"{name} holds a {str(kind)[:40]!a} model; a scorer is a dinov2, as facebook/dinov2-base")
