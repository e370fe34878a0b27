"""The captioner that ships names what is in pictures of flux-mini's world."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "weights" / "recipe"))

from captions import Scene, Thing
from palette import COLOUR_ID
from render import make_atlas, render, to_images
from scenes import pack
from shapes import SHAPES, shape_sprites

from flux_core.captioning.sprites import crop, cuts, ground_of, load_sprites, read_sprites, tight
from flux_core.errors import FileError
from flux_core.hub.places import shipped_folder

SHAPE = {names[0]: number for number, names in enumerate(SHAPES)}


@pytest.fixture(scope="module")
def captioner():
    return load_sprites(torch.device("cpu"))


@pytest.fixture(scope="module")
def atlas():
    return make_atlas(shape_sprites())


def drawing(atlas, *shapes, ground=(0.8, 0.85, 0.8), size=256):
    """A scene of the recipe's shapes: (name, colour, x, y, size), the canvas from 0 to 1."""
    things = [Thing(SHAPE[name], COLOUR_ID[colour], "", []) for name, colour, *_ in shapes]
    scene = Scene("shape", things, [place for _, _, *place in shapes], "several", ground)
    return to_images(render(pack([scene]), atlas, size))[0]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([("circle", "purple", 0.5, 0.5, 0.8)], "a circle"),
        (
            [("square", "green", 0.25, 0.5, 0.42), ("circle", "red", 0.75, 0.5, 0.42)],
            "a square to the left of a circle",
        ),
        ([("circle", "red", 0.5, 0.25, 0.42), ("square", "green", 0.5, 0.75, 0.42)], "a circle above a square"),
        ([("circle", "blue", 0.17 + 0.33 * i, 0.5, 0.28) for i in range(3)], "three circles"),
        ([], ""),
    ],
)
def test_shapes_are_named_with_their_places_and_numbers(captioner, atlas, shapes, words):
    assert captioner([drawing(atlas, *shapes)]) == [words]


def test_size_place_and_ground_do_not_matter(captioner, atlas):
    for colour, x, side, ground, size in (
        ("green", 0.4, 0.5, (1, 1, 1), 256),
        ("white", 0.6, 0.6, (0.1, 0.1, 0.4), 500),
    ):
        picture = drawing(atlas, ("circle", colour, x, 0.5, side), ground=ground, size=size)
        assert captioner.caption(picture) == "a circle"


def test_what_ships_is_small_and_whole():
    file = shipped_folder("dinov2-mini") / "sprites.safetensors"
    features, sprites = read_sprites(file)
    assert file.stat().st_size <= 2**20
    assert features.shape == (len(sprites), 192) and len(sprites) == 1619
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(sprites)))


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "sprites.safetensors").write_bytes(b"none")
    with pytest.raises(FileError, match="could not be read"):
        read_sprites(tmp_path / "sprites.safetensors")


def test_boxes_are_tight_and_cut_at_gaps():
    mask = np.zeros((40, 60), bool)
    mask[5:15, 10:20] = mask[5:15, 30:50] = True
    box = tight(mask, (0, 0, 60, 40))
    assert box == (10, 5, 50, 15)
    assert cuts(mask, box) == [((10, 5, 20, 15), (30, 5, 50, 15))]
    assert cuts(mask, (10, 5, 20, 15)) == [] and tight(mask, (0, 0, 9, 40)) is None


def test_a_thing_is_cut_out_on_its_ground():
    pixels = np.full((40, 40, 3), 200, np.uint8)
    pixels[10:20, 5:35] = 0
    ground = ground_of(pixels)
    part = np.asarray(crop(pixels, ground, (5, 10, 35, 20)))
    assert part.shape == (35, 35, 3) and (part == 0).all(-1).sum() == 300 and set(np.unique(part)) == {0, 200}
