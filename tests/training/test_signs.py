"""Signs of trouble are seen where there is trouble, and nowhere else."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_core.training.signs import comb, no_effect, overfits, stripes

FOLDER = Path(__file__).parents[2] / "weights" / "noto" / "pictures"
PICTURES = [Image.open(path).convert("RGB").resize((256, 256)) for path in sorted(FOLDER.glob("*.*g"))[:6]]


def lined(image, levels, axis=1):
    pixels = np.asarray(image, np.float64).copy()
    pixels[(slice(None), slice(5, None, 16))[::axis]] -= levels  # as the ground is often white
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_pictures_have_no_comb_and_lines_between_tokens_are_one():
    assert len(PICTURES) == 6
    assert all(0.8 < comb(one) < 1.5 for one in PICTURES)
    for axis in (1, -1):
        assert all(comb(lined(one, 10, axis)) > 1.8 for one in PICTURES)
    assert comb(Image.new("RGB", (48, 48))) == 1  # too small to say
    assert comb(Image.new("L", (256, 256), 80)) == pytest.approx(1, abs=0.01)


def test_stripes_are_told_where_they_are_new():
    striped = [lined(one, 10) for one in PICTURES]
    assert "stripes every 16 pixels" in stripes(PICTURES, striped) and "--lr" in stripes(PICTURES, striped)
    assert stripes(PICTURES, PICTURES) == "" and stripes(striped, striped) == "" and stripes([], []) == ""


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([1.0, 0.9, 0.95, 0.96, 0.97], True),
        ([1.0, 0.9, 0.95, 0.96], False),
        ([1.0, 0.9, 0.95, 0.91, 0.97], False),
        ([1.0, 0.99, 0.98, 0.97, 0.96], False),
        ([], False),
    ],
)
def test_a_validation_loss_that_rises_is_told(losses, told):
    said = overfits({100 * i: loss for i, loss in enumerate(losses)})
    assert bool(said) == told and (not told or "least behind step 100 (0.9000)" in said)


def test_what_changes_nothing_is_told():
    changed = [lined(one, 30) for one in PICTURES]
    assert "as they were without it (rate 1e-06)" in no_effect(PICTURES, PICTURES, 1e-6)
    assert no_effect(PICTURES, changed, 1e-6) == "" and no_effect([], [], 1e-4) == ""
