"""Where the seconds of a picture go at full size on a card: text, modulation, steps, decoding, and between them.

    python benchmarks/picture.py --dtype fp8 [--ways exact int8 fp8 fast faster] [--steps 28] [--rounds 3]

FLUX.1-dev's sizes with random weights, text encoders included, 1024x1024, through `Pipeline.draw` as a command calls
it, nothing compiled. A way is one of `--attention`, or of `--cache` with exact attention. Whole pictures take turns,
text to a picture on the CPU, then each way draws one with the device awaited around every part. Prints a line of JSON
for each way: `s`, the median of its pictures; `ratio`, that to the first way in the same round; seconds of its parts,
`host` being what is none of them, `forwards` how many ran; and `png`, of a file's bytes, which no picture has in it. At
the end `pictures_an_hour` of the first way, files included, one after the other and written by another thread.
`--tiny` runs small on any machine.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from latency import MODELS
from PIL import Image
from random_pipeline import random_pipeline
from timing import watched

from flux_core.hooks import parse_plan
from flux_core.images.metadata import png_bytes
from flux_core.kernels import install
from flux_core.kernels.attention import EIGHT
from flux_core.pipeline import Pipeline
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import flow

CACHES = ("fast", "faster")


def ready(pipeline: Pipeline, way: str, size: int, steps: int) -> GenerationRequest:
    """The request of a way, with that attention installed, and its text not encoded yet."""
    pipeline.denoiser.prompts.forget()
    install(pipeline.model, pipeline.device, way if way in EIGHT else "exact")
    plan = parse_plan([{"kind": "step_cache", "preset": way}]) if way in CACHES else ()
    return GenerationRequest(
        name=pipeline.variant.name, prompt="a fox in the snow", seed=0, width=size, height=size, num_steps=steps,
        plan=plan, force=True,
    )  # fmt: skip


def drawn(pipeline: Pipeline, way: str, size: int, steps: int) -> Image.Image:
    return pipeline.draw(ready(pipeline, way, size, steps))


def seconds_of(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def parts_of(pipeline: Pipeline, request: GenerationRequest, device: str) -> dict[str, float]:
    """Seconds by parts of a picture, with the device awaited around each."""
    parts: dict[str, float] = {}
    calls: dict[str, int] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def run(*given: Any, **named: Any) -> Any:
            seconds, found = seconds_of(partial(call, *given, **named), device)
            parts[name] = parts.get(name, 0) + seconds
            calls[name] = calls.get(name, 0) + 1
            return found

        return run

    places = (
        (pipeline.denoiser.prompts, "_encode", "text"),
        (flow, "ModulationTable", "modulation"),
        (pipeline.model, "forward", "steps"),
        (pipeline.codec, "decode", "decoding"),
    )
    own = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, part), call in zip(places, own, strict=True):
        setattr(owner, name, timed(part, call))
    try:
        whole, image = seconds_of(partial(pipeline.draw, request), device)
    finally:
        for (owner, name, _), call in zip(places, own, strict=True):
            setattr(owner, name, call)
    parts["host"] = whole - sum(parts.values())
    return parts | {"forwards": calls["steps"], "png": seconds_of(partial(png_bytes, image), device)[0]}


def an_hour(pipeline: Pipeline, request: GenerationRequest, count: int, device: str) -> dict[str, int]:
    """Pictures an hour with their files' bytes, one after the other and beside the next picture."""

    def apart() -> None:
        for _ in range(count):
            png_bytes(pipeline.draw(request))

    def beside() -> None:
        with ThreadPoolExecutor(1) as thread:
            files = [thread.submit(png_bytes, pipeline.draw(request)) for _ in range(count)]
            for file in files:
                file.result()

    return {call.__name__: round(3600 * count / seconds_of(call, device)[0]) for call in (apart, beside)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(MODELS), default="fp8")
    parser.add_argument("--ways", nargs="+", choices=("exact", *EIGHT, *CACHES), default=["exact", *CACHES])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few blocks of 64 features, 64x64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    pipeline = random_pipeline(args.dtype, args.device, args.tiny, encoders=True)
    size = 64 if args.tiny else 1024
    calls = {way: partial(drawn, pipeline, way, size, args.steps) for way in args.ways}
    times: dict[str, list[float]] = {way: [] for way in args.ways}
    for call in calls.values():
        seconds_of(call, args.device)  # compiles kernels
    with watched(args.device) as card:
        for _, (way, call) in product(range(args.rounds), calls.items()):
            times[way].append(seconds_of(call, args.device)[0])
    place = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about = {
        "benchmark": "picture",
        "dtype": args.dtype,
        "size": size,
        "num_steps": args.steps,
        "device": place,
        **card,
    }
    for way, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times[args.ways[0]], strict=True))
        parts = parts_of(pipeline, ready(pipeline, way, size, args.steps), args.device)
        found = {"s": statistics.median(seconds), "ratio": ratio, **parts}
        rounded = {key: round(x, 4) for key, x in found.items()}
        print(json.dumps({**about, "way": way, **rounded}), flush=True)
    request = ready(pipeline, args.ways[0], size, args.steps)
    print(json.dumps({**about, "pictures_an_hour": an_hour(pipeline, request, 4, args.device)}))


if __name__ == "__main__":
    main()
