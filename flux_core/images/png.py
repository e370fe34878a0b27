"""PNG chunks: a file without its metadata, and its texts, profile and EXIF, each up to a limit of our own.

Pillow reads texts and colour profiles when it opens a file, and refuses the whole picture when one of them is long.
So Pillow gets only the chunks that define the pixels; the others are read here, anywhere in the file.
Source: PNG (third edition), sections 5 and 11.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
XMP, RAW_EXIF = "XML:com.adobe.xmp", "Raw profile type exif"
KEYS = {XMP: "xmp", RAW_EXIF: RAW_EXIF}
"""keywords of texts that may hold the orientation (the second is ImageMagick's) -> keys of Pillow's `image.info`"""
BITS = {"L;2": 2, "L;4": 4, "I;16": 16, "I;16B": 16}
"""Pillow's raw mode -> bits of a level, where these are not 8"""
MAX_TEXT = 8 << 20
"""bytes of a text after decompression; a longer text is cut"""
MAX_TEXTS = 64 << 20
"""bytes of all texts of a file together"""
MAX_PROFILE = 16 << 20


def chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Type, data and all bytes of each chunk, up to IEND; the last chunk may be cut off."""
    view, at, kind = memoryview(data), len(SIGNATURE), b""
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, view[at + 8 : at + 8 + length], view[at : at + 12 + length]
        at += 12 + length


def without_metadata(data: bytes) -> bytes:
    """The file with only the chunks that define the pixels; of an animation, the still picture."""
    return b"".join((data[: len(SIGNATURE)], *(whole for kind, _, whole in chunks(data) if kind in PIXELS)))


def texts(data: bytes) -> dict[str, str]:
    """The texts of a PNG: keyword -> text, cut at MAX_TEXT bytes. Damaged chunks are skipped."""
    found: dict[str, str] = {}
    left = MAX_TEXTS
    for kind, content, whole in chunks(data):
        if kind in TEXTS and _is_intact(whole):
            try:
                key, text = _text(kind, bytes(content), min(left, MAX_TEXT))
            except (ValueError, IndexError, zlib.error):
                continue
            found[key.decode("latin-1")] = text.decode("latin-1" if kind != b"iTXt" else "utf-8", errors="replace")
            left -= len(text)
    return found


def _is_intact(chunk: memoryview) -> bool:
    """Whether a chunk is complete and its CRC is right."""
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _text(kind: bytes, content: bytes, limit: int) -> tuple[bytes, bytes]:
    """Keyword and text in a chunk's data, the text cut at `limit` bytes. ValueError, IndexError, zlib.error."""
    key, rest = content.split(b"\0", 1)
    packed = kind == b"zTXt"
    if packed:
        method, text = rest[0], rest[1:]
    elif kind == b"iTXt":
        packed, method = bool(rest[0]), rest[1]
        _language, _translated, text = rest[2:].split(b"\0", 2)
    else:
        text = rest
    if packed and method != 0:
        raise ValueError("unknown compression method")
    return key, _unpack(text, limit) if packed else text[:limit]


def _unpack(data: bytes, limit: int) -> bytes:
    """The first `limit` bytes of compressed data; the rest is not decompressed. zlib.error."""
    return zlib.decompressobj().decompress(data, limit) if limit > 0 else b""


def info(data: bytes) -> dict[str, Any]:
    """EXIF, XMP and ICC profile under their keys in Pillow's `image.info`, damaged or not."""
    found: dict[str, Any] = {}
    for key, text in texts(data).items():
        if key in KEYS:
            found[KEYS[key]] = text.encode() if key == XMP else text
    for kind, content, _ in chunks(data):
        if kind == b"eXIf":
            found["exif"] = b"Exif\0\0" + content
        elif kind == b"iCCP":
            found["icc_profile"] = _profile(bytes(content))
    return found


def _profile(content: bytes) -> bytes:
    """The ICC profile in an iCCP chunk; empty when it is damaged or longer than MAX_PROFILE."""
    try:
        profile = _unpack(content.split(b"\0", 1)[1][1:], MAX_PROFILE + 1)
    except (IndexError, zlib.error):
        return b""
    return profile if len(profile) <= MAX_PROFILE else b""


def colour_key(image: Image.Image) -> Image.Image | None:
    """The opacity (mode L, 0 or 255) of a grey or RGB picture with a transparent colour (tRNS); None without it.

    Pillow compares the colour with levels of 8 bits, whatever the bits of a level in the file. It forgets that number
    when it loads the pixels, which this function does.
    """
    key, mode = image.info.get("transparency"), image.mode
    if key is None or not (mode in ("1", "L", "RGB") or mode.startswith("I;16")):
        return None
    levels, bits = _levels(image)
    level = (np.asarray(key) & (2**bits - 1)) * (255 // (2**bits - 1) or 1)
    clear = (levels == level).reshape(image.height, image.width, -1).all(-1)
    return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _levels(image: Image.Image) -> tuple[np.ndarray, int]:
    """The levels [H, W] or [H, W, 3] as in the file, and the bits of a level."""
    rawmode = image.mode
    if isinstance(image, ImageFile) and image.tile and image.fp:
        rawmode = str(image.tile[0].args)
        if rawmode == "RGB;16B":
            return _levels_16(image, image.fp), 16
    return np.asarray(image.convert("L") if image.mode == "1" else image), BITS.get(rawmode, 8)


def _levels_16(image: ImageFile, file: IO[bytes]) -> np.ndarray:
    """The 16-bit levels [H, W, 3] of an RGB picture, of which Pillow keeps the upper eight bits."""
    file.seek(0)
    lower = Image.open(file, formats=("PNG",))
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # bytes swapped: Pillow keeps the lower eight bits
    lower.load()
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
