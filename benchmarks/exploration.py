"""Overhead of an exploration: time of a session of pictures, relative to as many runs of the bare model.

    python benchmarks/exploration.py [--pictures 24] [--steps 4] [--rounds 3]

flux-mini, 256x256. A bare run is noise, denoising and decoding; its pixels are discarded. A session writes PNGs, table
rows, locks and a grid, all on the disk when it ends. Both take turns in one process with one loaded model; loading is
not measured. Prints a line of JSON: medians of the seconds, and `ratio`, the median over the rounds of session to bare
runs (goal: at most 1.15).
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import flux_core.pipeline
from flux_core.commands.explore import explore
from flux_core.pipeline import Pipeline, load_pipeline
from flux_core.sampling import euler, get_noise, get_schedule, pack, unpack

PROMPT = "a red apple"


@torch.no_grad()
def bare(pipeline: Pipeline, pictures: int, steps: int, side: int) -> None:
    for seed in range(pictures):
        x = pack(get_noise(1, side, side, pipeline.device, pipeline.dtype, seed))
        sigmas = get_schedule(steps, x.shape[1], shift=pipeline.variant.shift)
        velocity = pipeline.denoiser.velocity([PROMPT], [pipeline.variant.guidance], (side, side))
        pipeline.ae.decode(unpack(euler(velocity, x, sigmas), side, side))


def seconds(call: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    begin = time.perf_counter()
    call(*args, **kwargs)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4, help="few steps are the hard case: the overhead stays the same")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    pipeline = load_pipeline("flux-mini")
    flux_core.pipeline.load_pipeline = lambda *_: pipeline
    flags = {"prompt": PROMPT, "seeds": [",".join(map(str, range(args.pictures)))], "steps": [str(args.steps)]}
    flags |= {"width": str(args.side), "height": str(args.side), "force": True}
    bare(pipeline, 1, args.steps, args.side)
    runs, sessions = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for _ in range(args.rounds):
            runs.append(seconds(bare, pipeline, args.pictures, args.steps, args.side))
            sessions.append(seconds(explore, output_dir=folder, **flags))
    ratio = statistics.median(b / a for a, b in zip(runs, sessions, strict=True))
    figures = {"bare_s": statistics.median(runs), "session_s": statistics.median(sessions), "ratio": ratio}
    about = {"benchmark": "exploration", "pictures": args.pictures, "steps": args.steps, "side": args.side}
    print(json.dumps({**about, **{name: round(value, 3) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
