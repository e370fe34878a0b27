"""Grounds of flux-mini: flat pictures through its autoencoder, and corners and grounds of what it draws.

    python benchmarks/grounds.py [--name flux-mini] [--each 64] [--ae FILE] [--lora FILE]

Prints a line of JSON, all in levels of 255:

flat       the largest error of `decode(encode(x))`, before clipping, in pictures of one colour at 256x256: 18 greys
           from black to white, and 64 colours; median and largest over the pictures, and the colour of the largest
corners    of drawn pictures (THINGS, each on all GROUNDS, seeds 0, 1, …): the largest difference of the 8x8 pixels in a
           corner from the ground, which is the median of the picture's border; median, share within 4, largest
ground     likewise of a frame of 8 pixels around the picture, without what is within 24 pixels of a thing
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flux_core import load_pipeline
from flux_core.pipeline import Pipeline

THINGS = ("fox", "red apple", "guitar", "cactus", "green pig face", "rocket", "umbrella", "snail")
COLOURS = "white", "light blue", "dark green", "orange", "grey", "pink", "dark grey"
GROUNDS = ("", *(f" on a {colour} background".replace("a orange", "an orange") for colour in COLOURS))
FRAME, AROUND, EDGE = 8, 24, 24
"""pixels of the frame, pixels around a thing that are not looked at, and levels in which it differs from its ground"""


@torch.no_grad()
def flat(pipeline: Pipeline) -> dict[str, object]:
    draw = torch.Generator().manual_seed(0)
    greys = torch.linspace(0, 255, 18).round()[:, None].expand(-1, 3)
    colours = torch.cat([greys, torch.randint(0, 256, (64, 3), generator=draw).float()])
    errors = []
    for colour in colours:
        x = (colour / 127.5 - 1)[None, :, None, None].expand(1, 3, 256, 256).to(pipeline.device)
        errors.append(float((pipeline.ae.decode(pipeline.ae.encode(x)) - x).abs().max()) * 127.5)
    worst = int(np.argmax(errors))
    found = {"median": round(float(np.median(errors)), 1), "largest": round(errors[worst], 1)}
    return {**found, "of": [int(level) for level in colours[worst]]}


def differences(image: Tensor) -> tuple[float, float]:
    """Of the corners and of the frame of a picture [3, H, W] in levels."""
    frame = torch.zeros(image.shape[1:], dtype=torch.bool)
    for side in (frame, frame.T):
        side[:FRAME], side[-FRAME:] = True, True
    ground = image[:, frame].median(1).values
    off = (image - ground[:, None, None]).abs().amax(0)
    thing = F.avg_pool2d((off > EDGE).float()[None, None], 5, 1, 2)[0, 0] > 0.5  # a speck is none
    near = F.max_pool2d(thing.float()[None, None], 2 * AROUND + 1, 1, AROUND)[0, 0] > 0
    corners = [off[y, x] for y in (slice(FRAME), slice(-FRAME, None)) for x in (slice(FRAME), slice(-FRAME, None))]
    return float(torch.stack(corners).max()), float(off[frame & ~near].max())


def drawn(pipeline: Pipeline, each: int) -> dict[str, object]:
    found = []
    for seed in range(each):
        prompt = f"a {THINGS[seed % len(THINGS)]}{GROUNDS[seed // len(THINGS) % len(GROUNDS)]}".replace(
            "a umb", "an umb"
        )
        image = pipeline.generate(prompt, seed=seed)[0]
        found.append(differences(torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float()))
    return {
        name: {"median": float(np.median(values)), "within_4": round(float(np.mean(np.array(values) <= 4)), 3),
               "largest": max(values)}
        for name, values in zip(("corners", "ground"), zip(*found, strict=True), strict=True)
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="flux-mini")
    parser.add_argument("--each", type=int, default=64, help="pictures that are drawn")
    parser.add_argument("--ae", type=Path, metavar="FILE", help="another autoencoder")
    parser.add_argument("--lora", type=Path, metavar="FILE")
    args = parser.parse_args()
    pipeline = load_pipeline(args.name)
    if args.ae:
        pipeline.ae.load_state_dict(load_file(args.ae))
    if args.lora:
        pipeline.load_lora(args.lora)
    print(
        json.dumps({"benchmark": "grounds", "model": args.name, "flat": flat(pipeline), **drawn(pipeline, args.each)})
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
