"""The character that ships: six pictures that are drawn by its script, with captions that say its word."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
from PIL import Image

from flux_core.main import main
from flux_core.training import parse_resolution, read_folder

ZIB = Path(__file__).parents[2] / "weights" / "zib"
SPEC = spec_from_file_location("zib", ZIB / "render.py")  # the recipe has another module of that name
render = module_from_spec(SPEC)
SPEC.loader.exec_module(render)


def test_the_pictures_are_what_the_script_draws():
    found = read_folder(ZIB / "pictures", parse_resolution("256x256").size_of, "zib")
    assert len(found.pictures) == len(render.SCENES) == 6 and not found.skipped
    for one, (caption, *scene) in zip(found.pictures, render.SCENES, strict=True):
        assert one.caption == caption and "zib" in caption
        drawn, kept = (np.asarray(x, np.int16) for x in (render.picture(*scene), Image.open(one.path)))
        assert np.abs(drawn - kept).max() <= 2  # as other versions of Pillow turn it


def test_the_example_says_what_it_will_do(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--example", "zib", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 to learn from (6 of 256x256)" in said and "steps: 400, 4 pictures each" in said
    assert not any(tmp_path.iterdir())
