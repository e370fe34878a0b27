"""Scenes: what is in a picture, where, in which colour, and several ways to say it.

A scene is sampled first as *facts* (things with places, a background), its captions are then written from the
facts (`captions.py`), so that picture and words cannot disagree. Nothing here touches pixels: half a million
scenes are a few arrays, `render.py` turns a batch of them into pictures on the device when they are needed.

Layers come in reading order: of two things the first is the left or the upper one. What must never be trained
on is refused at the source, as sprite and colour numbers (`heldout.py`), so no wording can let it through.

    kind       share   example
    single     42%     "a picture of a fox", "car, 3d icon"
    recolour   16%     "a pig face that is green"
    pair       25%     "a red cat to the left of a dog on a light blue background"
    count      12%     "three slices of pizza"
    shape       5%     "a yellow star above a purple circle"
"""

import multiprocessing
import random
from bisect import bisect
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
from captions import Scene, Thing, write_captions
from heldout import HeldOut, load_heldout
from palette import BACKGROUNDS, COLOUR_ID, COLOURS
from shapes import SHAPES
from sprites import Sprites, plain_names
from words import is_mass, is_plural

KINDS = ("single", "recolour", "pair", "count", "shape")
SHARES = (0.42, 0.16, 0.25, 0.12, 0.05)
MAX_LAYERS = 4
CHUNK = 2048  # scenes per random stream: results do not depend on the number of workers


@dataclass
class SceneBatch:
    """Scenes as arrays, absent layers have sprite -1. Index it like an array."""

    sprite: np.ndarray  # int16 [B, 4]
    xy: np.ndarray  # float32 [B, 4, 2], the centre, the canvas is [0, 1]
    size: np.ndarray  # float32 [B, 4], a fraction of the canvas
    colour: np.ndarray  # int8 [B, 4], index into palette.COLOURS, -1 as it is
    background: np.ndarray  # float32 [B, 3]
    kind: np.ndarray  # int8 [B], index into KINDS

    def __len__(self) -> int:
        return len(self.sprite)

    def __getitem__(self, rows) -> "SceneBatch":
        return SceneBatch(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def concat(batches: list["SceneBatch"]) -> "SceneBatch":
        return SceneBatch(*(np.concatenate([getattr(b, f.name) for b in batches]) for f in fields(SceneBatch)))


def sample_scenes(
    n: int,
    seed: int,
    sprites_meta: Sprites,
    k: int = 4,
    workers: int = 1,
    heldout: HeldOut | None = None,
    pairs: float = SHARES[2],
) -> tuple[SceneBatch, list[list[str]]]:
    """`n` scenes and `k` captions for each; the same for a seed whatever the number of workers.

    `pairs` is the share of two things in a relation, which are the hardest to learn; the other kinds share the rest.
    """
    meta = sprites_meta.without_pixels()
    heldout = load_heldout(meta) if heldout is None else heldout
    jobs = [(min(CHUNK, n - i), seed * 1_000_003 + i, meta, k, heldout) for i in range(0, n, CHUNK)]
    if workers > 1:
        with multiprocessing.get_context("fork").Pool(workers, _start, (meta, heldout, pairs)) as pool:
            done = pool.map(_work, [(m, s, k) for m, s, _, k, _ in jobs], chunksize=1)
    else:
        pools = Pools(meta, heldout, pairs)
        done = [_chunk(m, s, k, pools) for m, s, _, k, _ in jobs]
    return SceneBatch.concat([d[0] for d in done]), [c for d in done for c in d[1]]


_pools: "Pools | None" = None  # one per worker process, set by _start


def _start(meta: Sprites, heldout: HeldOut, pairs: float) -> None:
    global _pools
    _pools = Pools(meta, heldout, pairs)


def _work(job: tuple[int, int, int]) -> tuple[SceneBatch, list[list[str]]]:
    return _chunk(*job, _pools)


def _chunk(n: int, seed: int, k: int, pools: "Pools") -> tuple[SceneBatch, list[list[str]]]:
    rng = random.Random(seed)
    scenes = [sample_scene(rng, pools) for _ in range(n)]
    return pack(scenes), [write_captions(rng, s, k) for s in scenes]


def pack(scenes: list[Scene]) -> SceneBatch:
    n = len(scenes)
    batch = SceneBatch(
        np.full((n, MAX_LAYERS), -1, np.int16),
        np.full((n, MAX_LAYERS, 2), 0.5, np.float32),
        np.full((n, MAX_LAYERS), 0.5, np.float32),
        np.full((n, MAX_LAYERS), -1, np.int8),
        np.array([s.background for s in scenes], np.float32).reshape(n, 3),
        np.array([KINDS.index(s.kind) for s in scenes], np.int8),
    )
    for i, s in enumerate(scenes):
        for j, (thing, (x, y, size)) in enumerate(zip(s.things, s.places, strict=True)):
            batch.sprite[i, j], batch.colour[i, j] = thing.sprite, thing.colour
            batch.xy[i, j], batch.size[i, j] = (x, y), size
    return batch


# What can be drawn from ----------------------------------------------------------------------------


class Pools:
    """Lists to draw objects from, made once from the names."""

    def __init__(self, meta: Sprites, heldout: HeldOut, pairs: float = SHARES[2]) -> None:
        others = (1 - pairs) / (1 - SHARES[2])
        self.shares = [pairs if kind == "pair" else others * x for kind, x in zip(KINDS, SHARES, strict=True)]
        self.meta, self.heldout, self.names = meta, heldout, set(meta.names)
        self.cumulative = list(accumulate(meta.weight))
        self.countable = [i for i, c in enumerate(meta.countable) if c]
        self.base = [i for i, t in enumerate(meta.tone) if not t and "," not in meta.names[i]]
        self.plain = plain_names(meta)
        self.recolourable = [i for i in self.countable if i in self.plain]
        self.numberable = [i for i in self.countable if not (is_plural(meta.names[i]) or is_mass(meta.names[i]))]

    def any(self, rng: random.Random) -> Thing:
        i = bisect(self.cumulative, rng.random() * self.cumulative[-1])
        return self.thing(min(i, len(self.meta) - 1), keywords=True)

    def thing(self, i: int, keywords: bool = False) -> Thing:
        return Thing(i, -1, self.meta.names[i], self.meta.aliases[i], self.meta.keywords[i] if keywords else [])

    def recoloured(self, rng: random.Random, i: int) -> Thing:
        """Sprite i in a colour that is neither held out nor the name of another sprite ("green apple")."""
        if i not in self.plain:
            return self.thing(i)
        for _ in range(8):
            colour = rng.randrange(len(COLOURS))
            if (colour, i) not in self.heldout.colours and not self.is_a_name(colour, i):
                return Thing(i, colour, self.plain[i], [a for a in self.meta.aliases[i] if self.allows(colour, a)])
        return self.thing(i)

    def is_a_name(self, colour: int, i: int) -> bool:
        return any(f"{c} {n}" in self.names for c in COLOURS[colour].names for n in (self.plain[i],))

    def allows(self, colour: int, alias: str) -> bool:
        return not has_colour(alias) and all(f"{c} {alias}" not in self.names for c in COLOURS[colour].names)

    def shape(self, rng: random.Random) -> Thing:
        s = rng.randrange(len(SHAPES))
        return Thing(len(self.meta) + s, rng.randrange(len(COLOURS)), SHAPES[s][0], list(SHAPES[s][1:]))


def has_colour(name: str) -> bool:
    return any(w in COLOUR_ID for w in name.replace("-", " ").split())


# Scenes --------------------------------------------------------------------------------------------


def sample_scene(rng: random.Random, pools: Pools) -> Scene:
    kind = rng.choices(KINDS, pools.shares)[0]
    scene = {"single": _single, "recolour": _recolour, "pair": _pair, "count": _count, "shape": _shape}[kind](
        rng, pools
    )
    scene.kind = kind
    _background(rng, scene)
    return scene


_BACKGROUND_NAMES: dict[tuple[float, ...], list[str]] = {}  # the names of each: gray and grey are one
for _name, _rgb in BACKGROUNDS.items():
    _BACKGROUND_NAMES.setdefault(_rgb, []).append(_name)


def _background(rng: random.Random, scene: Scene) -> None:
    """Named for 40%; otherwise white or any soft colour. Nothing is painted on its own colour."""
    taken = {name for t in scene.things if t.colour >= 0 for name in COLOURS[t.colour].names}
    if rng.random() < 0.40:
        name = rng.choice([n for n in rng.choice(list(_BACKGROUND_NAMES.values())) if n not in taken] or ["white"])
        scene.background, scene.background_name = BACKGROUNDS[name], name
    elif rng.random() < 0.70:
        scene.background = (1.0, 1.0, 1.0)
    else:
        level = rng.uniform(0.80, 0.97)
        scene.background = tuple(min(1.0, level + rng.uniform(-0.10, 0.10)) for _ in range(3))


def _alone(rng: random.Random, thing: Thing) -> Scene:
    draw = rng.random()
    if draw < 0.06:
        size, word = rng.uniform(0.30, 0.44), rng.choice(("small", "small", "tiny", "little"))
    elif draw < 0.11:
        size, word = rng.uniform(0.92, 0.97), rng.choice(("big", "large", "huge"))
    else:
        size, word = rng.triangular(0.62, 0.92, 0.86), ""
    return Scene("single", [thing], [_within(rng, (0, 0, 1, 1), size, 0.05)], "alone", size_word=word)


def _single(rng: random.Random, pools: Pools) -> Scene:
    return _alone(rng, pools.any(rng))


def _recolour(rng: random.Random, pools: Pools) -> Scene:
    return _alone(rng, pools.recoloured(rng, rng.choice(pools.recolourable)))


def _pair(rng: random.Random, pools: Pools) -> Scene:
    while True:
        first, second = (rng.choice(pools.countable if rng.random() < 0.88 else pools.base) for _ in range(2))
        if first != second and (first, second) not in pools.heldout.pairs:
            break
    coloured = rng.choice(((True, True), (True, False), (False, True))) if rng.random() < 0.25 else (False, False)
    return _beside(
        rng,
        *(pools.recoloured(rng, i) if c else pools.thing(i) for i, c in zip((first, second), coloured, strict=True)),
    )


def _beside(rng: random.Random, first: Thing, second: Thing) -> Scene:
    """Each whole in its half: left and right, or above and below."""
    across = rng.random() < 0.5
    halves = ((0, 0, 0.5, 1), (0.5, 0, 1, 1)) if across else ((0, 0, 1, 0.5), (0, 0.5, 1, 1))
    places = [_within(rng, half, rng.uniform(0.37, 0.47), 0.05) for half in halves]
    return Scene("pair", [first, second], places, "across" if across else "down")


def _count(rng: random.Random, pools: Pools) -> Scene:
    while True:
        i, n = rng.choice(pools.numberable), rng.choice((2, 2, 3, 3, 4))
        if (n, i) not in pools.heldout.counts:
            break
    return _several(rng, pools.recoloured(rng, i) if rng.random() < 0.25 else pools.thing(i), n)


# fmt: off
_CELLS = {2: [((0, 0, 0.5, 1), (0.5, 0, 1, 1))] * 3 + [((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))],
          3: [((0, 0, 1 / 3, 1), (1 / 3, 0, 2 / 3, 1), (2 / 3, 0, 1, 1)),
              ((0.25, 0, 0.75, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)),
              ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0.25, 0.5, 0.75, 1))],
          4: [((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))]}
# fmt: on


def _several(rng: random.Random, thing: Thing, n: int) -> Scene:
    """Copies in cells that do not touch: in a row, a triangle, a square."""
    cells = rng.choice(_CELLS[n])
    width = cells[0][2] - cells[0][0]
    size = width * rng.uniform(0.78, 0.92)
    places = [_within(rng, cell, size * rng.uniform(0.97, 1.0), 0.03) for cell in cells]
    return Scene("count", [thing] * n, places, "several")


def _shape(rng: random.Random, pools: Pools) -> Scene:
    form = rng.random()
    if form < 0.50:
        return _alone(rng, pools.shape(rng))
    if form < 0.70:
        return _several(rng, pools.shape(rng), rng.choice((2, 3, 4)))
    things = [pools.shape(rng), pools.shape(rng) if form < 0.92 else pools.thing(rng.choice(pools.countable))]
    while things[0].sprite == things[1].sprite:
        things[1] = pools.shape(rng)
    rng.shuffle(things)
    return _beside(rng, *things)


def _within(rng: random.Random, cell: tuple[float, ...], size: float, jitter: float) -> tuple[float, float, float]:
    """A place (x, y, size) near the middle of the cell (x0, y0, x1, y1), with the object wholly inside it."""
    x0, y0, x1, y1 = cell

    def coordinate(a: float, b: float) -> float:
        free = max(0.0, min(jitter, (b - a - size) / 2 - 0.004))
        return (a + b) / 2 + rng.uniform(-free, free)

    return coordinate(x0, x1), coordinate(y0, y1), size
