"""Encoded pictures on the disk: a safetensors file for each picture, with the latents of each of its cuts.

A file is named by a hash of all that latents depend on: the picture's bytes, how it is cut, and what encodes. So it is
never wrong, and a changed setting makes another file; nothing is deleted here. It appears whole or not at all, so a run
that was killed goes on with what is there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..checkpoint.write import write_safetensors
from ..errors import FileError, NonFiniteError
from ..files import disk_errors
from ..images.pictures import as_rgb, open_picture
from ..sampling import unpack
from ..terminal import note
from .data import Picture
from .masks import cut_mask, open_mask
from .seen import seen_of
from .sizes import Cut, apply

if TYPE_CHECKING:
    from ..pipeline.codec import Codec

FORMAT = 1
DIGEST, SEEN, MASK = "sha256", "seen", "mask"
"""names of tensors beside the latents' numbers; the last two behind such a number"""
Encode = Callable[[Image.Image], Tensor]
"""latents [16, H/8, W/8] of an RGB picture of H x W pixels, multiples of 16, shifted and scaled for the transformer"""


def encoding(codec: "Codec") -> Encode:
    """What encodes a training picture by a codec."""

    def encode(image: Image.Image) -> Tensor:
        return unpack(codec.encode(image, image.width, image.height), image.height, image.width)[0]

    return encode


class LatentCache:
    """The latents of pictures, in a folder."""

    def __init__(
        self,
        folder: Path,
        autoencoder: str,
        cuts: Mapping[Picture, Sequence[Cut]],
        takes: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        """autoencoder: what encodes, as text: the hash of its file, its dtype, the device. cuts: of each picture.

        takes: what a model learns to see beside them, a name in `seen.WAYS`. device: where maps are made.
        """
        self.folder, self.autoencoder, self.cuts, self.takes = folder, autoencoder, cuts, takes
        self.device = device

    def path(self, picture: Picture) -> Path:
        """The file of a picture."""
        told = {
            "format": FORMAT,
            "picture": picture.sha256,
            "cuts": self.cuts[picture],
            "autoencoder": self.autoencoder,
        }
        if self.takes:
            told |= {"takes": self.takes, "beside": [sha256 for _, sha256 in picture.beside]}
        if picture.mask is not None:
            file, digest = picture.mask
            told["mask"] = "alpha" if file == picture.path else digest
        return self.folder / f"{sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}.safetensors"

    def missing(self) -> list[Picture]:
        """The pictures to encode. All files are read; a damaged one is told, and its picture is among them."""
        return [picture for picture in self.cuts if not self._is_there(picture)]

    @torch.inference_mode()
    def add(self, picture: Picture, encode: Encode) -> None:
        """Encode all cuts of a picture, and write its file.

        FileError for a picture that is not what it was, or damaged, NonFiniteError, DiskError.
        """
        opened, found = open_picture(picture.path)
        if found != picture.sha256:
            raise FileError(f"{picture.path} was changed since it was found. Next: start again")
        image, state = as_rgb(opened, str(picture.path)), {}
        mask = _mask_of(picture)
        for number, cut in enumerate(self.cuts[picture]):
            part = apply(cut, image)
            state[str(number)] = encode(part).cpu()
            if self.takes:
                seen = [encode(one) for one in seen_of(self.takes, picture, cut, part, self.device)]
                state[f"{number}.{SEEN}"] = torch.stack(seen).cpu()
            if mask is not None:
                state[f"{number}.{MASK}"] = cut_mask(cut, mask)
        if not all(x.isfinite().all() for x in state.values()):
            raise NonFiniteError(f"the latents of {picture.path} are not finite. Next: encode it in another dtype")
        with disk_errors(self.folder, "folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(self.path(picture), state | {DIGEST: _digest(state)})

    def seen(self, picture: Picture, number: int) -> Tensor:
        """The latents [N, 16, H/8, W/8] of what is seen beside a picture's cut. FileError likewise."""
        return self.get(picture, f"{number}.{SEEN}")

    def mask(self, picture: Picture, number: int) -> Tensor:
        """The mask [H/8, W/8] of a picture's cut, 0..1. FileError likewise."""
        return self.get(picture, f"{number}.{MASK}")

    def get(self, picture: Picture, number: int | str) -> Tensor:
        """The latents [16, H/8, W/8] of a picture's cut, on the CPU. FileError for a file that is damaged or gone."""
        path = self.path(picture)
        try:
            state = load(path.read_bytes())
            digest = state.pop(DIGEST)
            x = state[str(number)]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise FileError(f"{path} could not be read: {error}. Next: start again, and it is made again") from None
        if not torch.equal(digest, _digest(state)):
            raise FileError(f"{path} is damaged. Next: start again, and it is made again")
        return x.clone()  # in memory of its own, aligned as any other

    def _is_there(self, picture: Picture) -> bool:
        """Whether a picture's file is there and whole. A damaged one is told."""
        if not (path := self.path(picture)).exists():
            return False
        try:
            self.get(picture, 0)
        except FileError:
            note(f"{path} is damaged, or could not be read: {picture.path.name} is encoded again")
            return False
        return True


def _mask_of(picture: Picture) -> Image.Image | None:
    """A picture's mask; None without one. FileError for one that is not what it was."""
    if picture.mask is None:
        return None
    path, known = picture.mask
    mask, found = open_mask(path, alpha=path == picture.path)
    if found != known:
        raise FileError(f"{path} was changed since it was found. Next: start again")
    return mask


def _digest(state: Mapping[str, Tensor]) -> Tensor:
    """The SHA-256 of the bytes of all latents, uint8 [32]."""
    whole = sha256()
    for name in sorted(state, key=lambda name: (len(name), name)):
        whole.update(state[name].contiguous().view(torch.uint8).numpy().data)
    return torch.tensor(list(whole.digest()), dtype=torch.uint8, device="cpu")
