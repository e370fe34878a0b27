"""What the models of the family see besides a prompt, as conditions: channels, tokens behind the image, words.

`variants.Takes` says which a model has; no model's name is known here. A row of `variants` whose channels are in
`CHANNELS`, or that takes references or words, needs nothing else; another kind of channel is a function in that table.
A condition is rounded to bf16, as in the official code (black-forest-labs/flux `src/flux/sampling.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ..images.given import Given, nearest_size, with_map
from ..request.generation import PATCH, GenerationRequest
from ..sampling import FlowInputs, SampledRun, pack
from ..sampling.family import mask_of, pixels_of, reference_tokens
from ..sampling.flow import unpack
from ..variants import Variant
from .codec import Codec
from .conditions import Condition


class _Inputs:
    """A condition of tensors alone."""

    def run(self, inputs: FlowInputs) -> SampledRun | None:
        return None


@dataclass(frozen=True)
class Channels(_Inputs):
    """Channels beside those of the image's tokens."""

    tokens: Tensor
    """[1, L, C]"""

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        return replace(inputs, img_cond=_rows(self.tokens, inputs))


@dataclass(frozen=True)
class Behind(_Inputs):
    """Tokens behind the image's."""

    tokens: Tensor
    """[1, K, 64]"""
    ids: Tensor
    """[1, K, 3]"""

    @property
    def extra_tokens(self) -> int:
        return self.tokens.shape[1]

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        return replace(inputs, img_cond_seq=_rows(self.tokens, inputs), img_cond_seq_ids=_rows(self.ids, inputs, False))


@dataclass(frozen=True)
class Words(_Inputs):
    """Tokens behind the text's."""

    tokens: Tensor
    """[1, K, D]"""

    @property
    def extra_tokens(self) -> int:
        return self.tokens.shape[1]

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        txt = torch.cat((inputs.txt, _rows(self.tokens, inputs)), dim=1)
        ids = torch.zeros(*txt.shape[:2], 3, dtype=inputs.txt_ids.dtype, device=txt.device)
        return replace(inputs, txt=txt, txt_ids=ids)


def _rows(x: Tensor, inputs: FlowInputs, cast: bool = True) -> Tensor:
    """For each row of a batch, where its text is."""
    x = x.to(inputs.txt.device, inputs.txt.dtype if cast else x.dtype)
    return repeat(x, "1 ... -> b ...", b=inputs.txt.shape[0])


# From pictures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What conditions are made of: a request's pictures, as large as they are drawn."""

    request: GenerationRequest
    given: Given
    codec: Codec

    @property
    def size(self) -> tuple[int, int]:
        return self.request.padded_size

    def latent(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """Tokens [1, L, 64] of a picture, stretched to a size, rounded to bf16."""
        return self.codec.encode(image, *(size or self.size), "stretch").bfloat16()


def kept(scene: Scene) -> Tensor:
    """The picture, grey where it is painted."""
    image, mask = scene.given.image, scene.given.mask
    assert image is not None and mask is not None
    return scene.codec.encode_pixels(pixels_of(image) * (1 - mask_of(mask))).bfloat16()


def mask(scene: Scene) -> Tensor:
    """The mask's pixels: 8x8 of them for each latent pixel. [1, L, 256]"""
    assert scene.given.mask is not None
    patches = rearrange(mask_of(scene.given.mask)[:, 0], "b (h ph) (w pw) -> b (ph pw) h w", ph=8, pw=8)
    return pack(patches.bfloat16()).to(scene.codec.placement.device)


def control(scene: Scene) -> Tensor:
    """The map. [1, L, 64]"""
    assert scene.given.control is not None
    return scene.latent(scene.given.control)


CHANNELS: Mapping[str, Callable[[Scene], Tensor]] = MappingProxyType({"kept": kept, "mask": mask, "control": control})
"""by the names in `Takes.channels`: tokens [1, L, C] of what is there"""


def references(scene: Scene, variant: Variant) -> Behind:
    """Each at an index of its own in the first of the position ids, from 1 on."""
    found = []
    for index, image in enumerate(scene.given.references):
        width, height = nearest_size(image.size, variant) if variant.takes.sizes else scene.size
        size = width // PATCH * PATCH, height // PATCH * PATCH
        tokens = scene.latent(image, size)
        part = reference_tokens(unpack(tokens, size[1], size[0]), tokens.device)
        part["img_cond_seq_ids"][..., 0] += index
        found.append(part)
    return Behind(*(torch.cat([part[name] for part in found], dim=1) for name in ("img_cond_seq", "img_cond_seq_ids")))


def conditions_of(
    request: GenerationRequest, given: Given, codec: Codec, words: Callable[[Image.Image], Tensor] | None = None
) -> Sequence[Condition]:
    """What the model of a request sees besides its prompt. words: what makes tokens of a picture."""
    scene, takes = Scene(request, with_map(request, given), codec), request.variant.takes
    found: list[Condition] = []
    if takes.channels:
        found.append(Channels(torch.cat([CHANNELS[name](scene) for name in takes.channels], dim=-1)))
    if takes.references:
        found.append(references(scene, request.variant))
    if takes.words and words is not None:
        weighted = zip(request.reference or (), given.references, strict=True)
        found.append(Words(torch.cat([record.weight * words(image) for record, image in weighted], dim=1)))
    return found
