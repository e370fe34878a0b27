"""What the models of the family see besides a prompt, as conditions: channels, tokens behind the image, words.

`variants.Takes` says which a model has; no model's name is known here. A row of `variants` whose channels are in
`CHANNELS`, or that takes references or words, needs nothing else; another kind of channel is a function in that table,
and a number in `variants.FEATURES`.
A condition is rounded to bf16, as in the official code (black-forest-labs/flux `src/flux/sampling.py`).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from einops import repeat
from PIL import Image
from torch import Tensor, nn

from ..images.given import Given
from ..request.generation import PATCH, GenerationRequest
from ..sampling import FlowInputs, SampledRun, pack
from ..sampling.family import mask_channels, mask_of, pixels_of, reference_tokens
from ..sampling.flow import unpack
from ..variants import nearest_size
from ..vision.maps import load_map, map_picture
from .codec import Codec
from .conditions import Condition

if TYPE_CHECKING:
    from ..vision.redux import Redux


class _Inputs:
    """A condition of tensors alone."""

    def run(self, inputs: FlowInputs) -> SampledRun | None:
        return None


@dataclass(frozen=True)
class Channels(_Inputs):
    """Channels beside those of the image's tokens."""

    tokens: Tensor
    """[1, L, C], or a row for each picture of a batch"""

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        return replace(inputs, img_cond=_joined(inputs.img_cond, _rows(self.tokens, inputs), -1))


@dataclass(frozen=True)
class Behind(_Inputs):
    """Tokens behind the image's."""

    tokens: Tensor
    """[1, K, 64], likewise"""
    ids: Tensor
    """[1, K, 3]"""

    @property
    def extra_tokens(self) -> int:
        return self.tokens.shape[1]

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        tokens, ids = _rows(self.tokens, inputs), _rows(self.ids, inputs, False)
        tokens, ids = _joined(inputs.img_cond_seq, tokens, 1), _joined(inputs.img_cond_seq_ids, ids, 1)
        return replace(inputs, img_cond_seq=tokens, img_cond_seq_ids=ids)


@dataclass(frozen=True)
class Words(_Inputs):
    """Tokens behind the text's."""

    tokens: Tensor
    """[1, K, D]"""
    net: nn.Module | None = None
    """what made them, where it stays on the device"""

    @property
    def extra_tokens(self) -> int:
        return self.tokens.shape[1]

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        txt = torch.cat((inputs.txt, _rows(self.tokens, inputs)), dim=1)
        ids = torch.zeros(*txt.shape[:2], 3, dtype=inputs.txt_ids.dtype, device=txt.device)
        return replace(inputs, txt=txt, txt_ids=ids)


def _joined(before: Tensor | None, x: Tensor, dim: int) -> Tensor:
    """Behind what another condition gave."""
    return x if before is None else torch.cat((before, x), dim)


def _rows(x: Tensor, inputs: FlowInputs, cast: bool = True) -> Tensor:
    """For each row of a batch, where its text is."""
    x = x.to(inputs.txt.device, inputs.txt.dtype if cast else x.dtype)
    return x if x.shape[0] == inputs.txt.shape[0] else repeat(x, "1 ... -> b ...", b=inputs.txt.shape[0])


def beside(latents: Tensor) -> Channels:
    """A latent [B, 16, h, w] as channels, rounded to bf16."""
    return Channels(pack(latents).bfloat16())


def behind(latents: Sequence[Tensor]) -> Behind:
    """Latents [B, 16, h, w] as tokens, rounded likewise, each at an index of its own in the first of the position ids.

    Indices are 1, 2, …, where the picture that is drawn has 0. The official code knows one reference.
    """
    parts = []
    for index, latent in enumerate(latents):
        part = reference_tokens(latent.bfloat16(), latent.device)
        part["img_cond_seq_ids"][..., 0] += index
        parts.append(part)
    return Behind(*(torch.cat([part[name] for part in parts], dim=1) for name in ("img_cond_seq", "img_cond_seq_ids")))


MAPS_KEPT = 4
"""those of a picture with several ControlNets"""


class Maps:
    """Makes maps of control pictures. The last `MAPS_KEPT` are kept, and no network."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[Any, Tensor] = {}
        """the latest last"""

    def of(self, request: GenerationRequest, given: Given) -> Tensor:
        """The map [1, 3, H, W] that a request's model sees; black is -1, white 1. Errors as in `vision.load_map`."""
        assert request.control is not None and given.control is not None
        return self.made(request.control.map, given.control, request.padded_size)

    def pictures(self, request: GenerationRequest, given: Given) -> Iterator[tuple[str, Image.Image]]:
        """What a request's photographs become, with the maps' names, as people look at it."""
        for name, source in given.on_canvas(request)[0].maps(request):
            yield name, map_picture(self.made(name, source, request.padded_size))

    def made(self, name: str, picture: Image.Image, size: tuple[int, int]) -> Tensor:
        """A map, likewise, of a picture that is one itself where no name is given. size: width and height.

        The picture is stretched to what is drawn before, by Lanczos, as in the official code.
        """
        image = picture.resize(size, Image.Resampling.LANCZOS)
        key = name, size, hashlib.sha256(image.tobytes()).digest()
        map = self._kept.pop(key, None)
        if map is None:
            map = (load_map(name, self.device) if name else pixels_of)(image).cpu()
        self._kept[key] = map
        for old in list(self._kept)[:-MAPS_KEPT]:
            del self._kept[old]
        return map


# From pictures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What conditions are made of: a request's pictures, as large as they are drawn."""

    request: GenerationRequest
    given: Given
    codec: Codec
    maps: "Maps"

    @property
    def size(self) -> tuple[int, int]:
        return self.request.padded_size


def kept(scene: Scene) -> Tensor:
    """The picture, grey where it is painted."""
    image, mask = scene.given.image, scene.given.mask
    assert image is not None and mask is not None
    return scene.codec.encode_pixels(pixels_of(image) * (1 - mask_of(mask))).bfloat16()


def mask(scene: Scene) -> Tensor:
    """The mask's pixels. [1, L, 256]"""
    assert scene.given.mask is not None
    return mask_channels(mask_of(scene.given.mask)).to(scene.codec.placement.device)


def control(scene: Scene) -> Tensor:
    """The map. [1, L, 64]"""
    return scene.codec.encode_pixels(scene.maps.of(scene.request, scene.given)).bfloat16()


CHANNELS: Mapping[str, Callable[[Scene], Tensor]] = MappingProxyType({"kept": kept, "mask": mask, "control": control})
"""by the names in `Takes.channels`: tokens [1, L, C] of what is there"""


def references(scene: Scene) -> Behind:
    """Each at the size that the model sees references at."""
    found = []
    for image, size in zip(scene.given.references, reference_sizes(scene.request, scene.given), strict=True):
        found.append(unpack(scene.codec.encode(image, *size, "stretch"), size[1], size[0]))
    return behind(found)


def reference_sizes(request: GenerationRequest, given: Given) -> list[tuple[int, int]]:
    """Width and height at which a model sees each reference as tokens behind the image's."""
    sizes = request.variant.takes.sizes
    found = [nearest_size(image.size, sizes) if sizes else request.padded_size for image in given.references]
    return [(width // PATCH * PATCH, height // PATCH * PATCH) for width, height in found]


def tokens_behind(request: GenerationRequest, given: Given, redux: "Redux | None" = None) -> int:
    """Those that a request's references add to image and text."""
    if request.variant.takes.references:
        return sum(width * height // PATCH**2 for width, height in reference_sizes(request, given))
    return len(given.references) * redux.count if redux else 0


def conditions_of(
    request: GenerationRequest, given: Given, codec: Codec, maps: Maps, redux: "Redux | None" = None
) -> Sequence[Condition]:
    """What the model of a request sees besides its prompt. redux: what makes words of its references."""
    scene, takes = Scene(request, given, codec, maps), request.variant.takes
    found: list[Condition] = []
    if takes.channels:
        found.append(Channels(torch.cat([CHANNELS[name](scene) for name in takes.channels], dim=-1)))
    if takes.references:
        found.append(references(scene))
    if takes.words and redux is not None:
        weights = [record.weight for record in request.reference or ()]
        with codec.placement.visit(redux):
            words = redux.words(list(zip(given.references, weights, strict=True))).bfloat16()
        found.append(Words(words, None if codec.placement.fallback.offload else redux))
    return found
