"""Masks: which files are masks, where a picture is painted, and that every pixel that is kept is the source's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_core.errors import FileError, UsageError
from flux_core.images.masks import BLUR, Canvas, extended, mask_note, open_mask, region, without_step
from flux_core.images.pictures import crop_centre
from flux_core.request.fields import FITS
from flux_core.request.generation import GenerationRequest
from flux_core.request.pictures import InitImage

ORIGIN = InitImage(file="", sha256="0")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def box(size: tuple[int, int], *white: int) -> Image.Image:
    """A mask that is white inside a box: left, top, right, bottom."""
    mask = Image.new("L", size, 0)
    mask.paste(255, white)
    return mask


def request(width: int, height: int, masked: bool = True, **fields) -> GenerationRequest:
    mask = ORIGIN if masked else None
    fields = {"prompt": "x", "seed": 1, "init_image": ORIGIN, "mask": mask, "force": True, **fields}
    return GenerationRequest(width=width, height=height, **fields)


def painted_over(canvas: Canvas, wanted: GenerationRequest, seed: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """The whole with what a model draws, and that: noise where the mask is not black, else what the model saw."""
    size = wanted.padded_size
    drawn = Image.composite(noise(*size, seed), canvas.image, canvas.mask.point(lambda level: 255 if level else 0))
    drawn = crop_centre(drawn, wanted.width, wanted.height)
    return np.asarray(canvas.finished(drawn)), np.asarray(drawn)


# What is kept --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(48, 32), (50, 35), (17, 64), (1, 1)])
def test_black_keeps_the_sources_own_pixels_and_everything_else_is_what_was_drawn(width, height):
    """Also at sizes that are no multiples of 16, and where a mask is nearly black."""
    source = noise(width, height)
    levels = np.random.default_rng(1).choice(np.array([0, 0, 1, 128, 255], np.uint8), (height, width))
    mask, wanted = Image.fromarray(levels), request(width, height)
    canvas = Canvas.of(wanted, source, mask)
    assert canvas.image.size == canvas.mask.size == wanted.padded_size
    found, drawn = painted_over(canvas, wanted)
    assert np.array_equal(found, np.where(levels[..., None] > 0, drawn, np.asarray(source)))


@pytest.mark.parametrize(("width", "height"), [(50, 35), (48, 33), (31, 31)])
def test_what_the_model_sees_lies_where_the_picture_is_cropped_from_it(width, height):
    source, mask = noise(width, height), box((width, height), 3, 4, 20, 30)
    canvas = Canvas.of(request(width, height), source, mask)
    for seen, own in ((canvas.image, source), (canvas.mask, mask)):
        assert crop_centre(seen, width, height).tobytes() == own.tobytes()
    assert canvas.image.getpixel((0, 0)) == source.getpixel((0, 0))  # the border goes on outwards


@pytest.mark.parametrize("pad", [(16, 0, 0, 0), (0, 5, 0, 7), (3, 4, 5, 6)])
@pytest.mark.parametrize("mask", [None, (2, 2, 9, 9)])
def test_an_extended_picture_keeps_what_was_there(pad, mask):
    left, top, right, bottom = pad
    source = noise(40, 30)
    size = 40 + left + right, 30 + top + bottom
    wanted = request(*size, masked=mask is not None, pad=pad)
    canvas = Canvas.of(wanted, source, mask and box((40, 30), *mask))
    found, drawn = painted_over(canvas, wanted)
    expected = drawn.copy()
    inside = np.s_[top : top + 30, left : left + 40]
    own = np.ones((30, 40), bool) if mask is None else np.asarray(box((40, 30), *mask)) == 0
    expected[inside][own] = np.asarray(source)[own]
    assert np.array_equal(found, expected)


def test_a_pictures_border_goes_on_outwards():
    image = noise(5, 4)
    for one in (image, image.convert("L")):
        rows, columns = np.clip(np.arange(9) - 2, 0, 3), np.clip(np.arange(9) - 1, 0, 4)
        assert np.array_equal(extended(one, (1, 2, 3, 3)), np.asarray(one)[rows][:, columns])
    assert extended(image, (0, 0, 0, 0)).tobytes() == image.tobytes()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(64, 32), (48, 50)])
def test_picture_and_mask_are_fitted_alike(fit, size):
    grey = box((90, 70), 20, 10, 60, 50)
    canvas = Canvas.of(request(*size, fit=fit), grey.convert("RGB"), grey)
    assert canvas.whole.size == size
    for image, mask in ((canvas.whole, canvas.where), (canvas.image, canvas.mask)):
        apart = np.asarray(image.convert("L")).astype(float) - np.asarray(mask)
        assert np.abs(apart).mean() < 2  # a pixel aside would be nearly 5
    found, drawn = painted_over(canvas, request(*size, fit=fit))
    kept = np.asarray(canvas.where) == 0
    assert 0 < kept.sum() < kept.size
    assert np.array_equal(found[kept], np.asarray(canvas.whole)[kept]) and np.array_equal(found[~kept], drawn[~kept])


def test_the_bars_of_a_padded_picture_are_kept():
    wanted = request(64, 64, fit="pad")
    canvas = Canvas.of(wanted, noise(64, 32), Image.new("L", (64, 32), 255))
    found, drawn = painted_over(canvas, wanted)
    assert not found[:14].any() and not found[50:].any() and np.array_equal(found[20:44], drawn[20:44])


@pytest.mark.parametrize("padding", [0, 8, 500])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 40), (50, 35)])
@pytest.mark.parametrize("pad", [None, (7, 0, 9, 4)])
def test_a_part_that_is_drawn_alone_leaves_the_rest_to_the_bit(padding, width, height, pad):
    """Whatever its size, and however it is resized between; what is painted is what was drawn, resized."""
    source, mask = noise(130, 90), box((130, 90), 70, 20, 95, 41)
    wanted = request(width, height, mask_padding=padding, pad=pad)
    canvas = Canvas.of(wanted, source, mask)
    assert canvas.image.size == canvas.mask.size == wanted.padded_size
    found, drawn = painted_over(canvas, wanted)
    left, top, right, bottom = pad or (0, 0, 0, 0)
    assert found.shape == (90 + top + bottom, 130 + left + right, 3)
    inside = found[top : top + 90, left : left + 130]
    kept = np.asarray(mask) == 0
    assert np.array_equal(inside[kept], np.asarray(source)[kept])
    x, y, to_x, to_y = canvas.box
    part = Image.fromarray(drawn).resize((to_x - x, to_y - y), Image.Resampling.LANCZOS)
    assert np.array_equal(
        found[y:to_y, x:to_x], without_step(part, canvas.whole.crop(canvas.box), canvas.where.crop(canvas.box))
    )


def test_a_part_is_seen_as_large_as_it_is_drawn():
    source, mask = noise(100, 100), box((100, 100), 40, 40, 48, 48)
    canvas = Canvas.of(request(32, 32, mask_padding=4), source, mask)
    assert canvas.box == (36, 36, 52, 52)
    twice = source.crop(canvas.box).resize((32, 32), Image.Resampling.LANCZOS)
    assert canvas.image.tobytes() == twice.tobytes() and canvas.mask.getpixel((16, 16)) == 255
    assert canvas.whole.tobytes() == source.tobytes() and canvas.where.tobytes() == mask.tobytes()


@pytest.mark.parametrize("step", [-9, 9])
def test_a_step_of_tone_at_the_border_is_gone_and_fades_inwards(step):
    """As an autoencoder makes one: all of the picture a little lighter or darker than it is."""
    source, mask = np.full((120, 120, 3), 100, np.uint8), box((120, 120), 20, 20, 120, 120)
    drawn = Image.fromarray((source.astype(int) + step).astype(np.uint8))
    found = np.asarray(without_step(drawn, Image.fromarray(source), mask))[..., 0].astype(int) - 100
    assert not found[:20].any() and not found[:, :20].any()
    assert abs(found[60, 20]) <= 1 and abs(found[20, 20]) <= 1
    assert found[60 + 4 * BLUR :, 60 + 4 * BLUR :].tolist() == [[step] * 36] * 36
    inwards = np.abs(found[110, 20:])
    assert (np.diff(inwards) >= 0).all() and inwards[-1] == abs(step)


def test_without_a_step_or_without_what_is_kept_nothing_is_mended():
    source, white = noise(64, 48), Image.new("L", (64, 48), 255)
    assert without_step(noise(64, 48, 1), source, white).tobytes() == noise(64, 48, 1).tobytes()
    half = box((64, 48), 0, 0, 32, 48)
    drawn = source.copy()
    drawn.paste(noise(32, 48, 2), (0, 0))
    assert without_step(drawn, source, half).tobytes() == drawn.tobytes()


def test_what_is_painted_over_its_border_is_no_step_of_tone():
    """Latents are eight pixels wide: a star on black that reaches the border would get a dark edge."""
    source, mask = Image.new("RGB", (64, 64), "black"), box((64, 64), 16, 16, 48, 48)
    drawn = source.copy()
    drawn.paste((250, 200, 20), (12, 24, 40, 40))
    found = np.asarray(without_step(drawn, source, mask))
    assert np.array_equal(found, np.where(np.asarray(mask)[..., None] > 0, drawn, source))


def test_mended_tones_stay_within_their_levels():
    mask = box((40, 40), 0, 0, 20, 40)
    for own, seen, painted in ((255, 245, 250), (0, 10, 5)):
        drawn = Image.new("RGB", (40, 40), (seen,) * 3)
        drawn.paste((painted,) * 3, (0, 0, 20, 40))
        found = np.asarray(without_step(drawn, Image.new("RGB", (40, 40), (own,) * 3), mask))
        assert found[20, 19, 0] == own


def test_another_picture_of_the_whole_shows_the_part_that_is_drawn():
    source, mask = noise(100, 100), box((100, 100), 40, 40, 48, 48)
    part = Canvas.of(request(32, 32, mask_padding=4), source, mask)
    twice = source.resize((200, 200), Image.Resampling.NEAREST)
    back = twice.resize((100, 100), Image.Resampling.LANCZOS)
    assert part.part_of(source).tobytes() == source.crop((36, 36, 52, 52)).tobytes()
    assert part.part_of(twice).tobytes() == back.crop((36, 36, 52, 52)).tobytes()
    assert Canvas.of(request(100, 100), source, mask).part_of(twice) is twice


# The box around what is painted ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("white", "padding", "size", "expected"),
    [
        ((40, 40, 60, 60), 0, (64, 64), (40, 40, 60, 60)),
        ((40, 40, 60, 60), 5, (64, 64), (35, 35, 65, 65)),
        ((40, 40, 60, 60), 0, (128, 64), (30, 40, 70, 60)),  # the shape of what is drawn
        ((40, 40, 60, 60), 0, (64, 128), (40, 30, 60, 70)),
        ((0, 0, 10, 10), 5, (64, 64), (0, 0, 20, 20)),  # moved inwards at an edge
        ((190, 90, 200, 100), 5, (64, 64), (180, 80, 200, 100)),
        ((40, 40, 60, 60), 500, (64, 64), (0, 0, 100, 100)),  # less padding, and the shape
        ((170, 40, 190, 60), 45, (64, 64), (100, 0, 200, 100)),
        ((10, 45, 190, 55), 0, (64, 64), (10, 0, 190, 100)),  # no room for a square
    ],
)
def test_the_box_has_the_shape_of_what_is_drawn_and_lies_inside(white, padding, size, expected):
    assert region(box((200, 100), *white), padding, size) == expected


SIDE = st.integers(1, 60)


@given(st.data(), SIDE, SIDE, st.integers(0, 40), SIDE, SIDE)
def test_any_box_holds_all_that_is_painted(data, width, height, padding, to_width, to_height):
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    x, y, to_x, to_y = region(box((width, height), left, top, right, bottom), padding, (to_width, to_height))
    assert 0 <= x <= left < right <= to_x <= width and 0 <= y <= top < bottom <= to_y <= height
    wide, high = to_x - x, to_y - y
    within = wide < width and high < height
    assert not within or (wide >= right - left + 2 * padding and high >= bottom - top + 2 * padding)
    shaped = abs(wide - high * to_width / to_height) <= 1 or abs(high - wide * to_height / to_width) <= 1
    assert shaped or (wide, high) in ((right - left, height), (width, bottom - top))  # no room for it, to a pixel


@pytest.mark.parametrize("fields", [{"width": 70, "height": 50}, {"width": 64, "height": 64, "mask_padding": 9}])
@pytest.mark.parametrize("fit", FITS)
def test_a_mask_that_is_resized_has_no_waves_beside_its_edges(fields, fit):
    source, mask = noise(100, 80), Image.new("L", (100, 80), 40)
    mask.paste(200, (30, 20, 61, 47))
    seen = Canvas.of(request(**fields, fit=None if "mask_padding" in fields else fit), source, mask).mask
    low, high = seen.getextrema()
    assert (low, high) == (0 if fit == "pad" and "mask_padding" not in fields else 40, 200)


# Files that are masks ---------------------------------------------------------------------------------


def levels_of(mask: Image.Image, image: Image.Image | None = None) -> np.ndarray:
    grey, _ = open_mask(mask, image)
    assert grey.mode == "L"
    return np.asarray(grey)


def test_brightness_says_how_much_is_painted():
    for mode in ("1", "L", "RGB", "P", "LA", "RGBA"):
        mask = box((8, 8), 2, 2, 6, 6).convert("RGB").convert(mode)
        assert np.array_equal(levels_of(mask), box((8, 8), 2, 2, 6, 6)), mode
    grey = np.arange(1, 65, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(levels_of(Image.fromarray(grey)), grey)
    assert levels_of(Image.fromarray(grey.astype(np.uint16) << 8))[7, 7] == 64


def test_a_mask_with_transparency_is_painted_where_it_is_transparent():
    """As OpenAI's programs send one: the picture, with a hole."""
    mask = noise(8, 8).convert("RGBA")
    opacity = np.asarray(box((8, 8), 2, 2, 6, 6)) // 5 * 4
    mask.putalpha(Image.fromarray(255 - opacity))
    assert np.array_equal(levels_of(mask), opacity)
    mask.putalpha(255)  # opaque everywhere: an alpha channel alone says nothing
    assert np.array_equal(levels_of(mask), np.asarray(mask.convert("RGB").convert("L")))
    palette = Image.new("P", (4, 2), 1)
    palette.putpixel((1, 1), 0)
    palette.info["transparency"] = 0
    assert levels_of(palette).tolist() == [[0] * 4, [0, 255, 0, 0]]


def test_a_turned_mask_is_turned_with_its_picture(tmp_path):
    """The orientation that a camera or a program wrote into the file is that of brightness and of transparency."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = box((20, 10), 0, 0, 5, 10)
    hole = Image.new("RGBA", (20, 10), "white")
    hole.putalpha(grey.point(lambda level: 255 - level))
    turned = grey.transpose(Image.Transpose.ROTATE_270)
    for name, one in (("grey", grey), ("hole", hole)):
        one.save(tmp_path / f"{name}.png", exif=exif)
        found, record = open_mask(tmp_path / f"{name}.png", Image.new("RGB", (10, 20)))
        assert found.tobytes() == turned.tobytes() and record.file == f"{name}.png"


def test_a_mask_of_another_size_or_without_white_is_told(tmp_path):
    image = Image.new("RGB", (64, 48))
    box((32, 24), 0, 0, 8, 8).save(tmp_path / "small.png")
    with pytest.raises(UsageError, match=r"small\.png has 32x24 pixels, the picture 64x48. Next: give a mask of the"):
        open_mask(tmp_path / "small.png", image)
    with pytest.raises(UsageError, match="the mask has 8x8 pixels, the picture 64x48"):
        open_mask(Image.new("L", (8, 8), 255), image)
    Image.new("L", (64, 48)).save(tmp_path / "black.png")
    with pytest.raises(UsageError, match=r"black\.png is black everywhere: nothing would be painted. Next: make white"):
        open_mask(tmp_path / "black.png", image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA"])
def test_a_damaged_mask_is_a_files_error(tmp_path, mode):
    whole = noise(64, 64).convert(mode)
    if mode != "L":
        whole.putalpha(noise(64, 64, 1).convert("L"))
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(FileError, match=r"cut\.png is a damaged picture"):
        open_mask(tmp_path / "cut.png", None)
    with pytest.raises(FileError, match="the mask has no pixels"):
        open_mask(Image.new(mode, (0, 0)), None)


@pytest.mark.parametrize(
    ("share", "line"),
    [
        (1.0, "the mask is white everywhere: nothing of the picture is kept"),
        (0.95, "the mask paints 95% of the picture: white is painted, black is kept. Is it inverted?"),
        (0.9, None),
        (0.2, None),
    ],
)
def test_a_mask_that_paints_nearly_everything_is_noted(share, line):
    assert mask_note(box((100, 10), 0, 0, round(100 * share), 10)) == line
