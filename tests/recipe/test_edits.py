"""Edges and pairs of scenes that flux-mini learns to see by: the edges are OpenCV's, the words say what is changed."""

import random
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "weights/recipe"))

from captions import Thing
from edges import canny
from edits import KINDS, sample_edit
from heldout import load_heldout
from palette import BACKGROUNDS, COLOURS
from scenes import Pools
from sprites import Sprites

ROOT = Path(__file__).parents[2]
NAMES = ["cat", "dog", "fox", "owl", "box", "mouse", "umbrella", "green book"]
LISTS = {"colours": [["green", "cat"]], "pairs": [["cat", "dog"], ["owl", "box"]], "counts": []}


@pytest.fixture(scope="module")
def pools():
    n = len(NAMES)
    meta = Sprites(
        names=NAMES, aliases=[[] for _ in NAMES], keywords=[[] for _ in NAMES], group=["animals-nature"] * n,
        subgroup=[""] * n, hexcodes=[f"{i:x}" for i in range(n)], tone=[False] * n, countable=[True] * n,
        weight=[1.0] * n,
    )  # fmt: skip
    return Pools(meta, load_heldout(meta, LISTS))


@pytest.mark.parametrize("kind", ["noise", "smooth", "photograph"])
def test_edges_are_those_of_opencv(kind):
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (61, 83, 3), dtype=np.uint8)
    if kind == "smooth":
        image = cv2.GaussianBlur(image, (0, 0), 3)
        image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    if kind == "photograph":
        image = np.asarray(Image.open(ROOT / "docs/pictures/flux-mini.jpg").convert("RGB"))[:300, :400]
    wanted = cv2.Canny(np.ascontiguousarray(image), 50, 200) > 0
    found = canny(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])[0].numpy()
    assert wanted.any() and np.array_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_say_what_is_changed_and_nothing_else_is(pools, kind):
    rng = random.Random(1)
    for _ in range(200):
        before, after, text, named = sample_edit(rng, pools, kind)
        assert named == kind
        text = text.lower()
        if kind == "ground":
            assert before.things == after.things and before.places == after.places
            assert after.background == BACKGROUNDS[after.background_name] != before.background
            assert after.background_name in text
        elif kind == "colour":
            (thing,), (was,) = after.things, before.things
            assert (thing.sprite, before.places, before.background) == (was.sprite, after.places, after.background)
            assert thing.colour != was.colour and any(name in text for name in COLOURS[thing.colour].names)
            assert (thing.colour, thing.sprite) not in pools.heldout.colours
        else:
            (new,) = [thing for thing in after.things if thing not in before.things]
            assert isinstance(new, Thing) and new.name in text and len(after.things) == 2
            assert before.places[0] in after.places and before.background == after.background
            assert tuple(thing.sprite for thing in after.things) not in pools.heldout.pairs
