"""PNG chunks: long and late texts, colour keys of every depth, and files that are made to hurt."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from flux_core.commands.info import info
from flux_core.errors import FileError
from flux_core.images import png
from flux_core.images.metadata import KEY, describe, png_bytes, read_request, read_texts
from flux_core.images.pictures import as_rgb, open_source, parse_picture
from flux_core.request.generation import GenerationRequest
from flux_core.session.record import row_of

GREY, RGB, PALETTE = 0, 2, 3
RED = (200, 30, 30)


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def plain(before: bytes = b"", after: bytes = b"") -> bytes:
    """Four red pixels, with chunks before and behind them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, RGB, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(2 * (b"\0" + 2 * bytes(RED))))
    return png.SIGNATURE + header + before + pixels + after + chunk(b"IEND", b"")


def itxt(key: str, text: bytes, packed: bool = False) -> bytes:
    data = zlib.compress(text) if packed else text
    return chunk(b"iTXt", key.encode() + b"\0" + bytes([packed, 0]) + b"\0\0" + data)


def ztxt(key: str, text: bytes) -> bytes:
    return chunk(b"zTXt", key.encode() + b"\0\0" + zlib.compress(text))


LONG = b"x" * (png.MAX_TEXT + 1000)


@pytest.mark.parametrize("extra", [
    itxt("workflow", LONG), itxt("workflow", LONG, packed=True), ztxt("workflow", LONG),
    chunk(b"tEXt", b"workflow\0" + LONG), b"".join(ztxt(f"k{i}", LONG) for i in range(20)),
    chunk(b"iCCP", b"long\0\0" + zlib.compress(b"\0" * (png.MAX_PROFILE + 1))),
    chunk(b"iCCP", b"raw\0\0garbage"), chunk(b"iCCP", b"no end"), chunk(b"iCCP", b"odd\0\x07" + zlib.compress(b"x")),
    chunk(b"tEXt", b""), chunk(b"tEXt", b"no text"), chunk(b"zTXt", b"k\0\x07xyz"), chunk(b"zTXt", b"k\0"),
    chunk(b"iTXt", b"k\0"), chunk(b"iTXt", b"k\0\1\0\0\0no zlib"), chunk(b"iTXt", b"k\0\0\0\0\0\xff\xfe"),
    chunk(b"tEXt", b"transparency\0no"), chunk(b"tEXt", b"icc_profile\0no"), chunk(b"tEXt", b"exif\0no"),
    chunk(b"eXIf", b"garbage"), chunk(b"zzZz", b"?"), chunk(b"tEXt", b"k\0v", crc=7), chunk(b"acTL", b"x"),
    chunk(b"gAMA", b""), chunk(b"sRGB", b""), chunk(b"cHRM", b"x"), chunk(b"pHYs", b""),
])  # fmt: skip
@pytest.mark.parametrize("behind", [False, True])
def test_no_chunk_beside_the_pixels_keeps_a_picture_from_being_opened(tmp_path, extra, behind):
    (tmp_path / "p.png").write_bytes(plain(after=extra) if behind else plain(before=extra))
    image, _ = open_source(tmp_path / "p.png")
    assert image.getcolors() == [(4, RED)]
    assert all(len(text.encode()) <= 2 * png.MAX_TEXT for text in read_texts(tmp_path / "p.png").values())


def test_texts_are_bounded_all_together():
    packed = zlib.compress(b"x" * (32 << 20))
    bomb = plain(before=b"".join(chunk(b"zTXt", b"%d\0\0" % i + packed) for i in range(40)))
    tracemalloc.start()
    found = png.texts(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, found.values())) == png.MAX_TEXTS and peak < 3 * png.MAX_TEXTS


def test_pillow_keeps_its_own_limits():
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    parse_picture(plain(before=ztxt("k", LONG)), "p.png").load()
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_request_is_found_wherever_its_text_is(tmp_path, behind, packed):
    request = GenerationRequest(prompt="ein Käse", seed=5, width=128, height=128)
    text = itxt(KEY, request.model_dump_json(exclude_none=True).encode(), packed)
    (tmp_path / "p.png").write_bytes(plain(after=text) if behind else plain(before=text))
    assert read_request(tmp_path / "p.png").model_dump() == request.model_dump()
    assert "ein Käse" in info(str(tmp_path / "p.png"))
    assert row_of(tmp_path, "p.png")["Seed"] == "5"


def test_our_own_pictures_hold_what_pillow_reads():
    image = describe(Image.new("RGB", (16, 16)), GenerationRequest(prompt="é", seed=1))
    data = png_bytes(image)
    there = Image.open(io.BytesIO(data))
    there.load()
    assert png.texts(data) == dict(there.text)


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 9])
def test_a_file_that_ends_too_early_is_damaged(tmp_path, cut):
    data = plain(before=ztxt("k", b"text"))
    end = data.index(b"IDAT") + 4 + cut
    (tmp_path / "p.png").write_bytes(data[:end])
    with pytest.raises(FileError, match=r"p\.png"):
        open_source(tmp_path / "p.png")


# --- colour keys


def keyed(depth: int, kind: int, rows: np.ndarray, key: bytes, filtered: bool = False) -> bytes:
    """A PNG of those levels; rows [H, W] or [H, W, 3]."""
    height, width = rows.shape[:2]
    if depth == 16:
        lines = [line.astype(">u2").tobytes() for line in rows]
    elif depth == 8:
        lines = [line.astype(np.uint8).tobytes() for line in rows]
    else:
        bits = ((rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(height, -1)
        lines = [np.packbits(line).tobytes() for line in bits.astype(np.uint8)]
    if filtered:  # each byte without the one a pixel before
        step = depth // 8 * (3 if kind == RGB else 1)
        lines = [bytes((v - (line[i - step] if i >= step else 0)) & 255 for i, v in enumerate(line)) for line in lines]
    data = zlib.compress(b"".join(bytes([filtered]) + line for line in lines))
    palette = chunk(b"PLTE", bytes(range(48))) if kind == PALETTE else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return png.SIGNATURE + header + palette + chunk(b"tRNS", key) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def white(data: bytes) -> np.ndarray:
    return (np.asarray(as_rgb(parse_picture(data, "p.png"))) == 255).all(-1)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_colour_key_is_clear_at_every_depth(depth):
    rows = np.random.default_rng(0).integers(0, max(1, 2**depth - 1 - depth // 16 * 300), (6, 21))
    rows[2, 3] = rows[0, 0]
    key = int(rows[0, 0])
    found = white(keyed(depth, GREY, rows, struct.pack(">H", key)))
    assert np.array_equal(found, rows == key)


def test_a_grey_key_of_16_bits_is_no_neighbour():
    rows = np.array([[30000, 30001, 29952, 30207]])
    assert white(keyed(16, GREY, rows, struct.pack(">H", 30000))).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("filtered", [False, True])
def test_an_rgb_colour_key_is_clear_at_every_depth(depth, filtered):
    rows = np.random.default_rng(0).integers(0, 2**depth - 300 if depth == 16 else 250, (5, 7, 3))
    key = rows[1, 2].copy()
    rows[3, 4], rows[3, 5] = key, key + np.array([0, 0, 1])
    found = white(keyed(depth, RGB, rows, struct.pack(">HHH", *key), filtered))
    assert np.array_equal(found, (rows == key).all(-1)) and found.sum() == 2


def test_bits_above_the_depth_are_no_part_of_a_key():
    assert white(keyed(2, GREY, np.array([[0, 1, 2]]), struct.pack(">H", 0xFF01))).tolist() == [[False, True, False]]
    assert white(keyed(1, GREY, np.array([[0, 1, 0]]), struct.pack(">H", 1))).tolist() == [[False, True, False]]
    rows = np.array([[[1, 2, 3], [9, 9, 9]]])
    assert white(keyed(8, RGB, rows, struct.pack(">HHH", 0x101, 0x102, 0x103))).tolist() == [[True, False]]


def test_a_palette_has_alpha_of_its_own():
    rows = np.array([[0, 1, 2, 3]])
    image = as_rgb(parse_picture(keyed(4, PALETTE, rows, bytes([255, 0, 128])), "p.png"))
    assert [image.getpixel((i, 0)) for i in range(4)] == [(0, 1, 2), (255, 255, 255), (130, 131, 131), (9, 10, 11)]


def test_a_picture_that_pillow_opened_keeps_its_key(tmp_path):
    rows = np.array([[[300, 2, 3], [301, 2, 3]]])
    (tmp_path / "p.png").write_bytes(keyed(16, RGB, rows, struct.pack(">HHH", 300, 2, 3)))
    with Image.open(tmp_path / "p.png") as opened:
        assert as_rgb(opened).getpixel((0, 0)) == (255, 255, 255)
    loaded = Image.open(io.BytesIO(keyed(8, GREY, np.array([[7, 8]]), struct.pack(">H", 7))))
    loaded.load()
    assert as_rgb(loaded).getpixel((0, 0)) == (255, 255, 255) and as_rgb(loaded).getpixel((1, 0)) == (8, 8, 8)
    assert "transparency" in loaded.info and loaded.mode == "L"  # the caller's picture stays as it is
