"""Whether a LoRA draws things that it was not trained on in its style: the Noto example of flux-mini.

    python benchmarks/style.py [--lora weights/noto] [--scale 1] [--sheet FILE]

The things are those of `weights/noto/heldout`, with Noto's own picture of each, fixed before anything was trained. Each
is drawn by its caption there ("a noto anchor") at a seed of its own, with the LoRA and by the base. Prints a line of
JSON for each thing, and one with shares of all things:

style    nearer to Noto's own picture of the thing than to the base's picture of that caption and seed, on the axis from
         the base's style to Noto's. Goal: 0.8
kept     of all Noto's pictures, trained and held out, the nearest is that of the thing. Goal: 0.7
both     style and kept, for a broken picture may reach the style
base     the same for the base, judged by its picture of another seed: what a LoRA without an effect reaches
cosine   nearer to Noto's own than to the base's by the cosine that `kept` goes by, for comparison
unharmed at scale 0 every pixel is the base's, to the bit (of the first four things)

`kept` goes by dinov2-mini's class token, as the scorer does everywhere. It was trained to tell one drawing from another
whatever its colours and light, so it is nearly blind to style: Microsoft's own flat drawings of the same emoji, which
are what a perfect change of style alone would give, are nearer to Noto's for one in six of these things. Halfway up, it
still sees style: the axis is the mean difference of Noto's and the base's pictures of the things to train on, in the
mean of the patch tokens after the third of six layers. On it those flat drawings are nearer to Noto's for all 36.
This was chosen by these drawings, before a LoRA was judged by the things that are held out.

`--sheet` writes the pictures: the base's above, the LoRA's below, Noto's own third. `--tiny`: one thing, two steps.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torch import Tensor

from flux_core import load_pipeline
from flux_core.images.pictures import grid
from flux_core.methods.scoring import Scorer, load_scorer
from flux_core.pipeline import Pipeline
from flux_core.training import Picture, read_folder
from flux_core.training.sizes import parse_resolution

NOTO = Path(__file__).resolve().parent.parent / "weights" / "noto"
SIZE = parse_resolution("256x256")
OTHER = 1000
"""added to a seed for another picture of the base"""
LAYER = 3
"""of dinov2-mini, after which style is read"""
COLUMNS = 12


def draw(pipeline: Pipeline, things: Sequence[Picture], steps: int, shift: int = 0) -> list[Image.Image]:
    """A picture of each caption, at the seed that is its place in the list."""
    return [pipeline.generate(one.caption, i + shift, num_steps=steps)[0] for i, one in enumerate(things)]


@torch.no_grad()
def halfway(scorer: Scorer, pictures: Sequence[Image.Image]) -> Tensor:
    """The mean of the patch tokens after `LAYER`, float32 [N, D] on the CPU."""
    pixels = scorer.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    states = scorer.model(pixel_values=pixels.to(scorer.model.device), output_hidden_states=True).hidden_states
    return states[LAYER][:, 1:].mean(1).cpu()


def judge(
    scorer: Scorer, axis: Tensor, drawn: list[Image.Image], base: list[Image.Image], noto: list[Image.Image]
) -> dict[str, Tensor]:
    """Columns of what is so of each drawn picture, and where it is on the axis: 0 is the base's place, 1 is Noto's.

    noto: of all things, of which the first are those that are drawn.
    """
    at, of_base, of_noto = (halfway(scorer, x) @ axis for x in (drawn, base, noto[: len(drawn)]))
    near, to_base, to_noto = (scorer.features(x) for x in (drawn, base, noto))
    own = (near * to_noto[: len(drawn)]).sum(1)
    style = (at - of_noto).abs() < (at - of_base).abs()
    kept = (near @ to_noto.T).argmax(1) == torch.arange(len(drawn), dtype=torch.int64, device="cpu")
    return {
        "place": (at - of_base) / (of_noto - of_base),
        "style": style,
        "kept": kept,
        "both": style & kept,
        "cosine": own > (near * to_base).sum(1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, default=NOTO)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--sheet", type=Path, help="a file for the pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="one thing, two steps")
    args = parser.parse_args()
    steps, few = (2, 1) if args.tiny else (args.steps, None)
    held_out, trained = (read_folder(NOTO / name, SIZE.size_of).pictures for name in ("heldout", "pictures"))
    things, for_axis = held_out[:few], trained[:few]

    pipeline = load_pipeline("flux-mini", args.device)
    base, other = (draw(pipeline, things, steps, shift) for shift in (0, OTHER))
    base_trained = draw(pipeline, for_axis, steps)
    with pipeline.load_lora(args.lora, args.scale) as handle:
        styled = draw(pipeline, things, steps)
        handle.scale = 0.0
        at_zero = draw(pipeline, things[:4], steps)

    scorer = load_scorer("dinov2-mini", torch.device(args.device))
    noto = [Image.open(one.path).convert("RGB") for one in (*held_out, *trained)]
    noto_trained = noto[len(held_out) :][:few]
    axis = halfway(scorer, noto_trained).mean(0) - halfway(scorer, base_trained).mean(0)
    found = {name: judge(scorer, axis, x, base, noto) for name, x in (("lora", styled), ("base", other))}
    for i, one in enumerate(things):
        line = {name: {key: round(float(x[i]), 3) for key, x in of.items()} for name, of in found.items()}
        print(json.dumps({"benchmark": "style", "thing": one.path.stem, **line}))
    shares = {name: {key: round(float(x.float().mean()), 4) for key, x in of.items()} for name, of in found.items()}
    unharmed = all(a.tobytes() == b.tobytes() for a, b in zip(at_zero, base, strict=False))
    setting = {"things": len(things), "scale": args.scale, "steps": steps}
    print(json.dumps({"benchmark": "style", **setting, **shares, "unharmed": unharmed}))
    if args.sheet:
        parts = [slice(k, k + COLUMNS) for k in range(0, len(things), COLUMNS)]
        pictures = [x for part in parts for row in (base, styled, noto[: len(things)]) for x in row[part]]
        small = [x.resize((128, 128), Image.Resampling.LANCZOS) for x in pictures]
        small[0].info["xmp"] = base[0].info["xmp"]
        grid(small, min(COLUMNS, len(things))).save(args.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
