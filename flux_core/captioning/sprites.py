"""Captions for pictures of flux-mini's world, by the nearest sprite: no download, a few milliseconds a thing.

A picture's ground is the median of its border, its things are the pixels that differ from it by more than a shadow.
What is there is cut at a gap, an empty row or column, where two parts look more like sprites than the whole does, and
the parts again. A thing is the sprite whose feature, by dinov2-mini, has the largest cosine with its own. `sprites`
beside that network holds all sprites' features and what they are called (`weights/recipe/sprite_features.py`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError
from ..hub.places import SCORER, scorer_folder
from ..methods.scoring import Scorer, load_scorer

FILE = "sprites.safetensors"
SIDE = 256
"""pixels that a picture's longest side is resized to"""
EDGE = 41
"""levels of 255 above which a pixel is no shadow"""
SPECKS = 24
"""pixels of the smallest thing"""
GAP = 3
"""empty rows or columns between two things"""
GAIN = 0.04
"""by which the cosines of parts have to be above the whole's, on average"""
LOSS = 0.1
"""by which they may be below it where all are the same thing, whose copies together look like it, too"""
MARGIN = 0.08
"""of a thing's longer side, around it"""
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, the last two exclusive"""


class Sprite(NamedTuple):
    """What a sprite is called."""

    name: str
    one: str
    """with its article"""
    many: str
    """its plural"""


class Thing(NamedTuple):
    """A thing in a picture."""

    sprite: int
    cosine: float
    box: Box


class Nearest:
    """Captions pictures by the nearest sprites."""

    name = "sprites"

    def __init__(self, scorer: Scorer, features: Tensor, sprites: Sequence[Sprite]) -> None:
        """features: of the sprites, unit vectors, fp32 [N, D]."""
        self.scorer, self.features, self.sprites = scorer, features, sprites

    def __call__(self, pictures: Sequence[Image.Image], keys: Sequence[str] = ()) -> list[str]:
        """A caption for each RGB picture; an empty one where nothing differs from the ground."""
        return [self.caption(picture) for picture in pictures]

    def caption(self, picture: Image.Image) -> str:
        """What is in a picture, in the words that flux-mini was trained on."""
        things = self.things(picture)
        names = [self.sprites[thing.sprite] for thing in things]
        if len(set(names)) == 1 and len(names) > 1:
            return f"{NUMBERS.get(len(names), str(len(names)))} {names[0].many}"
        if len(names) == 2:
            (a, b), (first, second) = (thing.box for thing in things), names
            across = abs(a[0] + a[2] - b[0] - b[2]) >= abs(a[1] + a[3] - b[1] - b[3])
            return f"{first.one} {'to the left of' if across else 'above'} {second.one}"
        *most, last = (name.one for name in names) if names else ("",)
        return f"{', '.join(most)} and {last}" if most else last

    def things(self, picture: Image.Image) -> list[Thing]:
        """The things in an RGB picture, from the left, or from above where they are cut so."""
        scale = SIDE / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
        ground = ground_of(pixels)
        mask = (np.abs(pixels.astype(np.int16) - ground) > EDGE).any(-1)
        box = tight(mask, (0, 0, mask.shape[1], mask.shape[0]))
        return self._explained(pixels, ground, mask, box, self._nearest(pixels, ground, mask, box)) if box else []

    def _explained(
        self, pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray, box: Box, whole: Thing
    ) -> list[Thing]:
        """What is in a box: one thing, or those of its two parts, whichever looks more like sprites."""
        best, kept = -1.0, [whole]
        for parts in cuts(mask, box):
            each = [self._nearest(pixels, ground, mask, part) for part in parts]
            things = [
                thing
                for part, one in zip(parts, each, strict=True)
                for thing in self._explained(pixels, ground, mask, part, one)
            ]
            mean = sum(thing.cosine for thing in things) / len(things)
            are_copies = {thing.sprite for thing in things} == {whole.sprite}
            if mean > max(best, whole.cosine + (-LOSS if are_copies else GAIN)):
                best, kept = mean, things
        return kept

    def _nearest(self, pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray, box: Box) -> Thing:
        cosines = self.features @ self.scorer.features([crop(pixels, ground, box)])[0]
        return Thing(int(cosines.argmax()), float(cosines.max()), box)


def ground_of(pixels: np.ndarray) -> np.ndarray:
    """The median colour [3] of a picture's border, three pixels wide. pixels: uint8 [H, W, 3]"""
    border = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    return np.median(np.concatenate([part.reshape(-1, 3) for part in border]), 0)


def tight(mask: np.ndarray, box: Box) -> Box | None:
    """The smallest box around what is inside a box; None for less than a speck."""
    left, top, right, bottom = box
    inside = mask[top:bottom, left:right]
    if inside.sum() < SPECKS:
        return None
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    return left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1


def cuts(mask: np.ndarray, box: Box) -> list[tuple[Box, Box]]:
    """A box cut in two at its widest empty gap, down and across; fewer without gaps."""
    left, top, right, bottom = box
    inside, found = mask[top:bottom, left:right], []
    if gap := widest(np.any(inside, axis=0)):
        found.append(((left, top, left + gap, bottom), (left + gap, top, right, bottom)))
    if gap := widest(np.any(inside, axis=1)):
        found.append(((left, top, right, top + gap), (left, top + gap, right, bottom)))
    pairs = [(tight(mask, first), tight(mask, second)) for first, second in found]
    return [(first, second) for first, second in pairs if first and second]


def widest(filled: np.ndarray) -> int:
    """The middle of the longest run of empty places between filled ones in a row; 0 if it is short."""
    at = np.flatnonzero(filled)
    runs = np.diff(at)
    longest = int(runs.argmax()) if len(runs) else 0
    return int(at[longest] + (runs[longest] + 1) // 2) if len(runs) and runs[longest] > GAP else 0


def crop(pixels: np.ndarray, ground: np.ndarray, box: Box) -> Image.Image:
    """A thing alone, in the middle of a square of its ground."""
    left, top, right, bottom = box
    longer = max(right - left, bottom - top)
    side = round(longer * (1 + 2 * MARGIN))
    sheet = Image.new("RGB", (side, side), tuple(int(level) for level in ground))
    part = Image.fromarray(pixels[top:bottom, left:right])
    sheet.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return sheet


def load_sprites(device: torch.device) -> Nearest:
    """The captioner that ships. FileError."""
    file = scorer_folder(SCORER) / FILE
    features, sprites = read_sprites(file)
    return Nearest(load_scorer(SCORER, device), features, sprites)


def read_sprites(file: Path) -> tuple[Tensor, list[Sprite]]:
    """Features of sprites, unit vectors, fp32 [N, D], and what they are called. FileError."""
    try:
        with safe_open(file, framework="pt") as opened:
            codes, words = opened.get_tensor("features"), json.loads(opened.metadata()["sprites"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{file} could not be read: {error}. Next: clone the repository again, whole") from None
    return F.normalize(codes.float(), dim=-1), [Sprite(*word) for word in words]
