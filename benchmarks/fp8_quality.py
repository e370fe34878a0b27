"""How far fp8 takes flux-mini's pictures from those of bf16, beside how far another seed takes them.

    python benchmarks/fp8_quality.py [--prompts 16] [--steps 28]

Every prompt is drawn with two seeds in bf16, in fp8 and in fp32. Printed as one line of JSON, each distance as the mean
over all pairs, and as its ratio to the distance of the two seeds in bf16:

change   1 - cosine of dinov2-mini's class tokens (goal: fp8 at most 0.1 of another seed)
levels   root of the mean squared error of the pixels, in levels of 255

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

import torch
from caching import squared_error
from PIL import Image

from flux_core import load_pipeline
from flux_core.importance import default_prompts, read_prompts
from flux_core.linears.fp8 import Fp8Linear
from flux_core.scoring import Scorer, load_scorer

GOAL = 0.1
DTYPES = ("bfloat16", "fp8", "float32")


def distances(some: Sequence[Image.Image], others: Sequence[Image.Image], scorer: Scorer) -> dict[str, float]:
    """Of pictures to those at the same places."""
    similar = (scorer.features(some) * scorer.features(others)).sum(1)
    error = statistics.mean(map(squared_error, some, others))
    return {"change": float(1 - similar.mean()), "levels": error**0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="of flux-mini's, from the first on")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--tiny", action="store_true", help="one prompt, one step, 64x64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    number, steps, size = (1, 1, 64) if args.tiny else (args.prompts, args.steps, 256)
    prompts = read_prompts(default_prompts("flux-mini"))[:number]
    how = {"num_images": 2, "num_steps": steps, "width": size, "height": size, "force": True}
    drawn: dict[str, list[Image.Image]] = {}
    units: list[bool] = []
    for dtype in DTYPES:
        pipeline = load_pipeline("flux-mini", args.device, dtype)
        units += [one.scaled for one in pipeline.model.modules() if isinstance(one, Fp8Linear)]
        drawn[dtype] = [image for one in prompts for image in pipeline.generate(one.prompt, seed=one.seed, **how)]

    scorer, exact = load_scorer("dinov2-mini", torch.device(args.device)), drawn["bfloat16"]
    seeds = distances(exact[::2], exact[1::2], scorer)
    found = {"another_seed": seeds} | {dtype: distances(drawn[dtype], exact, scorer) for dtype in DTYPES[1:]}
    ratios = {dtype: {kind: found[dtype][kind] / seeds[kind] for kind in seeds} for dtype in DTYPES[1:]}
    met = ratios["fp8"]["change"] <= GOAL
    rounded = {
        name: {what: {kind: round(x, 5) for kind, x in one.items()} for what, one in table.items()}
        for name, table in (("distance", found), ("ratio", ratios))
    }
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about = {"pictures": len(exact), "steps": steps, "units": statistics.mean(map(int, units)), "device": name}
    print(json.dumps({"benchmark": "fp8_quality", "goal_met": met, **rounded, **about, "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
