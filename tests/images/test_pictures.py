"""Init images: what is taken, what is refused, and what becomes of it (users.md 4c, row 39)."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flux_core.errors import FileError
from flux_core.images.pictures import as_rgb, crop_centre, grid, open_source


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing: what a bomb looks like before it goes off."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def ztxt_bomb() -> bytes:
    data = b"c\0\0" + zlib.compress(b"x" * 20_000_000)
    text = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = png_header(8, 8)
    return whole[:33] + text + whole[33:]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
REFUSED = {
    "bomb of 200 MP": png_header(20_000, 10_000),
    "100 MP": png_header(10_000, 10_000),
    "65 MP": png_header(65_000, 1_000),
    "truncated": encoded(NOISE, "PNG")[:2000],
    "text bomb": ztxt_bomb(),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "ico": encoded(NOISE, "ICO"),
    "ppm": encoded(NOISE, "PPM"),
    "jpeg 2000": encoded(NOISE, "JPEG2000"),
    "float tiff": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
    "damaged gif": encoded(NOISE, "GIF")[:200],
    "damaged tiff": encoded(NOISE, "TIFF")[:3000],
    "html": b"<!doctype html>",
    "empty": b"",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    path = tmp_path / "input.png"
    path.write_bytes(REFUSED[name])
    with pytest.raises(FileError, match=r"input\.png") as caught:
        open_source(path)
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "missing.png", ".", "x" * 300, "nul\0"):
        with pytest.raises(FileError):
            open_source(tmp_path / name)
    with pytest.raises(FileError):
        open_source("/dev/zero")


def test_alpha_is_laid_over_white():
    half = as_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))
    assert half.mode == "RGB" and half.getpixel((0, 0)) == (255, 127, 127)
    assert as_rgb(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert as_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    levels = np.array([[0, 0x0100, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image, _ = open_source(tmp_path / "deep.png")
    assert [image.getpixel((i, 0))[0] for i in range(4)] == [0, 1, 128, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_source(tmp_path / "turned.jpg")[0].size == (20, 40)


def test_other_kinds_become_rgb(tmp_path):
    for mode, name in (("CMYK", "c.jpg"), ("L", "l.png"), ("1", "b.png"), ("P", "p.png")):
        Image.new(mode, (1, 1)).save(tmp_path / name)
        assert open_source(tmp_path / name)[0].mode == "RGB"
    NOISE.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", (64, 64))], lossless=True)
    assert open_source(tmp_path / "moving.webp")[0].tobytes() == NOISE.tobytes()


def test_an_origin_names_the_file_without_its_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    NOISE.save(tmp_path / "secret" / "cat.png")
    _, origin = open_source(tmp_path / "secret" / "cat.png")
    assert origin.file == "cat.png" and len(origin.sha256) == 64
    assert open_source(NOISE)[1].sha256 == open_source(NOISE.copy())[1].sha256


def test_crop_keeps_the_middle():
    image = Image.new("RGB", (32, 16))
    image.putpixel((16, 8), (1, 2, 3))
    assert crop_centre(image, 30, 10).getpixel((15, 5)) == (1, 2, 3)


def test_grid_is_as_square_as_it_gets():
    tiles = [Image.new("RGB", (4, 2), (i, i, i)) for i in range(1, 6)]
    for tile in tiles:
        tile.info["xmp"] = b"mark"
    sheet = grid(tiles)
    assert sheet.size == (12, 4) and sheet.info["xmp"] == b"mark"
    assert [sheet.getpixel((x, y))[0] for y in (0, 2) for x in (0, 4, 8)] == [1, 2, 3, 4, 5, 0]


def test_a_grid_has_room_for_the_largest():
    tiles = [Image.new("RGB", size, colour) for size, colour in (((4, 2), "red"), ((2, 6), "blue"))]
    tiles[0].info["xmp"] = b"mark"
    sheet = grid(tiles)
    assert sheet.size == (8, 6) and sheet.getpixel((5, 5)) == (0, 0, 255) and sheet.getpixel((7, 5)) == (0, 0, 0)
