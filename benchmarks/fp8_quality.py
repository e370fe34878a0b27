"""How far fp8 takes flux-mini's pictures from those of bf16, beside how far another seed takes them.

    python benchmarks/fp8_quality.py [--prompts 16] [--steps 28] [--model FILE]

Every prompt is drawn with two seeds in bf16, in fp8 and in fp32. fp8 is rounded while the weights are read, or what
`save --dtype fp8` wrote (`--model`). Printed as one line of JSON, each distance as the mean over all pairs, and as its
ratio to the distance of the two seeds in bf16:

change   1 - cosine of dinov2-mini's class tokens (goal: fp8 at most 0.1 of another seed)
levels   root of the mean squared error of the pixels, in levels of 255

`interval90` is what that ratio could as well have been with other prompts: 90 % of a bootstrap over prompts. A few
pictures that take another turn make most of a mean, so it is wide.

`float32` stands there for scale: bf16 is as far from it as rounding alone takes a picture. `units` is the share of the
fp8 Linears that multiply in e4m3; 0: this device has no fp8 units, and weights alone are rounded. On a CPU without bf16
units a picture takes minutes; `--tiny` draws one prompt with one step at 64x64.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from caching import squared_error
from PIL import Image

from flux_core import load_pipeline
from flux_core.linears.fp8 import Fp8Linear
from flux_core.methods.importance import default_prompts, read_prompts
from flux_core.methods.scoring import Scorer, load_scorer

GOAL = 0.1
DTYPES = ("bfloat16", "fp8", "float32")
DRAWS = 4000


Distances = dict[str, np.ndarray]
"""one for each prompt, over its pictures: 1 - cosine, and the squared error of the pixels"""


def distances(some: Sequence[Image.Image], others: Sequence[Image.Image], scorer: Scorer, prompts: int) -> Distances:
    """Of pictures to those at the same places, which go prompt by prompt."""
    similar = (scorer.features(some) * scorer.features(others)).sum(1)
    found = {"change": 1 - similar.double().numpy(), "levels": np.array(list(map(squared_error, some, others)))}
    return {kind: one.reshape(prompts, -1).mean(1) for kind, one in found.items()}


def mean(kind: str, values: np.ndarray) -> np.ndarray:
    """Over the last axis, prompts. Errors of pixels are summed up as squares, and told as their root."""
    return values.mean(-1) ** (0.5 if kind == "levels" else 1)


def interval(kind: str, found: np.ndarray, seeds: np.ndarray) -> list[float]:
    """The 90 % of ratios that drawing as many prompts out of these, with repetition, gives: a percentile bootstrap."""
    drawn = np.random.default_rng(0).integers(0, len(found), (DRAWS, len(found)))
    return [float(x) for x in np.quantile(mean(kind, found[drawn]) / mean(kind, seeds[drawn]), (0.05, 0.95))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="of flux-mini's, from the first on")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument(
        "--model", help="flux-mini in fp8: a file or folder of `save --dtype fp8` (default: plain rounding)"
    )
    parser.add_argument("--tiny", action="store_true", help="one prompt, one step, 64x64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    number, steps, size = (1, 1, 64) if args.tiny else (args.prompts, args.steps, 256)
    prompts = read_prompts(default_prompts("flux-mini"))[:number]
    how = {"num_images": 2, "num_steps": steps, "width": size, "height": size, "force": True}
    drawn: dict[str, list[Image.Image]] = {}
    units: list[bool] = []
    for dtype in DTYPES:
        pipeline = load_pipeline("flux-mini", args.device, dtype, model=args.model if dtype == "fp8" else None)
        units += [one.scaled for one in pipeline.model.modules() if isinstance(one, Fp8Linear)]
        drawn[dtype] = [image for one in prompts for image in pipeline.generate(one.prompt, seed=one.seed, **how)]

    scorer, exact = load_scorer("dinov2-mini", torch.device(args.device)), drawn["bfloat16"]
    seeds = distances(exact[::2], exact[1::2], scorer, len(prompts))
    found = {dtype: distances(drawn[dtype], exact, scorer, len(prompts)) for dtype in DTYPES[1:]}
    every = {"another_seed": seeds, **found}
    whole = {name: {kind: mean(kind, x) for kind, x in one.items()} for name, one in every.items()}
    ratios = {dtype: {kind: whole[dtype][kind] / whole["another_seed"][kind] for kind in seeds} for dtype in found}
    ranges = {dtype: {kind: interval(kind, x, seeds[kind]) for kind, x in one.items()} for dtype, one in found.items()}
    met = bool(ratios["fp8"]["change"] <= GOAL)
    rounded = {
        name: {what: {kind: np.round(x, 5).tolist() for kind, x in one.items()} for what, one in table.items()}
        for name, table in (("distance", whole), ("ratio", ratios), ("interval90", ranges))
    }
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about = {"pictures": len(exact), "steps": steps, "units": statistics.mean(map(int, units)), "device": name}
    print(json.dumps({"benchmark": "fp8_quality", "goal_met": met, **rounded, **about, "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
