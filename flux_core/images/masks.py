"""Where a picture is painted anew: masks, what a picture is extended by, and putting the result back.

White is painted, black is kept, grey is kept in part; every pixel whose mask is black is the source's own in the end.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from PIL import Image, ImageOps

from ..errors import UsageError
from ..request.fields import FIT
from ..request.generation import GenerationRequest
from ..request.pictures import InitImage
from .pictures import fitted, layers, open_recorded, resampling

BLUR, FADES = 6, 0.02
"""pixels around which a step of tone is measured, and the share of kept pixels there below which it is not mended"""
STEP = 16
"""levels from which kept pixels differ by more than tone: what is painted reaches a little over its border"""
ALMOST_ALL = 0.9
"""share of a picture from which a mask may be inverted"""


def open_mask(mask: str | Path | Image.Image, image: Image.Image | None) -> tuple[Image.Image, InitImage]:
    """A mask in mode L, and its record. UsageError if it is not of the image's size, or paints nothing. FileError.

    A mask with transparency is painted where it is transparent, as OpenAI's programs send it.
    """
    opened, record = (mask, _record(mask)) if isinstance(mask, Image.Image) else open_recorded(mask)
    name = record.file or "the mask"
    grey = grey_mask(opened, name)
    if image is not None and grey.size != image.size:
        found, wanted = ("{}x{}".format(*x.size) for x in (grey, image))
        raise UsageError(f"{name} has {found} pixels, the picture {wanted}. Next: give a mask of the picture's size")
    if not grey.getbbox():
        raise UsageError(f"{name} is black everywhere: nothing would be painted. Next: make white what should be")
    return grey, record


def grey_mask(mask: Image.Image, name: str = "the mask") -> Image.Image:
    """A mask in mode L, upright: its brightness, or how transparent it is where that is not nowhere. FileError."""
    rgb, opacity = layers(mask, name)
    return rgb.convert("L") if opacity is None or is_opaque(opacity) else ImageOps.invert(opacity)


def is_opaque(opacity: Image.Image) -> bool:
    """Whether nothing is transparent, of an opacity as `pictures.layers` gives it."""
    return opacity.getextrema() == (255, 255)


def _record(mask: Image.Image) -> InitImage:
    return InitImage(file="", sha256=hashlib.sha256(mask.tobytes()).hexdigest())


def mask_note(mask: Image.Image) -> str | None:
    """A line for the user on a mask that paints nearly everything; None for others."""
    share = float(np.asarray(mask).mean()) / 255
    if share == 1:
        return "the mask is white everywhere: nothing of the picture is kept"
    if share > ALMOST_ALL:
        return f"the mask paints {share:.0%} of the picture: white is painted, black is kept. Is it inverted?"
    return None


def extended(image: Image.Image, pad: tuple[int, int, int, int]) -> Image.Image:
    """The picture with its border repeated outwards: pixels on its left, top, right and bottom."""
    left, top, right, bottom = pad
    sides = ((top, bottom), (left, right), (0, 0))[: 2 if image.mode == "L" else 3]
    return Image.fromarray(np.pad(np.asarray(image), sides, mode="edge"))


class Canvas(NamedTuple):
    """A picture to paint in, as large as it is drawn, and how the result goes back."""

    image: Image.Image
    """as large as the model draws: a request's `padded_size`"""
    mask: Image.Image
    whole: Image.Image
    """what the result goes back into"""
    where: Image.Image
    """the mask of the whole"""
    box: tuple[int, int, int, int]
    """what of the whole is drawn"""

    @classmethod
    def of(cls, request: GenerationRequest, image: Image.Image, mask: Image.Image | None) -> Self:
        """Of a request's picture and mask."""
        if request.pad:
            image, mask = extended(image, request.pad), _extended_mask(image, mask, request.pad)
        assert mask is not None
        size = request.width, request.height
        if request.mask_padding is None:
            image, mask = (_as_large(x, size, request) for x in (image, mask))
            box = (0, 0, *size)
        else:
            box = region(mask, request.mask_padding, size)
        drawn, masked = (_to_16(_cut(x, box, size), request) for x in (image, mask))
        return cls(drawn, masked, image, mask, box)

    def part_of(self, picture: Image.Image) -> Image.Image:
        """What is drawn, of another picture of the whole; all of it, as it is, where the whole is drawn."""
        if self.box == (0, 0, *self.whole.size):
            return picture
        return picture.resize(self.whole.size, Image.Resampling.LANCZOS).crop(self.box)

    def finished(self, drawn: Image.Image) -> Image.Image:
        """The whole picture with what was drawn, where the mask is not black."""
        left, top, right, bottom = self.box
        size, whole = (right - left, bottom - top), self.whole.copy()
        drawn = drawn if drawn.size == size else drawn.resize(size, Image.Resampling.LANCZOS)
        whole.paste(without_step(drawn, self.whole.crop(self.box), self.where.crop(self.box)), (left, top))
        return whole


def without_step(drawn: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """What was drawn, with the source's own pixels where the mask is black, and without a step of tone between them.

    The autoencoder gives back what is kept a little darker or lighter than it is. By how much near the border, on
    average, is added to what was painted beside it, and fades inwards.
    """
    x, own = (np.asarray(image, dtype=np.float32) for image in (drawn, source))
    kept = np.asarray(mask) == 0
    alike = kept & (np.abs(own - x).max(-1) < STEP)
    near = _blurred(np.dstack([(own - x) * alike[..., None], alike]))
    mended = x + near[..., :3] / (near[..., 3:] + FADES)
    return Image.fromarray(np.where(kept[..., None], own, mended).round().clip(0, 255).astype(np.uint8))


def _blurred(x: np.ndarray) -> np.ndarray:
    """About a Gaussian of BLUR pixels: three means of a window along each side. [H, W, C]"""
    for _ in range(3):
        for axis in (0, 1):
            x = np.moveaxis(_means(np.moveaxis(x, axis, 0)), 0, axis)
    return x


def _means(x: np.ndarray) -> np.ndarray:
    """Of the 2 BLUR + 1 rows around each row; the first and the last are repeated outwards."""
    wide = np.pad(x.astype(np.float64), [(BLUR + 1, BLUR)] + [(0, 0)] * (x.ndim - 1), mode="edge")
    sums = np.cumsum(wide, axis=0)
    return (sums[2 * BLUR + 1 :] - sums[: -2 * BLUR - 1]) / (2 * BLUR + 1)


def region(mask: Image.Image, padding: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box around what a mask paints, `padding` pixels wider on each side, of the shape of `size` where it fits.

    Where it does not, there is less padding, before what is drawn is stretched.
    """
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    width, height = right - left + 2 * padding, bottom - top + 2 * padding
    ratio = size[0] / size[1]
    width, height = max(width, round(height * ratio)), max(height, round(width / ratio))
    share = min(1, mask.width / width, mask.height / height)
    width, height = max(right - left, round(width * share)), max(bottom - top, round(height * share))
    x = min(max(0, (left + right - width) // 2), mask.width - width)
    y = min(max(0, (top + bottom - height) // 2), mask.height - height)
    return x, y, x + width, y + height


def _extended_mask(image: Image.Image, mask: Image.Image | None, pad: tuple[int, int, int, int]) -> Image.Image:
    """White where the picture is extended."""
    left, top, right, bottom = pad
    whole = Image.new("L", (image.width + left + right, image.height + top + bottom), 255)
    whole.paste(mask or Image.new("L", image.size, 0), (left, top))
    return whole


def _as_large(image: Image.Image, size: tuple[int, int], request: GenerationRequest) -> Image.Image:
    """Fitted to a size, in its own mode."""
    return image if image.size == size else fitted(image, *size, request.fit or FIT).convert(image.mode)


def _cut(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """A part of a picture, resized where it has another size."""
    part = image.crop(box)
    return part if part.size == size else part.resize(size, resampling(part))


def _to_16(image: Image.Image, request: GenerationRequest) -> Image.Image:
    """Extended to what the model draws, from which the picture is cropped in the end."""
    width, height = request.padded_size[0] - image.width, request.padded_size[1] - image.height
    pad = width // 2, height // 2, width - width // 2, height - height // 2
    return extended(image, pad) if any(pad) else image
