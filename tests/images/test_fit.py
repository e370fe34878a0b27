"""An init image of another shape: its edges cut off, black ones added, or stretched, and said in a line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_core.images.pictures import fit_note, fitted
from flux_core.request.fields import FITS


def thirds() -> Image.Image:
    """300 x 100: red, green, blue."""
    image = Image.new("RGB", (300, 100), "green")
    image.paste("red", (0, 0, 100, 100))
    image.paste("blue", (200, 0, 300, 100))
    return image


def colours(image: Image.Image) -> set:
    return {colour for count, colour in image.getcolors(1 << 16) if count > 200}


RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)


@pytest.mark.parametrize("turn", [False, True])
def test_each_way_keeps_what_it_says(turn):
    image = thirds().transpose(Image.Transpose.ROTATE_90) if turn else thirds()
    crop, pad, stretch = (fitted(image, 64, 64, how) for how in FITS)
    assert colours(crop) == {GREEN}
    assert colours(pad) == {RED, GREEN, BLUE, BLACK}
    assert colours(stretch) == {RED, GREEN, BLUE}
    assert crop.size == pad.size == stretch.size == (64, 64)
    bars = np.asarray(pad).sum(-1) == 0
    assert bars.all(0 if turn else 1).sum() in range(42, 44)  # a third of the height is picture
    assert fitted(image, 64, 64).tobytes() == crop.tobytes()


@pytest.mark.parametrize("size", [(150, 50), (300, 100), (600, 200)])
def test_the_same_shape_is_only_resized(size):
    plain = thirds().resize(size, Image.Resampling.LANCZOS)
    assert {fitted(thirds(), *size, how).tobytes() for how in FITS} == {plain.tobytes()}


SIDE = st.integers(1, 400)


@given(SIDE, SIDE, SIDE, SIDE, st.sampled_from(list(FITS)))
def test_any_shape_becomes_any_other(width, height, to_width, to_height, how):
    image = fitted(Image.new("RGB", (width, height), "red"), to_width, to_height, how)
    assert image.size == (to_width, to_height)
    assert how == "pad" or image.getcolors() == [(to_width * to_height, RED)]


def test_another_shape_is_told_with_what_becomes_of_it():
    image = Image.new("RGB", (64, 48))
    lines = [fit_note(image, 256, 256, how) for how in FITS]
    assert all(
        "64x48" in line and "256x256" in line and what in line for line, what in zip(lines, FITS.values(), strict=True)
    )
    assert "--fit pad or --fit stretch" in lines[0]
    assert (
        fit_note(image, 256, 192, "crop") is None and fit_note(Image.new("RGB", (1001, 667)), 1000, 666, "pad") is None
    )
