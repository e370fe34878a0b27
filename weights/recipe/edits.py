"""Pairs of scenes, and the words that make the second of the first: another colour, another ground, a second thing.

    kind     share   example
    colour   40%     "make it green", "paint the fox red"
    ground   30%     "put it on a blue background"
    add      30%     "add a cat to the right", "a dog below it"

What is held out of training (`heldout.py`) is held out here, too: a pair of things, a colour of a thing.
"""

import random
from dataclasses import replace

from captions import Scene, Thing
from palette import BACKGROUNDS, COLOURS
from scenes import Pools, SceneBatch, pack
from scenes import _alone as alone
from scenes import _background as draw_background
from scenes import _beside as beside
from words import article, with_article

KINDS, SHARES = ("colour", "ground", "add"), (0.4, 0.3, 0.3)
# fmt: off
COLOUR = ("make it {c}", "make it {c}", "make the {x} {c}", "turn it {c}", "paint it {c}", "paint the {x} {c}",
          "in {c}", "change its colour to {c}", "change the colour to {c}", "it should be {c}", "now in {c}",
          "the {x} should be {c}", "{c}, please", "recolour it {c}")
GROUND = ("put it on {a} {c} background", "put it on {a} {c} background", "on {a} {c} background",
          "make the background {c}", "change the background to {c}", "put it on {a} {c} ground",
          "with {a} {c} background", "{c} background", "put the {x} on {a} {c} background",
          "the background should be {c}", "now on {c}")
ADD = {
    ("across", 1): ("add {b} to the right", "add {b} to the right of it", "put {b} to the right of it",
                    "with {b} on the right", "add {b} on the right", "now with {b} to its right"),
    ("across", 0): ("add {b} to the left", "add {b} to the left of it", "put {b} to the left of it",
                    "with {b} on the left", "add {b} on the left", "now with {b} to its left"),
    ("down", 1): ("add {b} below", "add {b} below it", "put {b} below it", "put {b} under it", "with {b} below"),
    ("down", 0): ("add {b} above", "add {b} above it", "put {b} above it", "put {b} on top of it", "with {b} above"),
}
NEXT_TO = ("add {b} next to it", "add {b}", "put {b} beside it", "a second thing: {b}")
"""said where the place is the only free one, too"""
# fmt: on


def sample_edits(n: int, seed: int, pools: Pools) -> tuple[SceneBatch, SceneBatch, list[str], list[str]]:
    """Scenes before and after, instructions, and the kind of each."""
    rng = random.Random(seed)
    made = [sample_edit(rng, pools) for _ in range(n)]
    before, after, texts, kinds = zip(*made, strict=True)
    return pack(list(before)), pack(list(after)), list(texts), list(kinds)


def sample_edit(rng: random.Random, pools: Pools, kind: str = "") -> tuple[Scene, Scene, str, str]:
    """One of them."""
    kind = kind or rng.choices(KINDS, SHARES)[0]
    before, after, text = {"colour": _colour, "ground": _ground, "add": _add}[kind](rng, pools)
    text = text[0].upper() + text[1:] if rng.random() < 0.1 else text
    return before, after, text + ("." if rng.random() < 0.1 else ""), kind


def _colour(rng: random.Random, pools: Pools) -> tuple[Scene, Scene, str]:
    i = rng.choice(pools.recolourable)
    first = pools.recoloured(rng, i) if rng.random() < 0.4 else pools.thing(i)
    while (second := pools.recoloured(rng, i)).colour in (-1, first.colour):
        i = rng.choice(pools.recolourable)
        first = pools.thing(i)
    before = alone(rng, first)
    draw_background(rng, before)
    if before.background_name in COLOURS[second.colour].names:  # nothing is painted on its own colour
        before.background, before.background_name = (1.0, 1.0, 1.0), ""
    after = replace(before, things=[second])
    return before, after, rng.choice(COLOUR).format(x=second.name, c=rng.choice(COLOURS[second.colour].names))


def _ground(rng: random.Random, pools: Pools) -> tuple[Scene, Scene, str]:
    before = alone(rng, pools.recoloured(rng, rng.choice(pools.recolourable)) if rng.random() < 0.3 else pools.any(rng))
    draw_background(rng, before)
    taken = {name for thing in before.things if thing.colour >= 0 for name in COLOURS[thing.colour].names}
    names = [name for name, rgb in BACKGROUNDS.items() if name not in taken and rgb != before.background]
    name = rng.choice(names)
    after = replace(before, background=BACKGROUNDS[name], background_name=name)
    text = rng.choice(GROUND).format(a=article(name), c=name, x=before.things[0].name)
    return before, after, text


def _add(rng: random.Random, pools: Pools) -> tuple[Scene, Scene, str]:
    while True:
        first, second = (rng.choice(pools.countable) for _ in range(2))
        if first != second and (first, second) not in pools.heldout.pairs:
            break
    things = [pools.recoloured(rng, i) if rng.random() < 0.15 else pools.thing(i) for i in (first, second)]
    after = beside(rng, *things)
    draw_background(rng, after)
    added = rng.randrange(2)
    kept, new = 1 - added, things[added]
    before = replace(after, things=[after.things[kept]], places=[after.places[kept]])
    ways = ADD[after.layout, added] if rng.random() < 0.85 else NEXT_TO
    return before, after, rng.choice(ways).format(b=with_article(_said(new), new.name))


def _said(thing: Thing) -> str:
    return thing.name if thing.colour < 0 else f"{COLOURS[thing.colour].names[0]} {thing.name}"
