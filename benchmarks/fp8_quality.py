"""Distance of flux-mini's pictures in fp8 from those in bf16, relative to that of another seed.

    python benchmarks/fp8_quality.py [--prompts 16] [--steps 28] [--model FILE]

Every prompt is drawn with two seeds in bf16, in fp8 and in fp32. fp8 weights are rounded while they are read, or come
from a file written by `save --dtype fp8` (`--model`). Prints a line of JSON: each distance as the mean over all pairs,
and as its ratio to the distance of the two seeds in bf16:

change   1 - cosine of dinov2-mini's class tokens (goal: fp8 at most 0.1 of another seed)
levels   root of the mean squared error of the pixels, in levels of 255

`interval90` is the 90 % interval of that ratio by a bootstrap over prompts. It is wide, since a few pictures that
develop differently make up most of the mean.

`float32` is given for scale: its distance to bf16 is that of rounding alone. `units` is the share of the fp8 Linears
that multiply in e4m3; 0: this device has no fp8 units, and only weights are rounded. On a CPU without bf16 units a
picture takes minutes; `--tiny` draws one prompt with one step at 64x64.
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
"""by kind, the mean over each prompt's pictures: 1 - cosine, and the squared error of the pixels"""


def distances(a: Sequence[Image.Image], b: Sequence[Image.Image], scorer: Scorer, prompts: int) -> Distances:
    """Distances of the pictures of `a` to those of `b`, pair by pair; both are sorted by prompt."""
    similar = (scorer.features(a) * scorer.features(b)).sum(1)
    found = {"change": 1 - similar.double().numpy(), "levels": np.array(list(map(squared_error, a, b)))}
    return {kind: values.reshape(prompts, -1).mean(1) for kind, values in found.items()}


def mean(kind: str, values: np.ndarray) -> np.ndarray:
    """The mean over the last axis, prompts; for errors of pixels, its root."""
    return values.mean(-1) ** (0.5 if kind == "levels" else 1)


def interval(kind: str, found: np.ndarray, seeds: np.ndarray) -> list[float]:
    """The 90 % interval of the ratio, by a percentile bootstrap over prompts."""
    drawn = np.random.default_rng(0).integers(0, len(found), (DRAWS, len(found)))
    return [float(x) for x in np.quantile(mean(kind, found[drawn]) / mean(kind, seeds[drawn]), (0.05, 0.95))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="number of flux-mini's prompts to draw")
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
        units += [m.scaled for m in pipeline.model.modules() if isinstance(m, Fp8Linear)]
        drawn[dtype] = [image for p in prompts for image in pipeline.generate(p.prompt, seed=p.seed, **how)]

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
