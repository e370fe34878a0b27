"""Colour profiles, rotation and odd pixels of an init image, in every kind of file that holds them."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from flux_core.errors import FileError
from flux_core.images.pictures import FORMATS, as_rgb, parse_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RED, GREEN = (220, 30, 30), (30, 220, 30)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes, name: str = "p") -> Image.Image:
    return as_rgb(parse_picture(data, name), name)


def close(pixel, other, apart: int = 4) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, other, strict=True)) <= apart


# --- profiles


def swapped() -> bytes:
    """sRGB with red and green exchanged, under sRGB's own name."""
    data, count = bytearray(SRGB), struct.unpack_from(">I", SRGB, 128)[0]
    at = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = at[b"rXYZ"], at[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile for an input of that space, with these tags. Source: ICC.1:2001-04."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)} | tags
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    kinds = b"prtr" + space + b"Lab " if space == b"CMYK" else b"scnr" + space + b"XYZ "
    header = struct.pack(">I4sI", start + len(body), b"\0\0\0\0", 0x02400000) + kinds + b"\0" * 12 + b"acsp"
    header += b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061) + b"\0" * 48
    return header + struct.pack(">I", len(tags)) + table + body


def grey_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return profile(b"GRAY", {b"kTRC": curve})


def ink_profile() -> bytes:
    """CMYK in which cyan prints red, and all else nothing."""
    white, red = bytes([255, 128, 128]), bytes([136, 208, 195])
    identity = bytes(range(256))
    grid = b"".join(red if i & 8 else white for i in range(16))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * identity + grid + 3 * identity
    return profile(b"CMYK", {b"A2B0": lut})


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("GIF", "BMP")])
def test_a_profile_says_what_colours_are(kind):
    exact = {"lossless": True} if kind == "WebP" else {}
    red = Image.new("RGB", (16, 16), RED)
    assert close(opened(encoded(red, kind.upper(), icc_profile=swapped(), **exact)).getpixel((8, 8)), GREEN)
    assert close(opened(encoded(red, kind.upper(), **exact)).getpixel((8, 8)), RED)


@pytest.mark.parametrize("mode", ["RGBA", "P", "PA", "RGBX", "YCbCr"])
def test_a_profile_holds_for_every_kind_of_rgb(mode):
    image = Image.new("RGB", (4, 4), RED).convert(mode if mode != "PA" else "P").convert(mode)
    image.info["icc_profile"] = swapped()
    assert close(as_rgb(image).getpixel((1, 1)), GREEN, 40)  # a palette has not every colour


def test_premultiplied_grey_is_laid_over_white():
    half = Image.new("LA", (2, 2), (100, 128)).convert("La")
    assert close(as_rgb(half).getpixel((0, 0)), (177, 177, 177), 2)


def test_alpha_is_laid_over_white_behind_the_profile():
    image = Image.new("RGBA", (2, 1), (*RED, 0))
    image.putpixel((1, 0), (*RED, 255))
    found = opened(encoded(image, "PNG", icc_profile=swapped()))
    assert found.getpixel((0, 0)) == (255, 255, 255) and close(found.getpixel((1, 0)), GREEN)


def test_pictures_in_srgb_keep_their_pixels(capsys):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert opened(encoded(noise, "PNG", icc_profile=SRGB)).tobytes() == noise.tobytes()
    assert capsys.readouterr().err == ""


def test_grey_has_profiles_of_its_own(capsys):
    grey = Image.new("L", (4, 4), 128)
    dark, light = (opened(encoded(grey, "PNG", icc_profile=grey_profile(g))).getpixel((0, 0)) for g in (3.5, 1.0))
    assert dark[0] < 110 and light[0] > 180 and len(set(dark)) == 1
    alpha = Image.merge("LA", (grey, Image.new("L", (4, 4), 255)))
    deep = Image.fromarray(np.full((4, 4), 128 << 8, dtype=np.uint16))
    for image in (alpha, deep):
        assert opened(encoded(image, "PNG", icc_profile=grey_profile(1.0))).getpixel((0, 0)) == light
    assert close(opened(encoded(grey, "PNG", icc_profile=swapped())).getpixel((0, 0)), (128, 128, 128), 40)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_what_their_profile_says(kind):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    r, g, b = opened(encoded(cyan, kind, icc_profile=ink_profile())).getpixel((8, 8))
    assert r > 100 and max(g, b) < 20
    r, g, b = opened(encoded(cyan, kind)).getpixel((8, 8))
    assert r < 20 and min(g, b) > 235


@pytest.mark.parametrize("given", [None, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_lab_becomes_rgb(given):
    lab = Image.new("LAB", (4, 4), (112, 192, 175))
    options = {"icc_profile": given} if given else {}
    assert close(opened(encoded(lab, "TIFF", **options)).getpixel((0, 0)), (200, 28, 30))


@pytest.mark.parametrize(
    "given", [b"", b"garbage", SRGB[:200], SRGB[:-40], b"\0" * 1000, grey_profile(2), ink_profile()]
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_profile_that_cannot_be_used_is_ignored_and_told(given, kind, capsys):
    image = Image.new("RGB", (4, 4), RED)
    image.info["icc_profile"] = given
    assert as_rgb(image, "p.png").getpixel((0, 0)) == RED
    err = capsys.readouterr().err
    assert err.startswith("p.png: its colour profile is ignored") and err.count("\n") == 1
    if given:
        assert opened(encoded(Image.new("RGB", (4, 4), RED), kind, icc_profile=given)).getpixel((0, 0)) == RED


# --- rotation

WIDE = Image.new("RGB", (40, 20), RED)
WIDE.paste(GREEN, (0, 0, 10, 20))
ORIENTATION = 0x0112


def exif(*entries: tuple[int, int, int, bytes], order: str = "<", next_at: int = 0) -> bytes:
    """EXIF of entries (tag, type, count, four bytes). Source: TIFF 6.0, section 2."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    rows = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, len(entries)) + rows + struct.pack(f"{order}I", next_at)


def turned(value: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return ORIENTATION, 3, 1, struct.pack(f"{order}HH", value, 0)


ODD = {
    "none": (),
    "a signed rational": ((0x0103, 10, 1, struct.pack("<I", 0)),),
    "a text for a resolution": ((0x011A, 2, 4, b"abc\0"),),
    "beyond the end": ((0x010F, 2, 1 << 20, struct.pack("<I", 1 << 20)),),
    "an unknown type": ((0x0131, 99, 1, b"\0\0\0\0"),),
    "a folder that is no folder": ((0x8769, 4, 1, struct.pack("<I", 1 << 30)),),
    "a folder of itself": ((0x8769, 4, 1, struct.pack("<I", 8)),),
    "GPS of bytes": ((0x8825, 7, 4, b"\xff\xff\xff\xff"),),
    "a count of nothing": ((0x010E, 2, 0, b"\0\0\0\0"),),
}
KINDS = [kind for kind in ("JPEG", "PNG", "WebP") if kind in FORMATS]


def with_exif(kind: str, data: bytes) -> bytes:
    """A picture with these EXIF bytes as they are."""
    return encoded(WIDE, kind.upper(), exif=data, **({"lossless": True} if kind == "WebP" else {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("value", [6, 7, 3, 1])
def test_a_rotation_is_read_whatever_is_beside_it(kind, odd, value):
    image = opened(with_exif(kind, exif(turned(value), *ODD[odd])))
    green = {1: (2, 10), 3: (37, 10), 6: (10, 2), 7: (10, 37)}[value]
    assert image.size == ((20, 40) if value > 4 else (40, 20)) and close(image.getpixel(green), GREEN, 30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [
    b"", b"Exif\0\0", b"Exif\0\0garbage", exif(turned(6))[:12], exif(turned(6))[:18],
    exif((ORIENTATION, 2, 2, b"6\0\0\0")), exif((ORIENTATION, 5, 1, b"\xff\xff\0\0")), exif(turned(0)), exif(turned(9)),
    exif((ORIENTATION, 12, 1, b"\0\0\0\0")), exif((ORIENTATION, 3, 0, b"\0" * 4)),
])  # fmt: skip
def test_damaged_exif_rotates_nothing(kind, data):
    assert opened(with_exif(kind, data)).size == (40, 20)


LOST = {
    "a value that is cut off": exif((0x0117, 4, 3, b"\xff\0\0\0"), turned(6)),
    "an empty value that is cut off": exif((0x0110, 11, 3, b"\xff\xff\0\0"), turned(6)),
    "a resolution without numbers": exif((0x011A, 7, 1, b"\0" * 4), (0x0128, 3, 1, b"\2\0\0\0"), turned(6)),
    "a long number": exif((ORIENTATION, 4, 1, b"\6\0\0\0"), (0x0117, 4, 3, b"\xff\0\0\0")),
}
"""EXIF over which Pillow gives up, before it is at the rotation"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", LOST)
def test_a_rotation_is_read_by_itself(kind, what):
    plain = Image.new("RGB", (40, 20), RED)
    data = encoded(plain, kind.upper(), exif=LOST[what])
    data = data.replace(b"JFIF\0\1\1\1", b"JFIF\0\1\1\0")  # no resolution there, so that Pillow looks into EXIF
    assert opened(data).size == (20, 40)


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_orders_of_bytes_are_read(order):
    assert opened(with_exif("JPEG", exif(turned(6, order), order=order))).size == (20, 40)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_any_exif_opens(noise, begun):
    data = exif(turned(6), turned(1))[:14] + noise if begun else b"Exif\0\0" + noise
    for kind in KINDS:
        assert opened(with_exif(kind, data)).size in ((40, 20), (20, 40))


@pytest.mark.parametrize("form", ['tiff:Orientation="6"', "<tiff:Orientation>6</tiff:Orientation>"])
def test_xmp_rotates_where_exif_does_not(form):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", f"<x {form}/>")
    assert opened(encoded(WIDE, "PNG", pnginfo=chunks)).size == (20, 40)
    assert opened(encoded(WIDE, "PNG", pnginfo=chunks, exif=exif(turned(3)))).size == (40, 20)
    if features.check("webp"):
        assert opened(encoded(WIDE, "WEBP", xmp=f"<x {form}/>".encode())).size == (20, 40)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_turned_once(compression):
    data = encoded(WIDE, "TIFF", tiffinfo={ORIENTATION: 6}, compression=compression)
    assert opened(data).size == (20, 40)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind == "AVIF"])
def test_an_avif_is_turned_once(kind):
    assert opened(encoded(WIDE, kind, exif=exif(turned(6)))).size == (20, 40)


# --- files


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_of_the_table_is_read(kind):
    if kind == "JPEG":
        assert close(opened(encoded(WIDE, kind)).getpixel((30, 10)), RED, 6)
    else:
        options = {"WebP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
        assert close(opened(encoded(WIDE, kind.upper(), **options)).getpixel((30, 10)), RED)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("JPEG", "BMP")])
def test_the_first_frame_counts(kind):
    data = encoded(WIDE, kind.upper(), save_all=True, append_images=[Image.new("RGB", (40, 20), "blue")])
    assert close(opened(data).getpixel((30, 10)), RED, 8)


def test_clear_pixels_of_a_gif_are_white():
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([0, 0, 0, 9, 9, 9])
    clear.putpixel((1, 1), 1)
    found = opened(encoded(clear, "GIF", transparency=0))
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (9, 9, 9)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "JPEG2000", "PCX", "SGI"])
def test_no_other_kind_is_opened_and_the_error_names_those_that_are(kind):
    with pytest.raises(FileError) as caught:
        opened(encoded(WIDE, kind), "cat.jpg")
    text = str(caught.value)
    assert text.startswith("cat.jpg is no picture that can be read: give a PNG, JPEG") and " or " in text


def grey_tiff(levels: bytes, bits: int, white_is_zero: bool = False, signed: bool = False) -> bytes:
    """A TIFF of one row of grey. Source: TIFF 6.0, sections 3 and 4."""
    tags = {256: len(levels) * 8 // bits, 257: 1, 258: bits, 259: 1, 262: not white_is_zero, 273: 134, 277: 1, 278: 1}
    tags |= {279: len(levels), 339: 1 + signed}
    rows = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + b"\0" * 4 + levels


def test_sixteen_bits_may_count_down_from_white():
    levels = struct.pack("<2H", 0x4000, 0xFFFF)
    assert [opened(grey_tiff(levels, 16)).getpixel((x, 0))[0] for x in (0, 1)] == [0x40, 0xFF]
    assert [opened(grey_tiff(levels, 16, True)).getpixel((x, 0))[0] for x in (0, 1)] == [0xBF, 0]


def test_a_picture_without_pixels_is_refused():
    for mode in ("RGB", "LA", "I;16"):
        with pytest.raises(FileError, match="the picture has no pixels"):
            as_rgb(Image.new(mode, (0, 5)))


def test_levels_without_a_range_are_refused():
    for data in (grey_tiff(struct.pack("<I", 1 << 31), 32), grey_tiff(struct.pack("<h", -9), 16, signed=True)):
        with pytest.raises(FileError, match="or below zero"):
            opened(data)
    with pytest.raises(FileError, match="32 bits, or below zero: save it with 8 or 16"):
        opened(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(FileError, match="32 bits"):
        opened(encoded(Image.new("I", (2, 2), 1 << 20), "TIFF"))
    assert opened(encoded(Image.new("I", (2, 2), 0x8000), "TIFF")).getpixel((0, 0)) == (128, 128, 128)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([kind for kind in FORMATS if kind != "AVIF"]), st.data())
def test_damage_of_any_kind_is_a_file_error(kind, data):
    whole = bytearray(encoded(WIDE, kind.upper()))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert opened(bytes(whole)).mode == "RGB"
    except FileError as error:
        assert "\n" not in str(error)
