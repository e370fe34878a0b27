"""How well flux-mini follows edges and changes pictures, and how visible the borders of what it repaints are.

    python benchmarks/family.py ROOT [--each 20] [--kinds canny,kontext,repaint] [--guidance X] [--sheet FOLDER]

ROOT is the folder of the recipe's raw data (see `weights/README.md`). Scenes are rendered from numbers that no training
used. Prints a line of JSON:

- *canny*: `edges` is the intersection over union of the Canny maps of a drawn picture and of the scene that it follows,
  both three pixels wide beyond the line (an edge that is off by up to three pixels counts as kept); `without` is that
  of flux-mini's picture of the same caption and seed.
- *kontext*: `--each` edits of every kind of `weights/recipe/edits.py`. `happened`: by the criteria of
  `benchmarks/editing.py`. `untouched`: mean difference to the picture before, in levels of 255, where nothing should
  change: the object itself (ground) or its half (add). `outline`: intersection over union of the object's mask before
  and after (colour).
- *repaint*: a box around the thing in a picture is painted anew, by the name of another thing, and a picture is
  extended on both sides, by its own prompt. `…_at` is the mean step of brightness across the border of what was
  painted, `…_beside` that two pixels in and out of it, in levels of 255, medians over the pictures: equal steps are no
  seam.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import quality as q
from edits import KINDS, sample_edit
from heldout import load_heldout
from palette import BACKGROUNDS, COLOURS
from render import all_rgba, make_atlas, render, sheet, to_images
from scenes import Pools, pack, sample_scenes
from sprites import load_sprites

from flux_core import load_pipeline
from flux_core.vision.maps import canny

UNSEEN = 777
"""the seed of scenes; no stage of the recipe uses it"""
WIDE = 3
"""pixels by which an edge may be off"""
GROUNDS = "white", "light blue", "beige", "dark green"
MARGIN = 16
"""pixels around a thing that are painted with it"""


def edges_of(image: Image.Image) -> Tensor:
    """The Canny map of a picture, widened. [H, W]"""
    lines = torch.from_numpy(np.asarray(canny(image).convert("L")) > 0)
    return F.max_pool2d(lines[None, None].float(), 2 * WIDE + 1, 1, WIDE)[0, 0] > 0


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def rgb_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class Study:
    """The sprites, and the pictures drawn so far."""

    def __init__(self, root: Path, given: dict[str, Any]) -> None:
        self.sprites, self.given = load_sprites(root), given
        self.atlas = make_atlas(all_rgba(self.sprites))
        self.base = [i for i, tone in enumerate(self.sprites.tone) if not tone]
        self.shown: dict[str, list[tuple[str, Image.Image]]] = {}

    def show(self, kind: str, *named: tuple[str, Image.Image]) -> None:
        self.shown.setdefault(kind, []).extend(named)

    # What is measured --------------------------------------------------------------------------------------

    def canny(self, each: int) -> dict[str, float]:
        """Edges kept, with the map and without."""
        scenes, captions = sample_scenes(each, UNSEEN, self.sprites, k=1)
        pictures = to_images(render(scenes, self.atlas, 256))
        found: dict[str, list[float]] = {"edges": [], "without": []}
        models = {"edges": load_pipeline("flux-mini-canny"), "without": load_pipeline("flux-mini")}
        for seed, (picture, (caption,)) in enumerate(zip(tqdm(pictures, "canny"), captions, strict=True)):
            wanted, drawn = edges_of(picture), []
            for name, pipeline in models.items():
                seen = {"control": ("canny", picture)} if name == "edges" else {}
                drawn.append(pipeline.generate(caption, seed=seed, **seen, **self.given)[0])
                found[name].append(overlap(wanted, edges_of(drawn[-1])))
            self.show("canny", ("the scene", picture), ("its map", canny(picture)),
                      (f"{found['edges'][-1]:.2f} {caption}", drawn[0]),
                      (f"{found['without'][-1]:.2f} without", drawn[1]))  # fmt: skip
        return {name: round(statistics.mean(values), 3) for name, values in found.items()}

    def kontext(self, each: int) -> dict[str, Any]:
        """Edits that happen, and what they keep."""
        meta, pipeline = self.sprites.without_pixels(), load_pipeline("flux-mini-kontext")
        pools, rng = Pools(meta, load_heldout(meta)), random.Random(UNSEEN)
        happened: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        kept: dict[str, list[float]] = {"untouched": [], "outline": []}
        for seed in tqdm(range(each * len(KINDS)), "kontext"):
            kind = KINDS[seed % len(KINDS)]
            before, after, text, _ = sample_edit(rng, pools, kind)
            source, wanted = to_images(render(pack([before, after]), self.atlas, 256))
            drawn = pipeline.generate(text, seed=seed, reference=source, **self.given)[0]
            happened[kind].append(self.happened(kind, before, after, rgb_of(drawn)))
            self.keep(kept, kind, before, after, rgb_of(source), rgb_of(drawn))
            self.show(kind, ("before", source), (("" if happened[kind][-1] else "not: ") + text, drawn),
                      ("as rendered", wanted))  # fmt: skip
        total = [x for values in happened.values() for x in values]
        return {
            "happened": q.rate(total), **{kind: q.rate(values) for kind, values in happened.items()},
            **{name: round(statistics.mean(values), 3) for name, values in kept.items()},
        }  # fmt: skip

    def happened(self, kind: str, before: Any, after: Any, rgb: Tensor) -> bool:
        """Whether a picture [3, H, W] shows what was asked for."""
        ground = q.ground_of(rgb)
        if kind == "ground":
            palette = torch.tensor([*BACKGROUNDS.values()])
            nearest = palette[(palette - ground).norm(dim=1).argmin()]
            return torch.allclose(nearest, torch.tensor(after.background))
        if kind == "colour":
            sprite, mask = after.things[0].sprite, q.object_mask(rgb, ground)
            references = torch.stack([q.mean_colour(self.atlas, sprite, c) for c in range(len(COLOURS))])
            mean = rgb[:, mask].mean(1) if mask.any() else torch.zeros(3)
            tiles = q.sprite_tiles(self.atlas, self.base, ground, after.things[0].colour)
            right = int((references - mean).norm(dim=1).argmin()) == after.things[0].colour
            return right and q.shows(rgb, ground, self.base.index(sprite), tiles)
        halves = q.halves_of(rgb, ground, after.layout == "across")
        return all(
            q.shows(half, ground, self.base.index(thing.sprite),
                    q.sprite_tiles(self.atlas, self.base, ground, thing.colour))
            for half, thing in zip(halves, after.things, strict=True)
        )  # fmt: skip

    def keep(self, kept: dict[str, list[float]], kind: str, before: Any, after: Any, a: Tensor, b: Tensor) -> None:
        """Measure what should be as it was, of pictures [3, H, W] before and after."""
        mask = q.object_mask(a, q.ground_of(a))
        if kind == "colour":
            kept["outline"].append(overlap(mask, q.object_mask(b, q.ground_of(b))))
        elif mask.any():
            inside = ~(F.max_pool2d((~mask)[None, None].float(), 5, 1, 2)[0, 0] > 0)  # without soft edges
            where = inside if inside.any() else mask
            kept["untouched"].append(float((a - b).abs()[:, where].mean()) * 255)

    def repaint(self, each: int) -> dict[str, float]:
        """Seams of what was painted into pictures."""
        pipeline, rng = load_pipeline("flux-mini"), random.Random(UNSEEN)
        places = rng.sample(self.base, 2 * each)
        found: dict[str, list[float]] = {}
        for seed in tqdm(range(each), "repaint"):
            first, second = (
                q.with_article(self.sprites.names[i], self.sprites.names[i]) for i in places[2 * seed : 2 * seed + 2]
            )
            ground = f" on a {GROUNDS[seed % len(GROUNDS)]} background"
            picture = pipeline.generate(first + ground, seed=seed)[0]
            box = around(rgb_of(picture))
            mask = Image.new("L", picture.size)
            mask.paste(255, box)
            drawn = pipeline.generate(second + ground, seed=seed + 1, init_image=picture, mask=mask, **self.given)[0]
            wide = pipeline.generate(first + ground, seed=seed, init_image=picture, pad=(64, 0, 64, 0), **self.given)[0]
            for name, image, edges, sides in (
                ("repainted", drawn, box, "lrtb"), ("extended", wide, (64, 0, 320, 256), "lr"),
            ):  # fmt: skip
                for what, value in zip(("at", "beside"), seam(rgb_of(image), edges, sides), strict=True):
                    found.setdefault(f"{name}_{what}", []).append(value)
            self.show("repaint", (first, picture), (second, drawn))
            self.show("extended", (first, wide))
        return {name: round(statistics.median(values), 2) for name, values in found.items()}


def around(rgb: Tensor) -> tuple[int, int, int, int]:
    """The box around a picture's thing and MARGIN pixels more, inside the picture."""
    mask, size = q.object_mask(rgb, q.ground_of(rgb)), rgb.shape[-1]
    sides = [torch.nonzero(mask.any(axis)).flatten() for axis in (0, 1)]
    if not mask.any():
        return 64, 64, 192, 192
    low, high = ([int(side[i]) for side in sides] for i in (0, -1))
    left, top = (max(4, x - MARGIN) for x in low)
    right, bottom = (min(size - 4, x + MARGIN) for x in high)
    return left, top, right, bottom


def seam(rgb: Tensor, box: tuple[int, int, int, int], sides: str) -> tuple[float, float]:
    """The mean step of brightness across sides of a box, and two pixels in and out of it, in levels of 255."""
    grey, (left, top, right, bottom) = 255 * rgb.mean(0), box
    lines = {"l": (grey.T, left), "r": (grey.T, right), "t": (grey, top), "b": (grey, bottom)}
    found: dict[int, list[float]] = {-2: [], 0: [], 2: []}
    for side in sides:
        rows, edge = lines[side]
        span = slice(top, bottom) if side in "lr" else slice(left, right)
        for off, values in found.items():
            values.append((rows[edge + off, span] - rows[edge + off - 1, span]).abs().mean().item())
    return statistics.mean(found[0]), statistics.mean(found[-2] + found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--kinds", default="canny,kontext,repaint")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of each kind")
    args = parser.parse_args()

    given = {name: x for name in ("guidance", "num_steps") if (x := getattr(args, name)) is not None}
    study, figures = Study(args.root, given), {}
    for kind in args.kinds.split(","):
        figures[kind] = getattr(study, kind)(args.each)
    if args.sheet:
        args.sheet.mkdir(parents=True, exist_ok=True)
        for kind, shown in study.shown.items():
            columns = {"canny": 8, "repaint": 8, "extended": 4}.get(kind, 9)
            sheet([image for _, image in shown], [text for text, _ in shown], columns).save(args.sheet / f"{kind}.png")
    print(json.dumps({"benchmark": "family", "each": args.each, **given, **figures}))


if __name__ == "__main__":
    main()
