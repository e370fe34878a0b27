"""JPEG segments: no damage in metadata costs the picture, and what says how it looks is found wherever it is."""

import io
import struct

import pytest
from PIL import Image, ImageCms

from flux_core.images import jpeg
from flux_core.images.pictures import as_rgb, parse_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RED = Image.new("RGB", (16, 8), (220, 30, 30))


def encoded(image: Image.Image = RED, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_segment(marker: int, content: bytes, before: bytes = b"") -> bytes:
    """A picture with that segment behind its beginning."""
    whole = encoded()
    return whole[:2] + before + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + whole[2:]


def pixels(data: bytes) -> bytes:
    return as_rgb(parse_picture(data, "p.jpg"), "p.jpg").tobytes()


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xE1, b"Exif"), (0xE1, b"Exif\0\0MM"), (0xE1, jpeg.XMP), (0xE2, b"MPF"),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0"), (0xED, b"Photoshop 3.0\x008BIM\xff"), (0xFE, b"\xff\xd9"),
        (0xEF, b""), (0xE5, b"\xff" * 60_000),
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [b"", b"\xff" * 3])
def test_metadata_changes_no_pixel(marker, content, before, capsys):
    assert pixels(with_segment(marker, content, before)) == pixels(encoded())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"\1", b"\1\2" + SRGB, b"\0\0" + SRGB, b"\2\1" + SRGB, b"\1\1" + SRGB[:90]],
    ids=["empty", "no count", "a part missing", "no part", "another part", "cut off"],  # by itself the profile's date
)
def test_a_damaged_profile_is_told_and_does_not_cost_the_picture(content, capsys):
    assert pixels(with_segment(0xE2, jpeg.PROFILE + content)) == pixels(encoded())
    assert capsys.readouterr().err.startswith("p.jpg: its colour profile is ignored: ")


def test_the_parts_of_a_profile_are_put_in_order():
    halves = [b"\2\2" + SRGB[200:], b"\1\2" + SRGB[:200]]
    data = encoded()
    for half in halves[::-1]:
        content = jpeg.PROFILE + half
        data = data[:2] + struct.pack(">BBH", 0xFF, 0xE2, len(content) + 2) + content + data[2:]
    assert jpeg.info(data)["icc_profile"] == SRGB == jpeg.info(encoded(icc_profile=SRGB))["icc_profile"]


def test_inks_and_several_pictures_stay_what_they_are():
    inks = encoded(Image.new("CMYK", (16, 8), (0, 255, 255, 0)))
    assert parse_picture(inks, "p").mode == "CMYK" and pixels(inks)[:3] == b"\xff\0\0"
    several = encoded(RED, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 8), "blue")])
    assert pixels(several) == pixels(encoded())


def test_half_a_file_ends_the_walk():
    whole = encoded(exif=b"Exif\0\0garbage", icc_profile=SRGB)
    for length in range(2, 400):
        jpeg.info(whole[:length]), jpeg.without_metadata(whole[:length])
    assert jpeg.without_metadata(jpeg.without_metadata(whole)) == jpeg.without_metadata(whole) == encoded()
