"""Pictures that clients send, as what the model takes: to start from, to paint in, a map's photograph, references."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps

from ..errors import UsageError
from ..images.given import Given, as_taken
from ..images.masks import grey_mask, is_opaque
from ..images.pictures import layers, parse_picture
from ..variants import get_variant

UPLOADED = ("PNG", "JPEG", "WebP")
"""formats that clients may send"""


def decoded(texts: object, key: str) -> list[bytes]:
    """The bytes of pictures in base64, as they are or as data URLs: of a list of one. UsageError."""
    if texts is None:
        return []
    if not isinstance(texts, list) or len(texts) != 1 or not isinstance(texts[0], str):
        raise UsageError(f"{key} must be a list of one picture in base64")
    try:
        return [base64.b64decode(texts[0].rpartition("base64,")[2], validate=True)]
    except (binascii.Error, ValueError):
        raise UsageError(f"{key} holds no base64") from None


def given_of(
    model: str, images: Sequence[bytes], mask: bytes | None = None, inverted: bool = False
) -> tuple[Given, dict[str, Any]]:
    """The pictures and their records, without names, as the model takes them. inverted: black is painted.

    UsageError, FileError.
    """
    pictures = [parse_picture(data, "the picture", UPLOADED) for data in images]
    return as_taken(get_variant(model), pictures, None if mask is None else _mask(mask, inverted))


def _mask(data: bytes, inverted: bool) -> Image.Image:
    grey = grey_mask(parse_picture(data, "the mask", UPLOADED))
    return ImageOps.invert(grey) if inverted else grey


def is_transparent(mask: bytes) -> bool:
    """Whether something of a mask is transparent. FileError."""
    _, opacity = layers(parse_picture(mask, "the mask", UPLOADED), "the mask")
    return opacity is not None and not is_opaque(opacity)


def transparent(mask: bytes | None) -> bytes | None:
    """The mask, if it is what OpenAI's clients send: transparent where it is painted. UsageError, FileError."""
    if mask is not None and not is_transparent(mask):
        raise UsageError("the mask has no transparency: what is to be painted must be transparent in it")
    return mask
