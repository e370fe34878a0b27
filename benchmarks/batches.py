"""Pictures an hour by rows of a batch: where one row fills the device, more gain nothing.

    python benchmarks/batches.py [--size 256] [--steps 4] [--batches 1,2,4,8] [--rounds 3] [--device cpu]
    python benchmarks/batches.py --full-size --dtype fp8 --steps 15 --batches 1,2,4

flux-mini, as `explore --batch N` draws it: noise, steps and decoding, prompts encoded before, no files. --full-size:
FLUX.1-dev's sizes with random weights, in bf16 or a format of `in_format.py`, 1024x1024 by default, and one block left
out, as in a study of importance. Batches take turns (`timing.py`). Prints a line of JSON: by the number of rows
`pictures_an_hour`, `gain`, the median over the rounds of pictures in the same time to those of single rows, and on a
card `peak_gib` of its memory. `tokens`: of text and picture in a row. `--tiny` runs small on any machine.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from latency import MODELS
from random_pipeline import random_pipeline
from timing import Call, ratio, turns, watched

from flux_core.hooks import Skip
from flux_core.pipeline import load_pipeline
from flux_core.request.generation import PATCH, GenerationRequest


def peak_gib(call: Call, device: str) -> float | None:
    """Of a card's memory, by tensors; None elsewhere."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="with --full-size: a few blocks of 64 features, 64x64")
    parser.add_argument("--dtype", choices=list(MODELS), default="bf16", help="with --full-size")
    parser.add_argument("--size", type=int, help="side of the picture in pixels (default: the model's)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batches", default="1,2,4,8", help="numbers of rows; 1 is always measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn; at least two batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    full = args.full_size or args.tiny
    pipeline = random_pipeline(args.dtype, args.device, args.tiny) if full else load_pipeline("flux-mini", args.device)
    size = args.size or (64 if args.tiny else 1024 if args.full_size else pipeline.variant.width)
    request = GenerationRequest(
        name=pipeline.variant.name, prompt="a red apple", seed=0, width=size, height=size, num_steps=args.steps,
        plan=(Skip(blocks="layer.1"),) if full else (), force=True,
    )  # fmt: skip
    rows = sorted({1, *map(int, args.batches.split(","))})
    of_seeds = [request.model_copy(update={"seed": seed}) for seed in range(rows[-1])]
    calls = {str(n): partial(pipeline.draw_rows, of_seeds[:n]) for n in rows}
    peaks = {name: peak_gib(call, args.device) for name, call in calls.items()}
    with watched(args.device) as card:
        times = turns(calls, args.rounds, args.seconds, args.device)
    figures = {
        "pictures_an_hour": {n: round(3.6e6 * int(n) / statistics.median(ms)) for n, ms in times.items()},
        "gain": {n: round(int(n) * ratio(times, "1", n), 3) for n in times},
        "peak_gib": peaks,
    }
    tokens = pipeline.variant.max_text + (size // PATCH) ** 2
    about = {"benchmark": "batches", "name": pipeline.variant.name, "dtype": pipeline.precision, "size": size}
    place = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about |= {"steps": args.steps, "tokens": tokens, "device": place, "threads": torch.get_num_threads()}
    print(json.dumps({**about, **figures, **card}))


if __name__ == "__main__":
    main()
