"""How well flux-mini follows edges and depth, changes and mixes pictures, and how visible borders of repainting are.

    python benchmarks/family.py ROOT [--each 20] [--kinds canny,kontext,repaint] [--guidance X] [--sheet FOLDER]
    FLUX_MINI_DEPTH_LORA=FILE python benchmarks/family.py ROOT --kinds depth   # fill, redux: likewise
    python benchmarks/family.py ROOT --kinds controlnet --controlnet FILE

ROOT is the folder of the recipe's raw data (see `weights/README.md`). Scenes are rendered from numbers that no training
used. What does not ship is made by the recipe. Prints a line of JSON:

- *canny*: `edges` is the intersection over union of the Canny maps of a drawn picture and of the scene that it follows,
  both three pixels wide beyond the line (an edge that is off by up to three pixels counts as kept); `without` is that
  of flux-mini's picture of the same caption and seed.
- *kontext*: `--each` edits of every kind of `weights/recipe/edits.py`. `happened`: by the criteria of
  `benchmarks/editing.py`. `untouched`: mean difference to the picture before, in levels of 255, where nothing should
  change: the object itself (ground) or its half (add). `outline`: intersection over union of the object's mask before
  and after (colour).
- *repaint*: a box around the thing in a picture is painted anew, by the name of another thing, and the middle half of
  a picture is extended on both sides to its size, by its own prompt. `…_at` is the mean step of brightness across the
  border of what was painted, `…_beside` that two pixels in and out of it, in levels of 255, medians over the pictures:
  equal steps are no seam. `named`: share of the boxes in which the nearest sprite is the thing asked for.
- *fill*: the same of the same pictures by flux-mini-fill.
- *controlnet*: as canny, by flux-mini and the ControlNet of `--controlnet` at three scales.
- *depth*: intersection over union of the silhouettes in a map, and of a drawn picture's objects: by the scene's own
  caption, by that of another scene, and `without` the map. `rendered`: of the scene itself, which is the most.
- *redux*: two pictures of a picture of a painted thing, without words: `object`, `colour`, and both (`redux`), by the
  criteria of `benchmarks/quality.py`. `mixed`: share of pictures of two such pictures that show both.
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
from captions import Thing
from depths import depth
from edges import canny as without_opencv
from edits import KINDS, sample_edit
from heldout import load_heldout
from palette import BACKGROUNDS, COLOURS
from render import all_rgba, make_atlas, render, sheet, to_images
from scenes import Pools, pack, sample_scenes
from scenes import _alone as alone
from scenes import _background as draw_background
from sprites import load_sprites

from flux_core import load_pipeline
from flux_core.vision.maps import canny, map_picture

UNSEEN = 777
"""the seed of scenes; no stage of the recipe uses it"""
WIDE = 3
"""pixels by which an edge may be off"""
GROUNDS = "white", "light blue", "beige", "dark green"
MARGIN = 16
"""pixels around a thing that are painted with it"""
SCALES = 0.0, 0.5, 1.0
"""of a ControlNet"""
WEIGHTS = (1.0, 1.0), (1.0, 0.5), (0.5, 1.0)
"""of two pictures that are mixed"""


def edges_of(image: Image.Image) -> Tensor:
    """The Canny map of a picture, widened. [H, W]"""
    return widened(canny(image))


def lines_of(image: Image.Image) -> Image.Image:
    """A Canny map on a machine without OpenCV."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return Image.fromarray(255 * without_opencv(pixels)[0].byte().numpy()).convert("RGB")


def widened(map: Image.Image) -> Tensor:
    """The lines of a map, [H, W]."""
    lines = torch.from_numpy(np.asarray(map.convert("L")) > 0)
    return F.max_pool2d(lines[None, None].float(), 2 * WIDE + 1, 1, WIDE)[0, 0] > 0


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def rgb_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


class Study:
    """The sprites, and the pictures drawn so far."""

    def __init__(self, root: Path, given: dict[str, Any], controlnet: Path | None) -> None:
        self.sprites, self.given, self.net = load_sprites(root), given, controlnet
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
            return all(self.painted(rgb, after.things[0]))
        halves = q.halves_of(rgb, ground, after.layout == "across")
        return all(self.shows(half, ground, thing) for half, thing in zip(halves, after.things, strict=True))

    def shows(self, rgb: Tensor, ground: Tensor, thing: Thing) -> bool:
        """Whether the object of a picture [3, H, W] is that thing, among all in its colour."""
        tiles = q.sprite_tiles(self.atlas, self.base, ground, thing.colour)
        return q.shows(rgb, ground, self.base.index(thing.sprite), tiles)

    def painted(self, rgb: Tensor, thing: Thing) -> tuple[bool, bool]:
        """Whether a picture's object has the colour of a painted thing, and whether it is that thing."""
        ground = q.ground_of(rgb)
        mask = q.object_mask(rgb, ground)
        references = torch.stack([q.mean_colour(self.atlas, thing.sprite, c) for c in range(len(COLOURS))])
        mean = rgb[:, mask].mean(1) if mask.any() else torch.zeros(3)
        return int((references - mean).norm(dim=1).argmin()) == thing.colour, self.shows(rgb, ground, thing)

    def keep(self, kept: dict[str, list[float]], kind: str, before: Any, after: Any, a: Tensor, b: Tensor) -> None:
        """Measure what should be as it was, of pictures [3, H, W] before and after."""
        mask = q.object_mask(a, q.ground_of(a))
        if kind == "colour":
            kept["outline"].append(overlap(mask, q.object_mask(b, q.ground_of(b))))
        elif mask.any():
            inside = ~(F.max_pool2d((~mask)[None, None].float(), 5, 1, 2)[0, 0] > 0)  # without soft edges
            where = inside if inside.any() else mask
            kept["untouched"].append(float((a - b).abs()[:, where].mean()) * 255)

    def depth(self, each: int) -> dict[str, float]:
        """Silhouettes kept, by two prompts and without the map."""
        scenes, captions = sample_scenes(2 * each, UNSEEN, self.sprites, k=1)
        maps, pictures = (x(scenes[:each], self.atlas, 256) for x in (depth, render))
        follows, plain = load_pipeline("flux-mini-depth"), load_pipeline("flux-mini")
        found: dict[str, list[float]] = {}
        for seed, (near, picture) in enumerate(zip(tqdm(maps, "depth"), pictures, strict=True)):
            (caption,), (other,) = captions[seed], captions[seed + each]
            map = map_picture((2 * near - 1).expand(1, 3, -1, -1))
            drawn = {
                "own": (caption, follows.generate(caption, seed=seed, control=map, **self.given)[0]),
                "other": (other, follows.generate(other, seed=seed, control=map, **self.given)[0]),
                "without": ("without", plain.generate(caption, seed=seed, **self.given)[0]),
            }
            seen = {name: rgb_of(image) for name, (_, image) in drawn.items()} | {"rendered": (picture + 1) / 2}
            for name, rgb in seen.items():
                found.setdefault(name, []).append(overlap(near > 0.1, q.object_mask(rgb, q.ground_of(rgb))))
            self.show("depth", ("its map", map),
                      *((f"{found[name][-1]:.2f} {text}", image) for name, (text, image) in drawn.items()))  # fmt: skip
        return means(found)

    def controlnet(self, each: int) -> dict[str, float]:
        """Edges kept at several scales of a ControlNet."""
        scenes, captions = sample_scenes(each, UNSEEN, self.sprites, k=1)
        pipeline, found = load_pipeline("flux-mini"), {f"{scale:g}": [] for scale in SCALES}
        for seed, picture in enumerate(tqdm(to_images(render(scenes, self.atlas, 256)), "controlnet")):
            map = lines_of(picture)
            self.show("controlnet", ("its map", map))
            for scale in SCALES:
                image = pipeline.generate(captions[seed][0], seed, controlnet=[(self.net, map, scale)], **self.given)[0]
                found[f"{scale:g}"].append(overlap(widened(map), widened(lines_of(image))))
                self.show("controlnet", (f"{found[f'{scale:g}'][-1]:.2f} at {scale:g}: {captions[seed][0]}", image))
        return means(found)

    def redux(self, each: int) -> dict[str, float]:
        """What pictures of pictures show, without words."""
        meta, pipeline, rng = self.sprites.without_pixels(), load_pipeline("flux-mini-redux"), random.Random(UNSEEN)
        pools, found = Pools(meta, load_heldout(meta)), {}
        before: tuple[Image.Image, Thing] | None = None
        for seed in tqdm(range(each), "redux"):
            picture, thing = self.painted_thing(rng, pools)
            drawn = [pipeline.generate("", seed=2 * seed + i, reference=picture, **self.given)[0] for i in range(2)]
            self.show("redux", (f"seen: {COLOURS[thing.colour].names[0]} {thing.name}", picture))
            for image in drawn:
                right = dict(zip(("colour", "object"), self.painted(rgb_of(image), thing), strict=True))
                right["redux"] = all(right.values())
                for name, value in right.items():
                    found.setdefault(name, []).append(value)
                self.show("redux", ("" if right["redux"] else "not right", image))
            if before is not None:
                found.setdefault("mixed", []).append(self.mix(pipeline, seed, before, (picture, thing)))
            before = picture, thing
        return {name: q.rate(values) for name, values in found.items()}

    def painted_thing(self, rng: random.Random, pools: Pools) -> tuple[Image.Image, Thing]:
        """A picture of something in a colour."""
        while (thing := pools.recoloured(rng, rng.choice(pools.recolourable))).colour < 0:
            pass
        scene = alone(rng, thing)
        draw_background(rng, scene)
        return to_images(render(pack([scene]), self.atlas, 256))[0], thing

    def mix(self, pipeline: Any, seed: int, *two: tuple[Image.Image, Thing]) -> bool:
        """Whether a picture of two pictures shows both things; others are drawn at other weights."""
        self.show("mixed", *(("seen", picture) for picture, _ in two))
        drawn = []
        for weights in WEIGHTS:
            pictures = [(picture, weight) for (picture, _), weight in zip(two, weights, strict=True)]
            drawn.append(pipeline.generate("", seed=seed, reference=pictures, **self.given)[0])
            self.show("mixed", ("weights {:g}, {:g}".format(*weights), drawn[-1]))
        rgb = rgb_of(drawn[0])
        ground = q.ground_of(rgb)
        ways = [q.halves_of(rgb, ground, across)[::order] for across in (True, False) for order in (1, -1)]
        return any(
            all(self.shows(half, ground, thing) for half, (_, thing) in zip(way, two, strict=True)) for way in ways
        )

    def fill(self, each: int) -> dict[str, float]:
        """`repaint`, by the model that sees what is kept."""
        return self.repaint(each, "flux-mini-fill")

    def repaint(self, each: int, name: str = "flux-mini") -> dict[str, float]:
        """Seams of what was painted into flux-mini's pictures."""
        pipeline, rng = load_pipeline("flux-mini"), random.Random(UNSEEN)
        painter = pipeline if name == "flux-mini" else load_pipeline(name)
        places = rng.sample(self.base, 2 * each)
        found: dict[str, list[float]] = {}
        named: list[bool] = []
        for seed in tqdm(range(each), name):
            first, second = (
                q.with_article(self.sprites.names[i], self.sprites.names[i]) for i in places[2 * seed : 2 * seed + 2]
            )
            ground = f" on a {GROUNDS[seed % len(GROUNDS)]} background"
            picture = pipeline.generate(first + ground, seed=seed)[0]
            box = around(rgb_of(picture))
            mask = Image.new("L", picture.size)
            mask.paste(255, box)
            drawn = painter.generate(second + ground, seed=seed + 1, init_image=picture, mask=mask, **self.given)[0]
            middle = picture.crop((64, 0, 192, 256))
            wide = painter.generate(first + ground, seed + 1, init_image=middle, pad=(64, 0, 64, 0), **self.given)[0]
            rgb = rgb_of(drawn)
            named.append(self.shows(rgb, q.ground_of(rgb), Thing(places[2 * seed + 1], -1, second, [])))
            for part, image, edges, sides in (
                ("repainted", drawn, box, "lrtb"), ("extended", wide, (64, 0, 192, 256), "lr"),
            ):  # fmt: skip
                for what, value in zip(("at", "beside"), seam(rgb_of(image), edges, sides), strict=True):
                    found.setdefault(f"{part}_{what}", []).append(value)
            hidden = Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask)
            self.show(name, (first, picture), ("what is kept", hidden), (second, drawn))
            self.show(f"{name}-extended", (first, picture), ("its middle", middle), ("extended", wide))
        return {key: round(statistics.median(values), 2) for key, values in found.items()} | {"named": q.rate(named)}


def means(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.mean(values), 3) for name, values in found.items()}


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
    parser.add_argument("--controlnet", type=Path, metavar="FILE")
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of each kind")
    args = parser.parse_args()

    given = {name: x for name in ("guidance", "num_steps") if (x := getattr(args, name)) is not None}
    study, figures = Study(args.root, given, args.controlnet), {}
    for kind in args.kinds.split(","):
        figures[kind] = getattr(study, kind)(args.each)
    if args.sheet:
        args.sheet.mkdir(parents=True, exist_ok=True)
        for kind, shown in study.shown.items():
            columns = {"canny": 8, "depth": 8, "controlnet": 8, "mixed": 5}.get(kind, 9)
            sheet([image for _, image in shown], [text for text, _ in shown], columns).save(args.sheet / f"{kind}.png")
    print(json.dumps({"benchmark": "family", "each": args.each, **given, **figures}))


if __name__ == "__main__":
    main()
