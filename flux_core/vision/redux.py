"""A picture as words for FLUX.1, which follow those of T5: SigLIP's tokens, brought to T5's width by two layers.

`prepare_redux` puts the words behind T5's, rounded to bf16. Source: black-forest-labs/flux
`src/flux/modules/image_embedders.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoint.contents import Contents
from ..checkpoint.read import dense, note_precision
from ..checkpoint.redux import UP, check_redux
from ..checkpoint.tensors import opened
from ..device.choice import pick_dtype
from ..device.defaults import plain_defaults
from ..errors import FileError
from ..variants import SIGLIP as OFFICIAL
from ..variants import Variant
from .networks import Network, load_network

SIGLIP = Network("SigLIP", "SiglipVisionModel", ("siglip", "siglip_vision_model"), OFFICIAL)


class Redux(nn.Module):
    """Maps a picture to words. The layers have the official names."""

    def __init__(self, siglip: Any, processor: Any, hidden: int, width: int, dtype: torch.dtype) -> None:
        """The layers are on `meta`. hidden: features between them; width: of a word."""
        super().__init__()
        self.siglip, self.processor = siglip, processor
        self.redux_up = nn.Linear(siglip.config.hidden_size, hidden, device="meta", dtype=dtype)
        self.redux_down = nn.Linear(hidden, width, device="meta", dtype=dtype)

    @property
    def count(self) -> int:
        """Words of a picture: SigLIP's patches."""
        return (self.siglip.config.image_size // self.siglip.config.patch_size) ** 2

    @torch.no_grad()
    @plain_defaults()
    def forward(self, picture: Image.Image) -> Tensor:
        """Words [1, T, D] of an RGB picture, which is squeezed into SigLIP's square: 729 of the official one's."""
        like = self.redux_up.weight
        inputs = self.processor(images=picture, do_resize=True, do_convert_rgb=True, return_tensors="pt")
        pixels = inputs["pixel_values"].to(like.device, like.dtype)
        tokens = self.siglip(pixel_values=pixels).last_hidden_state
        return self.redux_down(F.silu(self.redux_up(tokens)))

    def words(self, pictures: Sequence[tuple[Image.Image, float]]) -> Tensor:
        """Words [1, N T, D] of several pictures, one after another, each picture's times its weight.

        diffusers' FluxPriorReduxPipeline adds the pictures' words up instead, with T5's, so their number stays T.
        """
        return torch.cat([weight * self(picture) for picture, weight in pictures], dim=1)


def load_redux(
    variant: Variant,
    path: str | Path,
    siglip: str = OFFICIAL,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Redux:
    """The encoder for that model, frozen. path: an adapter's file or folder; siglip: a folder or hub id.

    dtype: by default bf16 on CUDA, else fp32. FileError for an adapter that is none, or fits neither the model nor that
    SigLIP; other errors as in `load_network`.
    """
    device = torch.device(device)
    dtype = dtype or pick_dtype(None, device)
    contents = check_redux(Path(path), variant)
    model, processor = load_network(SIGLIP, siglip, device, dtype)
    (hidden, features), found = contents.shapes[UP], model.config.hidden_size
    if features != found:
        raise FileError(f"{path} takes {features} features of SigLIP, and {siglip} has {found}. Next: take {OFFICIAL}.")
    redux = Redux(model, processor, hidden, variant.params.context_in_dim, dtype)
    redux.load_state_dict(_read(contents, device, dtype), strict=False, assign=True)
    return redux.eval().requires_grad_(False)


def _read(contents: Contents, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors on the device, by their official names."""
    note_precision(contents, dtype)
    source, storage, names = contents.source, contents.storage, contents.names
    order = sorted(names, key=lambda name: source.spans[names[name]])
    with opened(source, device, storage.among(names[name] for name in order)) as get:
        return {name: dense(get, names[name], storage, dtype) for name in order}
