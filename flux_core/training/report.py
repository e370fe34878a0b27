"""What should be known of a data set before training: near duplicates, blur, size, and captions.

Nothing is left out for it. Both measures are of pictures at a small size, so they say nothing of their pixels: a
difference hash (Krawetz 2013, "Kind of like that") of 64 bits, and the variance of the Laplacian (Pech-Pacheco et al.
2000) over that of the picture, so that it does not hang on contrast.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from .data import Found, Picture

NEAR, COLOUR = 2, 32
"""bits of 64 that differ at most, and levels of 255 of the mean colour, between near duplicates. Of 32 pictures by
flux-mini and Noto's 52 no two are nearer than 3 bits; 2 is the most when one is resized, or a JPEG of quality 50"""
BRIGHTER = 1
"""levels of 255 that count, so that noise on an even ground does not"""
BANDS = 4
"""of 16 bits, of which one is equal where fewer than 4 bits differ"""
EDGE = 256
"""pixels of the shorter side at which blur is measured, so relative to the picture; smaller ones as they are"""
BLURRED = 0.005
"""below: of 32 pictures by flux-mini and Noto's 52 none is (least 0.011); blurred by 3 of 256 pixels, 83 of 84 are"""
SHARED = 3
"""pictures of one caption that are told"""
NAMED = 3
"""pictures that a line names"""


class Look(NamedTuple):
    """What is kept of a picture's pixels."""

    bits: int
    """whether it gets brighter to the right, at 8 x 8 places"""
    colour: tuple[int, ...]
    """mean red, green and blue"""
    sharpness: float
    """0: of one colour"""


def look_at(image: Image.Image) -> Look:
    """The look of an upright RGB picture."""
    grey = image.convert("L")
    small = np.asarray(grey.convert("F").resize((9, 8), Image.Resampling.BOX))
    bits = (small[:, 1:] > small[:, :-1] + BRIGHTER).ravel()
    colour = np.asarray(image.resize((1, 1), Image.Resampling.BOX, reducing_gap=3.0)).ravel().tolist()
    return Look(int("".join("01"[int(bit)] for bit in bits), 2), tuple(colour), sharpness(grey))


def sharpness(grey: Image.Image) -> float:
    """The variance of the Laplacian over the variance of a picture in mode L, at `EDGE`."""
    shrink = min(1.0, EDGE / min(grey.size))
    size = (max(3, round(grey.width * shrink)), max(3, round(grey.height * shrink)))
    x = np.asarray(grey.resize(size, Image.Resampling.BOX, reducing_gap=3.0), dtype=np.float64)
    laplacian = 4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]
    return float(laplacian.var() / x.var()) if x.var() else 0.0


def near(pictures: Sequence["Picture"]) -> list[tuple["Picture", "Picture", int]]:
    """Pairs of pictures that are nearly the same, and by how many bits they differ."""
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, one in enumerate(pictures):
        for band in range(BANDS):
            bands[band, one.look.bits >> 16 * band & 0xFFFF].append(i)
    found = {pair for places in bands.values() for pair in combinations(places, 2)}
    return [
        (pictures[i], pictures[j], bits) for i, j in sorted(found)
        if (bits := _apart(pictures[i].look, pictures[j].look)) is not None
    ]  # fmt: skip


def _apart(one: Look, other: Look) -> int | None:
    """The bits in which near duplicates differ; None for others."""
    bits = (one.bits ^ other.bits).bit_count()
    alike = all(abs(a - b) <= COLOUR for a, b in zip(one.colour, other.colour, strict=True))
    return bits if bits <= NEAR and alike else None


def findings(found: "Found") -> list[str]:
    """Lines on what was found in a data set's folders, one for each kind of finding; none where all is well."""
    learned = [one for one in found.pictures if not one.prior]
    pairs = [f"{a.path.name} and {b.path.name} ({bits} of 64 bits)" for a, b, bits in near(found.pictures)]
    blurred = [one.path.name for one in found.pictures if one.look.sharpness < BLURRED]
    small = sorted(found.small, key=min)
    bare = [one for one in learned if one.bare]
    alike = [f"{count} pictures have {text!r}" for text, count in Counter(one.caption for one in learned).most_common()
             if count >= SHARED]  # fmt: skip
    return [
        *_line("near duplicates", pairs),
        *_line("blurred, or without detail", blurred),
        *([f"too small: {len(small)} pictures, of {small[0]} and more; a smaller --resolution keeps them"]
          if small else []),
        *([f"trigger: {len(bare)} of {len(learned)} captions were without it; it stands in front of them"]
          if bare else []),
        *_line("equal captions", alike),
    ]  # fmt: skip


def _line(what: str, names: Collection[str]) -> Iterable[str]:
    """A line with a count and the first names; none without any."""
    if names:
        first = list(names)[:NAMED]
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"{what}: {len(names)}: {'; '.join(first)}{more}"
