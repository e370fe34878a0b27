"""Quality of flux-mini: fixed prompts and seeds, drawn by the shipped weights and scored against the sprites.

    python benchmarks/quality.py ROOT [--name flux-mini-fast] [--num-steps 4] [--each 100] [--sheet FOLDER]

ROOT is the folder of the recipe's raw data (see `weights/README.md`). Prints a line of JSON; --sheet writes the
pictures. The figures:

- A picture's *ground* is the median of its border; its *object* are the pixels that differ from the ground by more than
  a shadow. The object's bounding box is resized to 32x32 pixels. Every sprite is composed onto the same ground and
  processed in the same way; the distance of two objects is the root mean square over the pixels, which ignores place
  and size.
- *names*: "a NAME" for sprites drawn at random from the 1,607 base pictures; right if the nearest sprite is the named
  sprite or a near-twin of it. Near-twins are sprites with a distance below TWIN to each other.
- *colour*, *colour_object*: held-out colour and object. The colour is right if, of the named sprite in all twelve
  colours, the named colour has the nearest mean RGB; the object, if the nearest of all sprites *in that colour* is the
  named sprite or its near-twin in that colour.
- *pairs*: held-out ordered pairs, half of them side by side, half above each other. Each half of the picture is matched
  to all sprites; a pair is right if both halves are, `pairs_each` counts single halves.
- *counts*: held-out counts; right if the number of separate objects is the named number. Objects whose own picture has
  several parts are left out.
- *autoencoder*: mean PSNR of scenes that no training stage used, encoded and decoded.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "weights" / "recipe")]

from captions import Scene, Thing  # noqa: E402
from heldout import load_heldout  # noqa: E402
from palette import COLOURS  # noqa: E402
from render import Atlas, all_rgba, make_atlas, recolour, render, sheet  # noqa: E402
from scenes import pack, sample_scenes  # noqa: E402
from sprites import Sprites, load_sprites  # noqa: E402
from words import plural, with_article  # noqa: E402

from flux_core import load_pipeline  # noqa: E402

SIZE = 32
EDGE = 0.16
"""difference from the ground (of 1) above that of a shadow"""
TWIN = 0.09


def ground_of(rgb: Tensor) -> Tensor:
    """The median colour [3] of the border of a picture [3, H, W]."""
    top, bottom, left, right = rgb[:, :3], rgb[:, -3:], rgb[:, :, :3], rgb[:, :, -3:]
    return torch.cat([x.flatten(1) for x in (top, bottom, left, right)], 1).median(1).values


def object_mask(rgb: Tensor, ground: Tensor) -> Tensor:
    """Mask [..., H, W] of the pixels of pictures [..., 3, H, W] in [0, 1] that differ from their ground [3]."""
    return ((rgb - ground[:, None, None]).abs() > EDGE).any(-3)


def tiles_of(rgb: Tensor, ground: Tensor) -> Tensor:
    """The objects of pictures [n, 3, H, W], each resized from its bounding box, [n, 3, SIZE, SIZE]."""
    mask = object_mask(rgb, ground)
    rgb = torch.where(mask[:, None], rgb, ground[:, None, None])
    (x0, x1), (y0, y1) = (span(mask.any(axis)) for axis in (1, 2))
    side = torch.maximum(x1 - x0, y1 - y0)
    theta = torch.zeros(len(rgb), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side / rgb.shape[-1]
    theta[:, 0, 2], theta[:, 1, 2] = (x0 + x1) / rgb.shape[-1] - 1, (y0 + y1) / rgb.shape[-1] - 1
    shift = ground[:, None, None]  # so that pixels outside the picture become ground
    grid = F.affine_grid(theta, [len(rgb), 3, 4 * SIZE, 4 * SIZE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(rgb - shift, grid, align_corners=False), 4) + shift


def span(filled: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the true values in rows [n, L]: the first, and the last plus 1; the whole row if there are none."""
    length = filled.shape[1]
    first = filled.int().argmax(1)
    last = length - filled.flip(1).int().argmax(1)
    return first.float(), last.float()


def sprite_tiles(atlas: Atlas, indices: list[int], ground: Tensor, colour: int = -1) -> Tensor:
    """Tiles [n, 3, SIZE, SIZE] of sprites composed onto that ground, unchanged or in a palette colour."""
    rgba = atlas.levels[64][indices].float() / 255
    if colour >= 0:
        rgba = recolour(rgba, torch.full((len(indices),), colour), atlas.mean_luma[indices])
    return tiles_of(rgba[:, :3] + ground[:, None, None] * (1 - rgba[:, 3:]), ground)


def distances(tile: Tensor, tiles: Tensor) -> Tensor:
    return ((tiles - tile) ** 2).mean((1, 2, 3)).sqrt()


def shows(rgb: Tensor, ground: Tensor, wanted: int, tiles: Tensor) -> bool:
    """Whether the sprite nearest to the object of a picture [3, H, W] is the wanted sprite or its near-twin."""
    if not object_mask(rgb, ground).any():
        return False
    nearest = int(distances(tiles_of(rgb[None], ground)[0], tiles).argmin())
    return nearest == wanted or bool(distances(tiles[wanted], tiles)[nearest] < TWIN)


def pieces(mask: Tensor) -> int:
    """Number of connected parts of a mask [H, W], after closing small gaps and without specks."""
    grid = F.max_pool2d(mask[None, None].float(), 4)[0, 0].bool().numpy()
    labels, count = np.zeros(grid.shape, int), 0
    for start in zip(*np.nonzero(grid), strict=True):
        if labels[start]:
            continue
        stack, size = [start], 0
        count += 1
        labels[start] = count
        while stack:
            y, x = stack.pop()
            size += 1
            for v, u in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                inside = 0 <= v < grid.shape[0] and 0 <= u < grid.shape[1]
                if inside and grid[v, u] and not labels[v, u]:
                    labels[v, u] = count
                    stack.append((v, u))
        if size < 8:
            count -= 1
            labels[labels == count + 1] = -1
    return count


@dataclass
class Study:
    """The pipeline, the sprites, and the pictures drawn so far."""

    sprites: Sprites
    atlas: Atlas
    given: dict[str, float]
    """what is asked for otherwise than by default"""
    pipeline: object
    base: list[int]
    drawn: dict[str, list[tuple[str, Image.Image, bool]]]

    def draw(self, prompt: str, seed: int) -> tuple[Image.Image, Tensor]:
        image = self.pipeline.generate(prompt, seed=seed, **self.given)[0]
        return image, torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 255

    def keep(self, kind: str, prompt: str, image: Image.Image, right: bool) -> bool:
        self.drawn.setdefault(kind, []).append((prompt, image, right))
        return right

    def name(self, index: int) -> str:
        name = self.sprites.names[index]
        return with_article(name, name)


def rate(results: list[bool]) -> float:
    return round(sum(results) / len(results), 4)


def names(study: Study, n: int, rng: random.Random) -> dict[str, float]:
    results = []
    for seed, place in enumerate(tqdm(rng.sample(range(len(study.base)), n), "names")):
        prompt = study.name(study.base[place])
        image, rgb = study.draw(prompt, seed)
        ground = ground_of(rgb)
        tiles = sprite_tiles(study.atlas, study.base, ground)
        results.append(study.keep("names", prompt, image, shows(rgb, ground, place, tiles)))
    return {"names": rate(results)}


def colours(study: Study, wanted: list[tuple[int, int]]) -> dict[str, float]:
    colour_right, object_right = [], []
    for seed, (colour, sprite) in enumerate(tqdm(wanted, "colours")):
        prompt = f"a {COLOURS[colour].names[0]} {study.sprites.names[sprite]}".replace("a orange", "an orange")
        image, rgb = study.draw(prompt, seed)
        ground = ground_of(rgb)
        mask = object_mask(rgb, ground)
        references = torch.stack([mean_colour(study.atlas, sprite, c) for c in range(len(COLOURS))])
        mean = rgb[:, mask].mean(1) if mask.any() else torch.zeros(3)
        colour_right.append(int((references - mean).norm(dim=1).argmin()) == colour)
        tiles = sprite_tiles(study.atlas, study.base, ground, colour)
        object_right.append(shows(rgb, ground, study.base.index(sprite), tiles))
        study.keep("colours", prompt, image, colour_right[-1] and object_right[-1])
    return {"colour": rate(colour_right), "colour_object": rate(object_right)}


def mean_colour(atlas: Atlas, sprite: int, colour: int) -> Tensor:
    """Mean RGB of a sprite's own pixels in a palette colour."""
    rgba = atlas.levels[64][sprite : sprite + 1].float() / 255
    rgba = recolour(rgba, torch.tensor([colour]), atlas.mean_luma[sprite : sprite + 1])[0]
    solid = rgba[3] > 0.9
    return rgba[:3, solid].mean(1)


def pairs(study: Study, wanted: list[tuple[int, int]]) -> dict[str, float]:
    both, either = [], []
    for seed, (first, second) in enumerate(tqdm(wanted, "pairs")):
        across = seed % 2 == 0
        prompt = f"{study.name(first)} {'to the left of' if across else 'above'} {study.name(second)}"
        image, rgb = study.draw(prompt, seed)
        ground = ground_of(rgb)
        tiles = sprite_tiles(study.atlas, study.base, ground)
        halves = halves_of(rgb, ground, across)
        found = [
            shows(half, ground, study.base.index(sprite), tiles)
            for half, sprite in zip(halves, (first, second), strict=True)
        ]
        both.append(study.keep("pairs", prompt, image, all(found)))
        either += found
    return {"pairs": rate(both), "pairs_each": rate(either)}


def halves_of(rgb: Tensor, ground: Tensor, across: bool) -> tuple[Tensor, Tensor]:
    """Left and right, or upper and lower half of a picture [3, H, W], the other half filled with the ground."""
    first, second = rgb.clone(), rgb.clone()
    half = rgb.shape[-1] // 2
    if across:
        first[:, :, half:], second[:, :, :half] = ground[:, None, None], ground[:, None, None]
    else:
        first[:, half:], second[:, :half] = ground[:, None, None], ground[:, None, None]
    return first, second


def counts(study: Study, wanted: list[tuple[int, int]]) -> dict[str, float]:
    words = {2: "two", 3: "three", 4: "four"}
    results = []
    for seed, (n, sprite) in enumerate(tqdm(wanted, "counts")):
        prompt = f"{words[n]} {plural(study.sprites.names[sprite])}"
        image, rgb = study.draw(prompt, seed)
        results.append(study.keep("counts", prompt, image, pieces(object_mask(rgb, ground_of(rgb))) == n))
    return {"counts": rate(results)}


def hangs_together(study: Study, sprite: int) -> bool:
    """Whether the object in a picture of the sprite alone is connected."""
    scene = Scene("single", [Thing(sprite, -1, "", [])], [(0.5, 0.5, 0.4)], "alone", background=(0.5, 0.6, 0.55))
    picture = (render(pack([scene]), study.atlas, 256)[0] + 1) / 2
    return pieces(object_mask(picture, ground_of(picture))) == 1


@torch.no_grad()
def autoencoder(study: Study, n: int) -> dict[str, float]:
    batch, _ = sample_scenes(n, 99, study.sprites, k=1)
    ae = study.pipeline.ae
    errors = []
    for i in tqdm(range(n), "autoencoder"):
        x = render(batch[i : i + 1], study.atlas, 256).to(study.pipeline.device)
        errors.append(((ae.decode(ae.encode(x)).clamp(-1, 1) - x) ** 2).mean().item())
    return {"autoencoder_psnr": round(float(np.mean(10 * np.log10(4 / np.array(errors)))), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("--each", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--name", default="flux-mini", help="the model")
    parser.add_argument("--lora", type=Path, metavar="FILE")
    parser.add_argument("--num-steps", type=int, help="default: the model's")
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--kinds", default="autoencoder,names,colours,pairs,counts")
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of each kind")
    args = parser.parse_args()

    rng = random.Random(0)
    sprites = load_sprites(args.root)
    base = [i for i, tone in enumerate(sprites.tone) if not tone]
    given = {name: getattr(args, name) for name in ("num_steps", "guidance") if getattr(args, name) is not None}
    pipeline = load_pipeline(args.name)
    if args.lora:
        pipeline.load_lora(args.lora)
    study = Study(sprites, make_atlas(all_rgba(sprites)), given, pipeline, base, {})
    held = load_heldout(sprites)
    todo = {
        "autoencoder": lambda: autoencoder(study, args.each),
        "names": lambda: names(study, args.each, rng),
        "colours": lambda: colours(study, rng.sample(sorted(held.colours), args.each)),
        "pairs": lambda: pairs(study, rng.sample(sorted(held.pairs), args.each)),
        "counts": lambda: counts(
            study,
            rng.sample([c for c in sorted(held.counts) if hangs_together(study, c[1])], min(args.each, 80)),
        ),
    }
    figures: dict[str, float] = {}
    for kind in args.kinds.split(","):
        figures |= todo[kind]()
    if args.sheet:
        args.sheet.mkdir(parents=True, exist_ok=True)
        for kind, rows in study.drawn.items():
            captions = [("" if right else "wrong: ") + prompt for prompt, _, right in rows]
            sheet([image for _, image, _ in rows], captions, 10).save(args.sheet / f"{kind}.png")
    print(json.dumps({"benchmark": "quality", "model": args.name, "each": args.each, **given, **figures}))


if __name__ == "__main__":
    main()
