"""Whether a LoRA draws things that it was not trained on in its style: the Noto example of flux-mini.

    python benchmarks/style.py [--lora weights/noto] [--scale 1] [--pooling mean] [--sheet FILE]

The things are those of `weights/noto/heldout`, with Noto's own picture of each, fixed before anything was trained. Each
is drawn by its caption there ("a noto anchor") at a seed of its own, with the LoRA and by the base. Features are those
of dinov2-mini. Prints a line of JSON for each thing, with cosines, and one with shares of all things:

style    nearer to Noto's own picture of the thing than to the base's picture of that caption and seed. Goal: 0.8
kept     of all Noto's pictures, trained and held out, the nearest is that of the thing. Goal: 0.7
base     the same two for the base: for `style` its picture of another seed, where `base` says what chance gives
unharmed at scale 0 every pixel is the base's, to the bit (of the first four things)

`--sheet` writes the pictures: the base's above, the LoRA's below, Noto's own third. `--tiny`: one thing, two steps.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

from flux_core import load_pipeline
from flux_core.images.pictures import grid
from flux_core.methods.scoring import load_scorer
from flux_core.pipeline import Pipeline
from flux_core.training import Picture, read_folder
from flux_core.training.sizes import parse_resolution

NOTO = Path(__file__).resolve().parent.parent / "weights" / "noto"
SIZE = parse_resolution("256x256")
OTHER = 1000
"""added to a seed for another picture of the base"""


def draw(pipeline: Pipeline, things: list[Picture], steps: int, shift: int = 0) -> list[Image.Image]:
    """A picture of each caption, at the seed that is its place in the list."""
    return [pipeline.generate(one.caption, i + shift, num_steps=steps)[0] for i, one in enumerate(things)]


def mean(found: list[bool]) -> float:
    return round(sum(found) / len(found), 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, default=NOTO)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--pooling", choices=["cls", "mean"], default="mean", help="of dinov2-mini's tokens")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--sheet", type=Path, help="a file for the pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="one thing, two steps")
    args = parser.parse_args()
    steps = 2 if args.tiny else args.steps
    held_out, trained = (read_folder(NOTO / name, SIZE.size_of).pictures for name in ("heldout", "pictures"))
    things, every = held_out[: 1 if args.tiny else None], [*held_out, *trained]

    pipeline = load_pipeline("flux-mini", args.device)
    base, other = (draw(pipeline, things, steps, shift) for shift in (0, OTHER))
    with pipeline.load_lora(args.lora, args.scale) as handle:
        styled = draw(pipeline, things, steps)
        handle.scale = 0.0
        at_zero = draw(pipeline, things[:4], steps)
    noto = [Image.open(one.path).convert("RGB") for one in every]

    scorer = load_scorer("dinov2-mini", torch.device(args.device), args.pooling)
    of_noto, of_base, of_other, of_styled = (scorer.features(x) for x in (noto, base, other, styled))
    shares: dict[str, tuple[list[bool], list[bool]]] = {"lora": ([], []), "base": ([], [])}
    for i, one in enumerate(things):
        line = {"benchmark": "style", "thing": one.path.stem}
        for name, feature in (("lora", of_styled[i]), ("base", of_other[i])):
            to_noto, to_base = of_noto @ feature, of_base[i] @ feature
            nearest = int(to_noto.argmax())
            shares[name][0].append(bool(to_noto[i] > to_base))
            shares[name][1].append(nearest == i)
            line[name] = {"noto": round(float(to_noto[i]), 3), "base": round(float(to_base), 3)}
            line[name] |= {"nearest": every[nearest].path.stem}
        print(json.dumps(line), flush=True)
    line = {name: {"style": mean(style), "kept": mean(kept)} for name, (style, kept) in shares.items()}
    unharmed = all(a.tobytes() == b.tobytes() for a, b in zip(at_zero, base, strict=False))
    setting = {"things": len(things), "pooling": args.pooling, "scale": args.scale, "steps": steps}
    print(json.dumps({"benchmark": "style", **setting, **line, "unharmed": unharmed}))
    if args.sheet:
        rows = [
            x
            for k in range(0, len(things), 12)
            for row in (base, styled, noto)
            for x in row[k : min(k + 12, len(things))]
        ]
        grid([x.resize((128, 128), Image.Resampling.LANCZOS) for x in rows], min(12, len(things))).save(args.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
