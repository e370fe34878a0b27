"""Held-out combinations of objects that training only sees apart, for tests of composition.

Colours with objects, ordered pairs (A left of B, or above it), numbers of objects. The lists were drawn once,
are kept as names in heldout.json, and act as sprite and colour numbers. Only clear, short names take part: no
two sprites share them, none contains a colour, no "face" twin would show the answer, and none is a part of
another's name (a "purple ear of corn" says "purple ear").

    python weights/recipe/heldout.py ROOT      # would write the same file again
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from palette import COLOUR_ID, COLOURS
from sprites import Sprites, load_sprites, plain_names
from words import is_mass, is_plural

FILE = Path(__file__).with_name("heldout.json")
SEED, N_COLOURS, N_PAIRS, N_COUNTS = 20, 240, 300, 120
ABSTRACT = {
    "cooking",
    "camping",
    "construction",
    "performing arts",
    "high voltage",
    "milky way",
    "station",
    "wedding",
    "national park",
    "label",
    "metro",
    "link",
    "joker",
    "knot",
    "pick",
    "mate",
    "cricket game",
}


@dataclass(frozen=True)
class HeldOut:
    colours: frozenset[tuple[int, int]]  # (colour, sprite)
    pairs: frozenset[tuple[int, int]]  # (left or upper sprite, right or lower sprite)
    counts: frozenset[tuple[int, int]]  # (number, sprite)


def load_heldout(meta: Sprites, lists: dict[str, list] | None = None) -> HeldOut:
    """The lists of names as numbers for this table of sprites; names it does not have are passed over."""
    lists = json.loads(FILE.read_text(encoding="utf-8")) if lists is None else lists
    at = {name: i for i, name in enumerate(meta.names)}
    return HeldOut(
        frozenset((COLOUR_ID[c], at[x]) for c, x in lists["colours"] if x in at),
        frozenset((at[a], at[b]) for a, b in lists["pairs"] if a in at and b in at),
        frozenset((n, at[x]) for n, x in lists["counts"] if x in at),
    )


def clear_names(meta: Sprites) -> list[str]:
    twins = {n.removesuffix(" face") for n in meta.names if n.endswith(" face")}
    endings = [n.split() for n in meta.names]
    heads = {tuple(words[-1:]) for words in endings if len(words) > 1}
    return [
        n
        for n, ok in zip(meta.names, meta.countable, strict=True)
        if ok
        and len(n.split()) <= 2
        and n not in twins
        and n not in ABSTRACT
        and not n.endswith((" face", "heart"))
        and not any(w in COLOUR_ID for w in n.split())
        and (n,) not in heads
    ]


def is_part(name: str, meta: Sprites) -> bool:
    """Whether another name, or another sprite's alias, has these words within it."""
    own = meta.names.index(name)
    others = (n for i, n in enumerate(meta.names) if i != own)
    aliases = (a for i, words in enumerate(meta.aliases) if i != own for a in words)
    return any(f" {name} " in f" {x} " for x in (*others, *aliases))


def draw(meta: Sprites, seed: int = SEED) -> dict[str, list]:
    rng = random.Random(seed)
    names = clear_names(meta)
    plain = {meta.names[i] for i in plain_names(meta)}
    paint = [n for n in names if n in plain]
    single = [n for n in names if not is_plural(n) and not is_mass(n)]
    rng.shuffle(paint)
    colours = [(COLOURS[i % len(COLOURS)].names[0], paint[i]) for i in range(N_COLOURS)]
    pairs = {tuple(rng.sample(single, 2)): None for _ in range(N_PAIRS)}
    rng.shuffle(single)
    counts = [(2 + i % 3, single[i]) for i in range(N_COUNTS)]
    parts = {n for n in names if is_part(n, meta)}
    lists = {"colours": colours, "pairs": pairs, "counts": counts}
    return {key: sorted(row for row in rows if not parts & set(row)) for key, rows in lists.items()}


def main(root: str) -> None:
    lists = draw(load_sprites(root, pixels=False))
    rows = (f'"{key}": [\n' + ",\n".join(json.dumps(row) for row in value) + "\n]" for key, value in lists.items())
    FILE.write_text("{" + ",\n".join(rows) + "}\n", encoding="utf-8")
    print({key: len(value) for key, value in lists.items()})


if __name__ == "__main__":
    main(sys.argv[1])
