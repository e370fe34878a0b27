"""Whether dinov2-mini's similarity depends on the object rather than its colour, by triples of pictures.

    python benchmarks/scorer.py ROOT [--scorer weights/dinov2-mini] [--triples 2000] [--sheet FILE]

ROOT is the folder of the recipe's raw data (see `weights/README.md`). Prints a table and then a line of JSON; --sheet
writes some of the triples. How a triple is made and scored:

- The *anchor* shows an object; the *positive* shows it again, in another colour, at another place, in another size and
  on another ground. One of the two may have the object's own colours. The *negative* shows another object.
- A triple is right if the cosine of anchor and positive is above that of anchor and negative.
- In every second triple the negative has the anchor's colour, place, size and ground, so that it differs only in the
  object (`alike`); a score that ignores the object is right in none of these. In the others the negative's look is
  drawn like a positive's (`free`), and a score that ignores the object is right in half of them.
- Half of the triples are of objects used in training (`seen`), half of the one in sixteen that was not (`unseen`); the
  negative is of the same half. Both halves are drawn from one list, of objects that can be recoloured.
- Pictures have 224x224 pixels of 8 bits and are prepared by the folder's own image processor, as a user's would be.
- Two baselines are scored on the same triples: a network of the same configuration with random weights, and the
  picture's own pixels, resized to 16x16.

The goal is met if nine in ten of all triples are right by the class token (`cls`); `mean` is the mean of the patches.
"""

import argparse
import json
import math
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
from transformers import AutoImageProcessor, Dinov2Model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "weights" / "recipe"))

from captions import Scene, Thing  # noqa: E402
from palette import COLOURS  # noqa: E402
from render import all_rgba, make_atlas, render, sheet, to_images  # noqa: E402
from scenes import pack  # noqa: E402
from sprites import load_sprites, plain_names  # noqa: E402
from train_scorer import unseen  # noqa: E402

SIZE = 224
GOAL = 0.9
KINDS = ("alike", "free")
OTHER = 0.25
"""least difference, in some channel, of another ground, and of an object's colour from its ground"""


@dataclass(frozen=True)
class Look:
    """All parameters of a picture but its object."""

    colour: int  # index into COLOURS, -1: the object's own colours
    place: tuple[float, float, float]  # x, y, size
    ground: tuple[float, ...]


def distance(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """The largest difference in a channel."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def random_look(rng: random.Random) -> Look:
    """A random look: a third in own colours, the others in any; not cropped; a quarter on white, else on any ground."""
    colour = -1 if rng.random() < 1 / 3 else rng.randrange(len(COLOURS))
    size = rng.uniform(0.4, 0.95)
    x, y = (rng.uniform(size / 2, 1 - size / 2) for _ in range(2))
    while True:
        ground = (1.0,) * 3 if rng.random() < 0.25 else tuple(rng.random() for _ in range(3))
        if colour < 0 or distance(ground, COLOURS[colour].rgb) >= OTHER:
            return Look(colour, (x, y, size), ground)


def another_look(rng: random.Random, look: Look) -> Look:
    """A random look that differs in colour, place, size (by at least a fifth) and ground."""
    while True:
        other = random_look(rng)
        (x, y, size), (u, v, scale) = look.place, other.place
        if (
            other.colour != look.colour
            and math.hypot(x - u, y - v) >= 0.05
            and abs(math.log(size / scale)) >= math.log(1.2)
            and distance(other.ground, look.ground) >= OTHER
        ):
            return other


def triples(indices: list[int], n: int, rng: random.Random) -> list[list[tuple[int, Look]]]:
    """`n` triples of (object, look): anchor, positive, negative. In even triples the negative has the anchor's look."""
    made = []
    for i in range(n):
        index, other = rng.sample(indices, 2)
        look = random_look(rng)
        made.append(
            [
                (index, look),
                (index, another_look(rng, look)),
                (other, look if i % 2 == 0 else another_look(rng, look)),
            ]
        )
    return made


def draw(shown: list[tuple[int, Look]], rgba: Tensor) -> list[Image.Image]:
    """A picture of each object with its look. rgba: all sprites, uint8 [N, 256, 256, 4]."""
    used = sorted({index for index, _ in shown})  # an atlas of only these is faster on a CPU
    atlas = make_atlas(rgba[used])
    images: list[Image.Image] = []
    for i in tqdm(range(0, len(shown), 64), "pictures"):
        scenes = [
            Scene("single", [Thing(used.index(index), look.colour, "", [])], [look.place], "alone", look.ground)
            for index, look in shown[i : i + 64]
        ]
        images += to_images(render(pack(scenes), atlas, SIZE))
    return images


@torch.inference_mode()
def describe(model: torch.nn.Module, pixels: Tensor, device: str, batch: int = 64) -> dict[str, Tensor]:
    """Features [N, D] of pixels [N, 3, H, W], for each pooling."""
    model = model.to(device).eval()
    parts = []
    for i in tqdm(range(0, len(pixels), batch), "descriptions"):
        tokens = model(pixels[i : i + batch].to(device)).last_hidden_state
        parts.append(torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)]).cpu())
    cls, mean = torch.cat(parts, 1)
    return {"cls": cls, "mean": mean}


def cosines(descriptions: Tensor) -> Tensor:
    """Cosines [T, 2] of anchor with positive and of anchor with negative, from the triples' features [3 T, D]."""
    anchor, positive, negative = F.normalize(descriptions.float(), dim=-1).unflatten(0, (-1, 3)).unbind(1)
    return torch.stack([(anchor * positive).sum(-1), (anchor * negative).sum(-1)], 1)


def rates(right: Tensor) -> dict[str, float]:
    """Fractions of right triples. right: [T], the seen half first, `alike` and `free` in turn."""
    seen, never = right.float().chunk(2)
    parts = {"all": right.float(), "seen": seen, "unseen": never}
    parts |= {f"{name} {kind}": parts[name][i::2] for name in ("seen", "unseen") for i, kind in enumerate(KINDS)}
    return {name: round(part.mean().item(), 4) for name, part in parts.items()}


def table(figures: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(figures.values())))
    lines = [["", *columns], ["---"] + ["---:"] * len(columns)]
    lines += [[name] + [f"{100 * row[c]:.1f} %" for c in columns] for name, row in figures.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_sheet(path: Path, images: list[Image.Image], names: list[str], near: Tensor, each: int = 20) -> None:
    """Write some triples of each half and some wrong triples, three pictures each. near: their cosines [T, 2]."""
    wrong = (near[:, 0] <= near[:, 1]).tolist()
    half = len(wrong) // 2
    rows = [*range(min(each, half)), *range(half, half + min(each, half))]
    rows += [i for i, is_wrong in enumerate(wrong) if is_wrong and i not in rows][: 2 * each]
    captions = []
    for i in rows:
        anchor, _, other = names[3 * i : 3 * i + 3]
        mark = "WRONG" if wrong[i] else "right"
        captions += [f"{mark}: {anchor}", f"the same {near[i, 0]:.2f}", f"{other} {near[i, 1]:.2f}"]
    small = [images[3 * i + k].resize((112, 112)) for i in rows for k in range(3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(small, captions, 12).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("--scorer", type=Path, default=ROOT / "weights" / "dinov2-mini")
    parser.add_argument("--triples", type=int, default=2000, help="number of triples, half of them of unseen objects")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="a file for some of the triples")
    args = parser.parse_args()

    sprites = load_sprites(args.root)
    never = unseen(sprites)
    shown = [i for i in sorted(plain_names(sprites)) if sprites.group[i] != "people-body" and i not in never]
    rng = random.Random(0)
    half = args.triples // 2
    flat = [
        shown_object for indices in (shown, never) for triple in triples(indices, half, rng) for shown_object in triple
    ]
    images = draw(flat, all_rgba(sprites))

    processor = AutoImageProcessor.from_pretrained(args.scorer)
    scorer = Dinov2Model.from_pretrained(args.scorer, dtype=torch.float32)
    torch.manual_seed(0)
    untrained = Dinov2Model(scorer.config).float()
    pixels = torch.cat(
        [processor(images[i : i + 64], return_tensors="pt")["pixel_values"] for i in range(0, len(images), 64)]
    )
    tiny = [np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32) for image in images]
    answers = {f"dinov2-mini, {k}": v for k, v in describe(scorer, pixels, args.device).items()}
    answers |= {f"random weights, {k}": v for k, v in describe(untrained, pixels, args.device).items()}
    answers["pixels"] = torch.from_numpy(np.stack(tiny) / 127.5 - 1).flatten(1)

    near = {name: cosines(x) for name, x in answers.items()}
    figures = {name: rates(x[:, 0] > x[:, 1]) for name, x in near.items()}
    print(table(figures))
    if args.sheet:
        write_sheet(args.sheet, images, [sprites.names[index] for index, _ in flat], near["dinov2-mini, cls"])
    met = figures["dinov2-mini, cls"]["all"] >= GOAL
    print(json.dumps({"benchmark": "scorer", "triples": 2 * half, "goal_met": met, **figures}))


if __name__ == "__main__":
    main()
