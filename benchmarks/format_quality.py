"""Distance of flux-mini's pictures in each format from those without it, relative to that of another seed.

    python benchmarks/format_quality.py [--formats fp8,int8,q5_1] [--prompts 16] [--steps 28] [--around float32]
                                        [--model FILE] [--sheet FILE.jpg]

Every prompt is drawn with two seeds in bf16, then with the Linears of the blocks in a format (`in_format.py`, or a file
that `save --dtype` wrote: `--model`), all else in bf16 as on a card. `--around float32`: all else, and the pictures
that the distance is to, in fp32, so nothing but the format stands between two pictures. Prints a line of JSON for the
two seeds, then for each format: its distance as the mean over all pairs, as the ratio to that of the two seeds, and
`interval90`, the 90 % interval of that ratio by a bootstrap over prompts, by

change   1 - cosine of dinov2-mini's class tokens (goal: at most 0.1 of another seed)
levels   root of the mean squared error of the pixels, in levels of 255

The interval is wide, since a few pictures that develop differently make up most of the mean. The precision that is not
around, float32 or bfloat16, is given for scale: its distance is that of rounding alone. `bits` are of memory for a
weight, with its scales. `units` says who rounds the tokens of fp8 and int8: the "device", or this program ("simulated")
where the device has no such units; with `--no-simulation` nobody ("none"), and only weights are rounded.

--sheet writes the first seed's pictures of four prompts. On a CPU without bf16 units bf16 takes minutes a picture;
`--tiny` draws one prompt with one step at 64x64.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from caching import squared_error
from in_format import NAMES, as_in_units, bits, quantize
from PIL import Image

from flux_core import load_pipeline
from flux_core.checkpoint.files import flow_path, with_files
from flux_core.checkpoint.read import load_into
from flux_core.kernels import install
from flux_core.methods.charts import contact_sheet
from flux_core.methods.importance import default_prompts, read_prompts
from flux_core.methods.scoring import Scorer, load_scorer
from flux_core.pipeline import Pipeline

GOAL = 0.1
PRECISIONS = ("bfloat16", "float32")
FILE = "file"
"""the name of the format that `--model` is in"""
DRAWS = 4000
SHOWN = 4
"""prompts on the sheet"""


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


def figures(found: Distances, seeds: Distances) -> dict[str, Any]:
    """Distance, ratio and interval, rounded, and whether the goal is met."""
    whole = {kind: mean(kind, x) for kind, x in found.items()}
    ratios = {kind: x / mean(kind, seeds[kind]) for kind, x in whole.items()}
    ranges = {kind: interval(kind, x, seeds[kind]) for kind, x in found.items()}
    tables = {"distance": whole, "ratio": ratios, "interval90": ranges}
    rounded = {name: {kind: np.round(x, 5).tolist() for kind, x in one.items()} for name, one in tables.items()}
    return {**rounded, "goal_met": bool(ratios["change"] <= GOAL)}


def pipeline_in(format: str, args: argparse.Namespace) -> tuple[Pipeline, str]:
    """flux-mini in that format, and whose units round its tokens."""
    pipeline = load_pipeline("flux-mini", args.device, format if format in PRECISIONS else args.around)
    model = pipeline.model
    if format == FILE:
        load_into(model, flow_path(with_files("flux-mini", model=args.model)))
    elif format in NAMES:
        quantize(model, format)
    install(model, args.device)
    rounding = [layer for layer in model.modules() if hasattr(layer, "scaled")]
    if all(layer.scaled for layer in rounding):
        return pipeline, "device" if rounding else "none"
    for layer in rounding if args.simulate else ():
        as_in_units(layer)
    return pipeline, "simulated" if args.simulate else "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", help=f"some of {','.join((*NAMES, *PRECISIONS))} (default: all)")
    parser.add_argument("--prompts", type=int, default=16, help="number of flux-mini's prompts to draw")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--around", choices=PRECISIONS, default="bfloat16", help="precision of all but the format")
    parser.add_argument("--model", help="flux-mini's transformer in few bits, from `save --dtype`, as one more format")
    parser.add_argument("--no-simulation", dest="simulate", action="store_false", help="round weights only")
    parser.add_argument("--sheet", type=Path, help="a JPEG to write")
    parser.add_argument("--tiny", action="store_true", help="one prompt, one step, 64x64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    formats = args.formats.split(",") if args.formats else [*NAMES, *PRECISIONS]
    if unknown := set(formats) - {*NAMES, *PRECISIONS}:
        parser.error(f"--formats: unknown {', '.join(sorted(unknown))}")
    formats = [args.around, *(x for x in formats if x != args.around), *([FILE] if args.model else [])]

    number, steps, size = (1, 1, 64) if args.tiny else (args.prompts, args.steps, 256)
    prompts = read_prompts(default_prompts("flux-mini"))[:number]
    how = {"num_images": 2, "num_steps": steps, "width": size, "height": size, "force": True}
    scorer = load_scorer("dinov2-mini", torch.device(args.device))
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about = {"around": args.around, "pictures": 2 * len(prompts), "steps": steps, "device": device}
    drawn: dict[str, list[Image.Image]] = {}
    for format in formats:
        pipeline, units = pipeline_in(format, args)
        drawn[format] = [image for p in prompts for image in pipeline.generate(p.prompt, seed=p.seed, **how)]
        exact = drawn[args.around]
        seeds = distances(exact[::2], exact[1::2], scorer, len(prompts))
        found = seeds if format == args.around else distances(drawn[format], exact, scorer, len(prompts))
        of = {"bits": round(bits(pipeline.model), 3), "units": units} if format not in PRECISIONS else {}
        name = "another seed" if format == args.around else format
        line = {"benchmark": "format_quality", "format": name, **figures(found, seeds), **of, **about}
        print(json.dumps({**line, "torch": torch.__version__}), flush=True)

    if args.sheet:
        rows = [(fill(p.prompt, 16), [drawn[x][2 * i] for x in formats]) for i, p in enumerate(prompts[:SHOWN])]
        contact_sheet(rows, formats).save(args.sheet, quality=88)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
