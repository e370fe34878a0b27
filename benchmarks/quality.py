"""How good is flux-mini? Fixed prompts and seeds, drawn by the shipped weights and scored against the sprites.

    python benchmarks/quality.py ROOT [--each 100] [--sheet DIR]

ROOT holds the recipe's raw data (`weights/README.md` says how to get it). One JSON line is printed. How each figure is made:

- A picture's *background* is the median of its border; an *object* is what differs from it by more than a shadow does.
  The object's bounding box is brought to 32x32 pixels on a grey ground, and so is every sprite; their distance is the
  root mean square over the pixels. That ignores place and size, as a person would.
- *names*: "a NAME" for sprites drawn at random from the 1,607 base pictures; right if the nearest of them all is the
  named one or a near-twin of it. Near-twins are sprites that the same distance puts closer than TWIN to each other.
- *colours*: held-out colour and object. The colour is right if, of the named sprite in all twelve colours, the one in the
  named colour has the nearest mean RGB; the object, if the nearest of all sprites *in that colour* is the named one or its
  near-twin in that colour.
- *pairs*: held-out ordered pairs, half of them side by side, half one above the other. Each half of the picture is
  matched to all sprites; a pair is right if both halves are.
- *counts*: held-out counts; right if as many separate objects stand there as in a picture of that scene by the recipe's
  renderer, which is the named number (scenes whose parts do not hang together are not asked for).
- *autoencoder*: PSNR of scenes that no stage has seen, encoded and decoded, from the mean squared error of each picture.
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
from render import Atlas, all_rgba, make_atlas, recolour, render, sheet, to_images  # noqa: E402
from scenes import pack, sample_scenes  # noqa: E402
from sprites import Sprites, load_sprites  # noqa: E402
from words import plural, with_article  # noqa: E402

from flux_core import load_pipeline  # noqa: E402

SIZE = 32
EDGE = 0.16
"""difference from the background, of 1, that a shadow does not reach"""
TWIN = 0.09
GREY = 0.6


def tile(rgb: Tensor, mask: Tensor) -> Tensor | None:
    """The masked object of a picture [3, H, W] in [0, 1] at SIZE x SIZE over grey; None if there is nothing."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return None
    y0, y1, x0, x1 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    side = max(y1 - y0, x1 - x0)
    square = torch.full((3, side, side), GREY)
    top, left = (side - (y1 - y0)) // 2, (side - (x1 - x0)) // 2
    cut = torch.where(mask, rgb, GREY)[:, y0:y1, x0:x1]
    square[:, top : top + y1 - y0, left : left + x1 - x0] = cut
    return F.interpolate(square[None], (SIZE, SIZE), mode="bilinear", antialias=True)[0]


def object_mask(rgb: Tensor) -> Tensor:
    """Where a picture [3, H, W] in [0, 1] differs from the median of its border."""
    border = torch.cat(
        [rgb[:, :3].flatten(1), rgb[:, -3:].flatten(1), rgb[:, :, :3].flatten(1), rgb[:, :, -3:].flatten(1)],
        1,
    )
    return ((rgb - border.median(1).values[:, None, None]).abs() > EDGE).any(0)


def sprite_tiles(atlas: Atlas, indices: list[int], colour: int = -1) -> Tensor:
    """Tiles [n, 3, SIZE, SIZE] of sprites as they are, or in a palette colour."""
    tiles = []
    for i in indices:
        rgba = atlas.levels[128][i : i + 1].float() / 255
        if colour >= 0:
            rgba = recolour(rgba, torch.tensor([colour]), atlas.mean_luma[i : i + 1])
        alpha = rgba[0, 3:]
        tiles.append(tile(rgba[0, :3] + GREY * (1 - alpha), alpha[0] > 0.3))
    return torch.stack(tiles)


def distances(one: Tensor, many: Tensor) -> Tensor:
    return ((many - one) ** 2).mean((1, 2, 3)).sqrt()


def matches(found: Tensor | None, wanted: int, tiles: Tensor) -> bool:
    """Whether the nearest tile is the wanted one or its near-twin."""
    if found is None:
        return False
    nearest = int(distances(found, tiles).argmin())
    return nearest == wanted or bool(distances(tiles[wanted], tiles)[nearest] < TWIN)


def pieces(mask: Tensor) -> int:
    """Connected parts of a mask [H, W], small gaps closed and specks left out."""
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
    """The drawing pipeline, the sprites, and what was drawn so far."""

    sprites: Sprites
    atlas: Atlas
    guidance: float | None
    pipeline: object
    base: list[int]
    drawn: dict[str, list[tuple[str, Image.Image, bool]]]

    def draw(self, prompt: str, seed: int) -> tuple[Image.Image, Tensor]:
        image = self.pipeline.generate(
            prompt, seed=seed, **({} if self.guidance is None else {"guidance": self.guidance})
        )[0]
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
    tiles = sprite_tiles(study.atlas, study.base)
    results = []
    for seed, place in enumerate(tqdm(rng.sample(range(len(study.base)), n), "names")):
        prompt = study.name(study.base[place])
        image, rgb = study.draw(prompt, seed)
        results.append(study.keep("names", prompt, image, matches(tile(rgb, object_mask(rgb)), place, tiles)))
    return {"names": rate(results)}


def colours(study: Study, wanted: list[tuple[int, int]]) -> dict[str, float]:
    colour_right, object_right = [], []
    sets = {c: sprite_tiles(study.atlas, study.base, c) for c in sorted({c for c, _ in wanted})}
    for seed, (colour, sprite) in enumerate(tqdm(wanted, "colours")):
        prompt = f"a {COLOURS[colour].names[0]} {study.sprites.names[sprite]}".replace(
            "a orange", "an orange"
        )
        image, rgb = study.draw(prompt, seed)
        mask = object_mask(rgb)
        references = torch.stack([mean_colour(study.atlas, sprite, c) for c in range(len(COLOURS))])
        mean = rgb[:, mask].mean(1) if mask.any() else torch.zeros(3)
        colour_right.append(int((references - mean).norm(dim=1).argmin()) == colour)
        object_right.append(matches(tile(rgb, mask), study.base.index(sprite), sets[colour]))
        study.keep("colours", prompt, image, colour_right[-1] and object_right[-1])
    return {"colour": rate(colour_right), "colour_object": rate(object_right)}


def mean_colour(atlas: Atlas, sprite: int, colour: int) -> Tensor:
    """Mean RGB of a sprite's own pixels in a palette colour."""
    rgba = atlas.levels[64][sprite : sprite + 1].float() / 255
    rgba = recolour(rgba, torch.tensor([colour]), atlas.mean_luma[sprite : sprite + 1])[0]
    solid = rgba[3] > 0.9
    return rgba[:3, solid].mean(1)


def pairs(study: Study, wanted: list[tuple[int, int]]) -> dict[str, float]:
    tiles = sprite_tiles(study.atlas, study.base)
    both, either = [], []
    for seed, (first, second) in enumerate(tqdm(wanted, "pairs")):
        across = seed % 2 == 0
        prompt = f"{study.name(first)} {'to the left of' if across else 'above'} {study.name(second)}"
        image, rgb = study.draw(prompt, seed)
        mask = object_mask(rgb)
        axis, middle = (2, rgb.shape[2] // 2) if across else (1, rgb.shape[1] // 2)
        found = []
        for place, sprite in ((slice(None, middle), first), (slice(middle, None), second)):
            cut = (slice(None), slice(None), place) if axis == 2 else (slice(None), place)
            found.append(matches(tile(rgb[cut], mask[cut[1:]]), study.base.index(sprite), tiles))
        both.append(study.keep("pairs", prompt, image, all(found)))
        either += found
    return {"pairs": rate(both), "pairs_each": rate(either)}


def counts(study: Study, wanted: list[tuple[int, int]]) -> dict[str, float]:
    words = {2: "two", 3: "three", 4: "four"}
    results = []
    for seed, (n, sprite) in enumerate(tqdm(wanted, "counts")):
        prompt = f"{words[n]} {plural(study.sprites.names[sprite])}"
        image, rgb = study.draw(prompt, seed)
        results.append(study.keep("counts", prompt, image, pieces(object_mask(rgb)) == n))
    return {"counts": rate(results)}


def hangs_together(study: Study, sprite: int) -> bool:
    """Whether a picture of the thing alone is one piece."""
    scene = Scene(
        "single", [Thing(sprite, -1, "", [])], [(0.5, 0.5, 0.4)], "alone", background=(0.5, 0.6, 0.55)
    )
    picture = (render(pack([scene]), study.atlas, 256)[0] + 1) / 2
    return pieces(object_mask(picture)) == 1


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("--each", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--kinds", default="autoencoder,names,colours,pairs,counts")
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of each kind, to look at")
    args = parser.parse_args()

    rng = random.Random(0)
    sprites = load_sprites(args.root)
    base = [i for i, tone in enumerate(sprites.tone) if not tone]
    study = Study(sprites, make_atlas(all_rgba(sprites)), args.guidance, load_pipeline("flux-mini"), base, {})
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
            captions = [("" if right else "✗ ") + prompt for prompt, _, right in rows]
            sheet([image for _, image, _ in rows], captions, 10).save(args.sheet / f"{kind}.png")
    print(json.dumps({"benchmark": "quality", "each": args.each, "guidance": args.guidance, **figures}))


if __name__ == "__main__":
    main()
