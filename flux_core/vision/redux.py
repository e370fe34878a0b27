"""A picture as words for FLUX.1, which follow those of T5: what a vision model sees, brought to T5's width by two
layers.

That model is SigLIP, and for flux-mini the one that ships: an early block still knows colours, the last knows things.
Its words are few, as flux-mini has 32 of its own, and those of 196 patches leave nothing of them.

`prepare_redux` puts the words behind T5's, rounded to bf16. Source: black-forest-labs/flux
`src/flux/modules/image_embedders.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from ..checkpoint.contents import Contents
from ..checkpoint.read import dense, note_precision
from ..checkpoint.redux import UP, check_redux
from ..checkpoint.tensors import opened
from ..device.choice import pick_dtype
from ..device.defaults import plain_defaults
from ..errors import FileError
from ..hub.places import SCORER, scorer_folder
from ..variants import SIGLIP as OFFICIAL
from ..variants import Variant
from .networks import Network, load_network

SIGLIP = Network("SigLIP", "SiglipVisionModel", ("siglip", "siglip_vision_model"), OFFICIAL)
DINOV2 = Network("vision model", "Dinov2Model", ("dinov2",), SCORER)


class Redux(nn.Module):
    """Maps a picture to words. The layers have the official names."""

    def __init__(
        self,
        tower: Any,
        processor: Any,
        hidden: int,
        width: int,
        dtype: torch.dtype,
        layers: tuple[int, ...] = (),
        side: int = 0,
    ) -> None:
        """The layers are on `meta`. tower: what sees; hidden: features between the layers; width: of a word.

        layers, side: as in `variants.Takes`.
        """
        super().__init__()
        self.tower, self.processor, self.layers = tower, processor, layers
        self.patches = tower.config.image_size // tower.config.patch_size
        self.side = side or self.patches
        self.redux_up = nn.Linear(self.features, hidden, device="meta", dtype=dtype)
        self.redux_down = nn.Linear(hidden, width, device="meta", dtype=dtype)

    @property
    def count(self) -> int:
        """Words of a picture."""
        return self.side**2

    @property
    def features(self) -> int:
        """Of what is seen, for a word."""
        return max(1, len(self.layers)) * int(self.tower.config.hidden_size)

    @torch.no_grad()
    @plain_defaults()
    def forward(self, picture: Image.Image) -> Tensor:
        """Words [1, T, D] of an RGB picture: 729 of the official one's.

        SigLIP sees all of it, squeezed into a square, DINOv2 the square in its middle.
        """
        like = self.redux_up.weight
        inputs = self.processor(images=picture, do_resize=True, do_convert_rgb=True, return_tensors="pt")
        pixels = inputs["pixel_values"].to(like.device, like.dtype)
        return self.said(self.seen(pixels))

    def seen(self, pixels: Tensor) -> Tensor:
        """Features [B, T, D] of pixels [B, 3, H, W], as large as the vision model takes them."""
        found = self.tower(pixel_values=pixels, output_hidden_states=bool(self.layers))
        blocks = [F.layer_norm(x, x.shape[-1:]) for x in (found.hidden_states[i] for i in self.layers)]
        tokens = torch.cat(blocks or [found.last_hidden_state], dim=-1)
        tokens = tokens[:, -(self.patches**2) :]  # DINOv2's class comes first
        if self.side == self.patches:
            return tokens
        patches = rearrange(tokens, "b (h w) d -> b d h w", h=self.patches)
        return rearrange(F.adaptive_avg_pool2d(patches, self.side), "b d h w -> b (h w) d")

    def said(self, features: Tensor) -> Tensor:
        """Words of features."""
        return self.redux_down(F.silu(self.redux_up(features)))

    def words(self, pictures: Sequence[tuple[Image.Image, float]]) -> Tensor:
        """Words [1, N T, D] of several pictures, one after another, each picture's times its weight.

        diffusers' FluxPriorReduxPipeline adds the pictures' words up instead, with T5's, so their number stays T.
        """
        return torch.cat([weight * self(picture) for picture, weight in pictures], dim=1)


def load_redux(
    variant: Variant,
    path: str | Path,
    tower: str = OFFICIAL,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Redux:
    """The encoder for that model, frozen. path: an adapter's file or folder.

    tower: SigLIP's folder or hub id, or `dinov2-mini`. dtype: by default bf16 on CUDA, else fp32. FileError for an
    adapter that is none, or fits neither the model nor what sees; other errors as in `load_network`.
    """
    device = torch.device(device)
    dtype = dtype or pick_dtype(None, device)
    contents = check_redux(Path(path), variant)
    network, folder = (DINOV2, scorer_folder(tower)) if tower == SCORER else (SIGLIP, None)
    model, processor = load_network(network, tower, device, dtype, folder)
    (hidden, features), takes = contents.shapes[UP], variant.takes
    redux = Redux(model, processor, hidden, variant.params.context_in_dim, dtype, takes.layers, takes.side)
    if features != redux.features:
        found = f"{tower} has {redux.features}"
        raise FileError(f"{path} takes {features} features of {network.what}, and {found}. Next: take {OFFICIAL}.")
    redux.load_state_dict(_read(contents, device, dtype), strict=False, assign=True)
    return redux.eval().requires_grad_(False)


def _read(contents: Contents, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors on the device, by their official names."""
    note_precision(contents, dtype)
    source, storage, names = contents.source, contents.storage, contents.names
    order = sorted(names, key=lambda name: source.spans[names[name]])
    with opened(source, device, storage.among(names[name] for name in order)) as get:
        return {name: dense(get, names[name], storage, dtype) for name in order}
