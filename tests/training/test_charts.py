"""What a training run shows: the numbers again from the CSV, the same bytes, and marks where they belong."""

import csv
import hashlib
import io
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flux_core.training.charts import (
    BEST,
    LossRow,
    best_step,
    change_chart,
    loss_chart,
    loss_csv,
    place_of,
    running_mean,
    sample_sheet,
    window_of,
)

LOSSES = [0.5 + 0.3 * math.sin(i * i) for i in range(500)]
RATES = [1e-4] * 500
VALIDATED = {0: 0.42, 100: 0.40, 200: 0.39, 300: 0.41, 400: 0.43, 500: 0.45}
CHANGES = [
    *((f"transformer_blocks.{i}.attn.{name}", 0.01 * (i + 1)) for i in range(4) for name in ("to_q", "to_out.0")),
    *((f"single_transformer_blocks.{i}.attn.to_q", 0.05) for i in range(8)),
    ("norm_out.linear", 0.02),
]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def marked(png):
    """The centre of the pixels that have the best point's colour."""
    colour = [int(BEST[i : i + 2], 16) for i in (1, 3, 5)]
    y, x = np.nonzero((pixels(png) == colour).all(-1))
    return x.mean(), y.mean()


def test_csv_keeps_every_bit():
    rows = [LossRow(0, None, None, None, 0.1), LossRow(1, 0.1 + 0.2, 1e-4, math.inf, None), LossRow(2, 1 / 3, 0, 2, 3)]
    lines = list(csv.reader(io.StringIO(loss_csv(rows))))
    assert lines[0] == ["step", "loss", "rate", "norm", "validation"]
    assert lines[1] == ["0", "", "", "", "0.1"]
    assert [float(x) for x in lines[2][:4]] == [1, 0.1 + 0.2, 1e-4, math.inf]
    assert float(lines[3][1]) == 1 / 3
    assert loss_csv(rows).count("\n") == 4 and "\r" not in loss_csv(rows)


def test_running_mean_is_that_of_the_last_steps():
    assert running_mean([4, 2, 6, 0], 2) == [4, 3, 4, 3]
    assert running_mean(LOSSES, 1) == LOSSES
    assert running_mean(LOSSES, 500)[-1] == pytest.approx(np.mean(LOSSES))
    assert [window_of(steps) for steps in (0, 9, 50, 1000, 10**6)] == [1, 1, 5, 100, 100]


def test_best_is_the_first_least():
    assert best_step(VALIDATED) == 200
    assert best_step({300: 0.2, 100: 0.2, 200: 0.3}) == 100


def test_the_best_point_is_marked_where_the_least_is():
    places = [marked(loss_chart(LOSSES, RATES, VALIDATED | {step: 0.38}, "")) for step in VALIDATED]
    across, down = np.transpose(places)
    assert np.diff(across) == pytest.approx(np.diff(across).mean(), abs=1.5)  # a hundred steps each, from the left
    assert np.diff(across).min() > 100
    assert np.ptp(down) < 1.5


def test_without_validation_nothing_is_marked():
    assert not (pixels(loss_chart(LOSSES, RATES, {}, "")) == [0xB0, 0x2A, 0x37]).all(-1).any()


@pytest.mark.parametrize("losses", [[], [0.5], LOSSES[:7]])
def test_a_run_that_has_just_begun_has_a_chart(losses):
    assert loss_chart(losses, RATES[: len(losses)], {0: 0.4}, "flux-mini").startswith(b"\x89PNG")


def test_equal_runs_have_equal_charts():
    """In another process, too, where nothing was drawn before."""
    code = (
        "import sys; sys.path.insert(0, 'tests/training'); from test_charts import both, hashlib; "
        "print(hashlib.sha256(both()).hexdigest())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == hashlib.sha256(both()).hexdigest()
    assert set(Image.open(io.BytesIO(both())).info) <= {"dpi", "Software"}


def both():
    return loss_chart(LOSSES, RATES, VALIDATED, "a") + change_chart(CHANGES, "b")


def test_a_title_is_no_formula():
    assert loss_chart(LOSSES, RATES, {}, r"$\frac{") != loss_chart(LOSSES, RATES, {}, "")
    assert change_chart(CHANGES, r"$\frac{") != change_chart(CHANGES, "")


def test_places_of_modules():
    assert place_of("transformer_blocks.3.attn.to_q") == ("transformer_blocks", 3, "attn.to_q")
    assert place_of("single_transformer_blocks.17.proj_mlp") == ("single_transformer_blocks", 17, "proj_mlp")
    assert place_of("norm_out.linear") == ("others", 0, "norm_out.linear")


def test_the_chart_of_changes_has_each_value_in_its_place():
    """Where one module's value changes, only its cell does, and the most changed one is the brightest."""
    before = pixels(change_chart(CHANGES, ""))
    for i in (0, 2, 9):
        other = [(name, 0.03 if j == i else value) for j, (name, value) in enumerate(CHANGES)]
        y, x = np.nonzero((pixels(change_chart(other, "")) != before).any(-1))
        size = (np.ptp(y) + 1) * (np.ptp(x) + 1)
        assert len(y) == size and size < before.shape[0] * before.shape[1] / 20
    brightest = (before == [253, 231, 36]).all(-1)  # the end of the map of colours
    assert brightest.sum() > 8 * 100


def test_the_order_of_changes_does_not_count():
    assert change_chart(CHANGES, "") == change_chart(CHANGES[::-1], "")
    assert change_chart([(name, 0.0) for name, _ in CHANGES], "").startswith(b"\x89PNG")


def picture(colour, size=(64, 96)):
    return Image.new("RGB", size, colour)


def test_a_sheet_grows_by_rows():
    rows = [("0", [picture("red"), picture("blue")]), ("100", [picture("lime"), picture("black")])]
    short, long = sample_sheet(rows[:1], ["a", "b"]), sample_sheet(rows, ["a", "b"])
    assert long.height - short.height == 96 + 4
    counts = {colour: n for n, colour in long.getcolors(1 << 20)}
    assert all(counts[colour] >= 64 * 96 for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0), (0, 0, 0)))
    red, lime = (np.argwhere((np.asarray(long) == colour).all(-1)).min(0) for colour in ((255, 0, 0), (0, 255, 0)))
    assert red[1] == lime[1] and lime[0] - red[0] == 96 + 4


def test_a_sheet_keeps_the_mark_of_its_pictures():
    one = picture("red")
    assert "xmp" not in sample_sheet([("0", [one])], ["a"]).info
    one.info["xmp"] = b"mark"
    assert sample_sheet([("base", [one]), ("adapter", [one])], ["a"]).info["xmp"] == b"mark"


def test_large_pictures_are_made_small():
    assert sample_sheet([("0", [picture("red", (1024, 512))])], ["a"]).width < 300
