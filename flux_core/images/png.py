"""PNG chunks: the pixels without what else is in the file, and its texts, each within a limit of our own.

Pillow reads texts and colour profiles when it opens a file, and refuses the whole picture when one of them is long.
So it gets the chunks that make the pixels alone; the others are read here, wherever in the file they are.
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
"""texts that may say how a picture is rotated (the second is ImageMagick's), and what Pillow calls them in its info"""
BITS = {"L;2": 2, "L;4": 4, "I;16": 16, "I;16B": 16}
"""of a level, by what Pillow calls the pixels of a file"""
MAX_TEXT = 8 << 20
"""bytes of one text once it is unpacked; what is longer is cut"""
MAX_TEXTS = 64 << 20
"""of all texts of a file"""
MAX_PROFILE = 16 << 20


def chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Kind, content and the whole of every chunk, up to IEND; the last one may be cut off."""
    view, at, kind = memoryview(data), len(SIGNATURE), b""
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, view[at + 8 : at + 8 + length], view[at : at + 12 + length]
        at += 12 + length


def pixels_alone(data: bytes) -> bytes:
    """The same picture with no chunk but those that make its pixels; of an animation the still picture."""
    return b"".join((data[: len(SIGNATURE)], *(whole for kind, _, whole in chunks(data) if kind in PIXELS)))


def texts(data: bytes) -> dict[str, str]:
    """The texts of a PNG by their keys, cut at MAX_TEXT bytes. What is damaged is left out."""
    found: dict[str, str] = {}
    left = MAX_TEXTS
    for kind, content, whole in chunks(data):
        if kind in TEXTS and _is_whole(whole):
            try:
                key, text = _text(kind, bytes(content), min(left, MAX_TEXT))
            except (ValueError, IndexError, zlib.error):
                continue
            found[key.decode("latin-1")] = text.decode("latin-1" if kind != b"iTXt" else "utf-8", errors="replace")
            left -= len(text)
    return found


def _is_whole(chunk: memoryview) -> bool:
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _text(kind: bytes, content: bytes, limit: int) -> tuple[bytes, bytes]:
    """Key and text of a chunk's content, the text at most so many bytes. ValueError, IndexError, zlib.error."""
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
        raise ValueError("an unknown compression")
    return key, _unpack(text, limit) if packed else text[:limit]


def _unpack(data: bytes, limit: int) -> bytes:
    """At most so many bytes of what was packed, whatever it would grow to. zlib.error."""
    return zlib.decompressobj().decompress(data, limit) if limit > 0 else b""


def info(data: bytes) -> dict[str, Any]:
    """What Pillow's `image.info` would hold of rotation and colours: EXIF, XMP and the profile, damaged or not."""
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
    """The ICC profile of an iCCP chunk; no bytes when it is damaged or longer than any."""
    try:
        profile = _unpack(content.split(b"\0", 1)[1][1:], MAX_PROFILE + 1)
    except (IndexError, zlib.error):
        return b""
    return profile if len(profile) <= MAX_PROFILE else b""


def colour_key(image: Image.Image) -> Image.Image | None:
    """The opacity ("L", 0 or 255) of a grey or RGB picture one of whose colours is clear; None where none is.

    Pillow compares the key with levels of eight bits, whatever the file's are. How many those are it forgets when it
    loads the pixels, which this does.
    """
    key, mode = image.info.get("transparency"), image.mode
    if key is None or not (mode in ("1", "L", "RGB") or mode.startswith("I;16")):
        return None
    levels, bits = _levels(image)
    level = (np.asarray(key) & (2**bits - 1)) * (255 // (2**bits - 1) or 1)
    clear = (levels == level).reshape(image.height, image.width, -1).all(-1)
    return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _levels(image: Image.Image) -> tuple[np.ndarray, int]:
    """The pixels [H, W] or [H, W, 3] as numbers, and the bits of a level in the file."""
    rawmode = image.mode
    if isinstance(image, ImageFile) and image.tile and image.fp:
        rawmode = str(image.tile[0].args)
        if rawmode == "RGB;16B":
            return _deep_levels(image, image.fp), 16
    return np.asarray(image.convert("L") if image.mode == "1" else image), BITS.get(rawmode, 8)


def _deep_levels(image: ImageFile, file: IO[bytes]) -> np.ndarray:
    """The levels [H, W, 3] of an RGB picture with 16 bits, of which Pillow keeps the upper eight."""
    file.seek(0)
    lower = Image.open(file, formats=("PNG",))
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # as if the bytes came in the other order
    lower.load()
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
