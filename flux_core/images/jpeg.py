"""JPEG segments: the pixels without what else is in the file, and what says how they are rotated and coloured.

Pillow looks into EXIF and profiles when it opens a file, and refuses the whole picture when one of them is damaged.
So it gets the segments that make the pixels alone, and the others are read here.
Sources: ITU-T T.81, annex B; Exif 2.32, section 4.7; ICC.1:2022, annex B.4.
"""

import struct
from collections.abc import Iterator
from typing import Any

SIGNATURE = b"\xff\xd8"
WITH_LENGTH = (*range(0xC0, 0xD0), *range(0xDB, 0xFF))
"""markers of segments that may come before the scan"""
METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)
"""APP1 to APP13, APP15 and comments; APP0 (JFIF) and APP14 (Adobe) say how colours are coded"""
EXIF, XMP, PROFILE = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"


def segments(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Marker and the whole of every segment before the scan; then, as marker 0, the rest of the file."""
    view, at = memoryview(data), len(SIGNATURE)
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] in (0xFF, *WITH_LENGTH):
        if data[at + 1] == 0xFF:  # any number of these may come before a marker
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], view[at:end]
        at = end
    yield 0, view[at:]


def without_metadata(data: bytes) -> bytes:
    """The same picture without metadata; of several pictures in a file the first."""
    return b"".join((SIGNATURE, *(whole for marker, whole in segments(data) if marker not in METADATA)))


def info(data: bytes) -> dict[str, Any]:
    """What Pillow's `image.info` would hold of rotation and colours: EXIF, XMP and the profile, damaged or not."""
    contents = [(marker, bytes(whole[4:])) for marker, whole in segments(data) if marker in (0xE1, 0xE2)]
    exif, xmp, profile = (
        [content.removeprefix(start) for marker, content in contents if marker == app and content.startswith(start)]
        for app, start in ((0xE1, EXIF), (0xE1, XMP), (0xE2, PROFILE))
    )
    found: dict[str, Any] = {}
    if exif:
        found["exif"] = EXIF + b"".join(exif)
    if xmp:
        found["xmp"] = xmp[-1]
    if profile:
        found["icc_profile"] = _profile(profile)
    return found


def _profile(parts: list[bytes]) -> bytes:
    """The ICC profile of numbered parts; no bytes when a part is missing."""
    parts = sorted(parts)
    numbers = [tuple(part[:2]) for part in parts]
    whole = numbers == [(number, len(parts)) for number in range(1, len(parts) + 1)]
    return b"".join(part[2:] for part in parts) if whole else b""


def orientation(exif: bytes) -> int:
    """The number for the rotation in the first folder of EXIF, whatever is beside it; 1 where there is none.

    KeyError and struct.error where it cannot be read.
    """
    data = exif.removeprefix(EXIF)
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    (at,) = struct.unpack_from(f"{order}4xI", data)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if tag == 0x0112:
            return int(struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], data, entry + 8)[0])
    return 1
