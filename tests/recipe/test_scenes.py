"""The data recipe on a tiny table of sprites with random pixels; no downloaded data is needed."""

import colorsys
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "weights/recipe"))

from heldout import load_heldout
from palette import BACKGROUNDS, COLOURS
from render import make_atlas, recolour, render, to_images
from scenes import KINDS, SceneBatch, sample_scenes
from shapes import SHAPES, shape_sprites
from sprites import Sprites, clean_name
from words import plural, with_article

NAMES = [
    "cat",
    "dog",
    "red apple",
    "slice of pizza",
    "mouse",
    "grapes",
    "umbrella",
    "box",
    "fox",
    "owl",
    "waving hand",
    "waving hand, dark skin tone",
]
LISTS = {
    "colours": [["green", "cat"], ["blue", "dog"], ["red", "mouse"]],
    "pairs": [["cat", "dog"], ["mouse", "fox"], ["owl", "box"]],
    "counts": [[2, "cat"], [3, "dog"], [4, "fox"]],
}


@pytest.fixture(scope="module")
def meta() -> Sprites:
    n = len(NAMES)
    return Sprites(
        names=NAMES,
        aliases=[["kitty"] if x == "cat" else [] for x in NAMES],
        keywords=[[] for _ in NAMES],
        group=["animals-nature"] * n,
        subgroup=[""] * n,
        hexcodes=[f"{i:x}" for i in range(n)],
        tone=["skin tone" in x for x in NAMES],
        countable=["hand" not in x for x in NAMES],
        weight=[1.0] * n,
    )


@pytest.fixture(scope="module")
def scenes(meta: Sprites) -> tuple[SceneBatch, list[list[str]]]:
    return sample_scenes(20_000, 5, meta, k=4, heldout=load_heldout(meta, LISTS))


def rows_of(batch: SceneBatch, *kinds: str) -> np.ndarray:
    return np.flatnonzero(np.isin(batch.kind, [KINDS.index(k) for k in kinds]))


def test_held_out_is_never_drawn(meta, scenes):
    batch, _ = scenes
    held = load_heldout(meta, LISTS)
    assert len(held.colours) == len(held.pairs) == len(held.counts) == 3
    drawn = {(c, s) for c, s in zip(batch.colour.ravel().tolist(), batch.sprite.ravel().tolist(), strict=True)}
    assert not drawn & held.colours and len(drawn) > 80
    pairs, counts = set(), set()
    for i in range(len(batch)):
        sprites = batch.sprite[i][batch.sprite[i] >= 0].tolist()
        if len(sprites) == 2 and sprites[0] != sprites[1]:
            first, second = batch.xy[i, :2]
            assert first[0] < second[0] - 0.2 or first[1] < second[1] - 0.2
            pairs.add(tuple(sprites))
        elif len(sprites) > 1:
            counts.add((len(sprites), sprites[0]))
    assert not pairs & held.pairs and {(b, a) for a, b in held.pairs} <= pairs
    assert not counts & held.counts and {(3, 0), (2, 1), (2, 8)} <= counts


def test_held_out_is_never_said(scenes):
    """The same in words, where a slip of the captions would show."""
    said = "\n".join(c.lower() for cs in scenes[1] for c in cs)
    colours = "green(.coloured|.colored)?"
    assert not re.search(rf"{colours} (cat|kitty)|(cat|kitty) (in|that is|which is|painted) green\b(?! back)", said)
    assert "red cat" in said and "green owl" in said
    thing = r"(the |a |one |\w+ )?"
    assert not re.search(rf"\b(cat|kitty) ((is )?(to the )?left of|beside|next to|and|above|over) {thing}dog", said)
    assert re.search(r"dog left of (the |a )?cat", said)
    assert not re.search(r"\b(two|2|pair of) (cats|kitties|kittys)|\b(three|3) dogs|\b(four|4) foxes", said)
    assert re.search(r"\bthree cats", said)


def test_words_of_place_agree_with_places(scenes):
    batch, captions = scenes
    seen = 0
    for i in rows_of(batch, "pair"):
        names = [NAMES[s] if s != 0 else "(cat|kitty)" for s in batch.sprite[i, :2]]
        names = [n.replace("red apple", "apple") for n in names]
        across = batch.xy[i, 0, 0] < batch.xy[i, 1, 0] - 0.2
        for text in map(str.lower, captions[i]):
            for a, b, word in ((0, 1, "left of|above"), (1, 0, "right of|below|beneath")):
                if re.search(rf"^\S* ?(\w+ )?{names[a]} (is )?(to the )?({word}) (\S+ )*?{names[b]}", text):
                    seen += 1
                    assert (batch.xy[i, a] < batch.xy[i, b])[0 if across else 1] == (a == 0)
            assert not (across and re.search("above|below|under|beneath", text)), text
            assert across or not re.search(r"\b(left|right|beside|next)\b", text), text
    assert seen > 1000


def test_number_words_agree_with_layers(scenes):
    batch, captions = scenes
    for i in rows_of(batch, "count"):
        n = int((batch.sprite[i] >= 0).sum())
        words = {2: "two|2|pair|couple|both", 3: "three|3", 4: "four|4"}
        for text in map(str.lower, captions[i]):
            body = text.replace("3d", "")
            assert [m for m, w in words.items() if re.search(rf"\b({w})\b", body)] == [n], text


def test_colour_words_agree_with_colours(scenes):
    batch, captions = scenes
    for i in rows_of(batch, "recolour"):
        for text in map(str.lower, captions[i]):
            if batch.colour[i, 0] >= 0:
                assert any(c in text for c in COLOURS[batch.colour[i, 0]].names), text
    named = [i for i, cs in enumerate(captions) if all("background" in c.lower() for c in cs)]
    values = {tuple(np.float32(v)) for v in BACKGROUNDS.values()}
    assert len(named) > 300 and all(tuple(batch.background[i]) in values for i in named)


def test_layers_are_whole_and_apart(scenes):
    batch, _ = scenes
    there = batch.sprite >= 0
    low, high = batch.xy - batch.size[..., None] / 2, batch.xy + batch.size[..., None] / 2
    assert (low[there] >= 0).all() and (high[there] <= 1).all()
    for a in range(4):
        for b in range(a):
            apart = ((low[:, a] >= high[:, b]) | (high[:, a] <= low[:, b])).any(-1)
            assert apart[there[:, a] & there[:, b]].all()
    assert np.allclose(np.bincount(batch.kind) / len(batch), (0.42, 0.16, 0.25, 0.12, 0.05), atol=0.015)


def test_same_seed_same_scenes(meta):
    held = load_heldout(meta, LISTS)
    one, two, other = (sample_scenes(300, s, meta, heldout=held) for s in (1, 1, 2))
    assert one[1] == two[1] and np.array_equal(one[0].xy, two[0].xy) and one[1] != other[1]
    assert all(len(c) == 4 for c in one[1])


def test_render_gives_pictures(meta, scenes):
    batch = scenes[0][:40]
    rgba = torch.randint(0, 256, (len(NAMES), 256, 256, 4), generator=torch.manual_seed(0), dtype=torch.uint8)
    atlas = make_atlas(torch.cat([rgba, shape_sprites()]))
    pictures = render(batch, atlas, 64, chunk=16)
    assert pictures.shape == (40, 3, 64, 64) and pictures.min() >= -1 - 1e-5 and pictures.max() <= 1 + 1e-5
    assert torch.allclose(pictures, render(batch, atlas, 64), atol=1e-5)
    assert len(to_images(pictures)) == 40


def test_render_puts_a_sprite_in_its_place():
    batch = SceneBatch(
        np.array([[0, -1, -1, -1]], np.int16),
        np.full((1, 4, 2), 0.25, np.float32),
        np.full((1, 4), 0.5, np.float32),
        np.full((1, 4), -1, np.int8),
        np.ones((1, 3), np.float32),
        np.zeros(1, np.int8),
    )
    red = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).expand(1, 256, 256, 4)
    picture = render(batch, make_atlas(red), 64, shadow=False)[0]
    assert torch.allclose(
        picture[:, 2:30, 2:30], torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 28, 28), atol=1e-4
    )
    assert (picture[:, 34:] == 1).all() and (picture[:, :, 34:] == 1).all()


@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_recoloured_sprite_has_the_hue(colour):
    rgba = torch.rand(8, 4, 16, 16, generator=torch.manual_seed(colour))
    rgba[:, :3] = (rgba[:, :3] * 0.4 + torch.rand(8, 3, 1, 1) * 0.6) * rgba[:, 3:]
    luma = (rgba[:, :3] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum((1, 2, 3)) / rgba[:, 3].sum((1, 2))
    new = recolour(rgba, torch.full((8,), colour), luma)
    for rgb in (new[:, :3].sum((2, 3)) / new[:, 3:].sum((2, 3))).tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        wanted = colorsys.rgb_to_hsv(*COLOURS[colour].rgb)
        if wanted[1] > 0.2:
            assert abs((hue - wanted[0] + 0.5) % 1 - 0.5) < 0.04 and saturation > 0.35
        else:
            assert saturation * value < 0.06 and abs(value - wanted[2]) < 0.25
    assert torch.equal(new[:, 3], rgba[:, 3])


def test_english():
    assert [
        plural(x) for x in ("slice of pizza", "mouse", "box", "cherry", "octopus", "pair of gloves", "glasses")
    ] == ["slices of pizza", "mice", "boxes", "cherries", "octopuses", "pairs of gloves", "glasses"]
    assert [with_article(x, x) for x in ("owl", "unicorn", "hourglass", "grapes", "t-shirt", "umbrella", "ewe")] == [
        "an owl",
        "a unicorn",
        "an hourglass",
        "grapes",
        "a t-shirt",
        "an umbrella",
        "a ewe",
    ]
    assert clean_name("woman: red hair") == "woman with red hair" and clean_name("man’s shoe") == "man's shoe"
    assert clean_name("family: man, woman, boy") == "family with man, woman and boy"


def test_shapes_are_whole():
    alpha = shape_sprites()[..., 3]
    assert len(alpha) == len(SHAPES)
    assert not alpha[:, [0, -1]].any() and not alpha[:, :, [0, -1]].any()
    assert ((alpha > 0).float().mean((1, 2)) > 0.15).all()
