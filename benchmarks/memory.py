"""Steps of FLUX.1 in budgets of a card's memory: time, peak and pixels.

    python benchmarks/memory.py [--dtype bf16,int8] [--budgets 6GiB,8GiB,80GiB] [--shortage 16GiB] [--elsewhere]

Random weights of full size, batch 1, 1024x1024, text embeddings of random numbers. For each dtype it draws a picture
twice in each budget, the largest first, and prints a line of JSON:

ms         of a step, the median of the second picture's without its first two
queued_ms  in which Python queued a step's blocks; near `ms` the card waits for it
resident   blocks that stay on the device; `copied_gb` of the others come at each step
share      of the longest thing that has to happen in a step: its products (the step of the largest budget) or its
           copies (`copied_gb` over the rate of this run's `copy`), to `ms`. Goal: 0.9
used_gib   of the card, at most, seen after each step: CUDA's context, and what torch reserved for tensors
first_s    of the first picture, in which blocks are locked and a forward's peak is found, and of the second; `steps`
           in both
pixels     a hash. `equal`: whether they are those of the largest budget

`--shortage`: another process takes all memory that is free in the middle of a picture in that budget. Prints the time
of each step; `cost` is that of the step in which blocks went home, in steps behind it. `--elsewhere`: diffusers' group
and model offloading on the same weights, if it is installed. `--random N`: so many pictures of random budgets, sizes,
plans and guidance with a tenth of the blocks, under a limit of the allocator; prints those that failed or had other
pixels than with all memory. `--tiny` runs small on any machine.
"""

import argparse
import gc
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from latency import MODELS
from parity_diffusers import build_theirs, call_theirs, in_dtype_of, random_inputs
from random_parts import random_autoencoder, tiny_variant
from torch import Tensor

from flux_core.device.budget import CONTEXT, Budget, bytes_of
from flux_core.device.memory import Picture
from flux_core.device.plan import make_plan
from flux_core.device.rates import measured
from flux_core.hooks import Skip
from flux_core.kernels import install, install_decode
from flux_core.pipeline import Components, Pipeline
from flux_core.sampling import Step
from flux_core.variants import VARIANTS, Variant

BUDGETS = ["6GiB", "8GiB", "12GiB", "16GiB", "24GiB", "80GiB"]
NAMED = {"bf16": "bfloat16"}
GUIDED = {"negative_prompt": "y", "true_cfg_scale": 2.0}
SETTLING = 2
"""steps of a picture that are not counted: modulation is computed, and blocks find their places"""
HOG = """
import sys, torch
torch.empty(1, device="cuda")
print("ready", flush=True)
sys.stdin.readline()
free = torch.cuda.mem_get_info()[0]
taken = [torch.empty(2**26, dtype=torch.uint8, device="cuda") for _ in range(free // 2**26 - 1)]
print("taken", flush=True)
sys.stdin.readline()
"""
"""another process, which takes all memory when it is told to"""


class Watch:
    """An `on_step` that notes times, memory, and where blocks are."""

    def __init__(self, pipeline: Pipeline, also: Callable[[int], None] = lambda i: None) -> None:
        self.pipeline, self.also = pipeline, also
        self.marks: list[tuple[float, float]] = []
        """when it was called, and when it returned"""
        self.used = self.peak = self.reserved = 0
        self.places: dict[str, Any] = {}
        self.queued: list[float] = []
        """seconds in which Python queued the blocks of a step"""
        fetch = pipeline.placement.fetch

        def timed(blocks: Any) -> Any:
            began = time.perf_counter()
            yield from fetch(blocks)
            self.queued.append(time.perf_counter() - began)

        pipeline.placement.fetch = timed  # type: ignore[method-assign]
        self.restore = lambda: setattr(pipeline.placement, "fetch", fetch)

    def __call__(self, step: Step) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        called = time.perf_counter()
        if self.pipeline.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            self.used = max(self.used, total - free)
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.memory_reserved())
        for stream in self.pipeline.placement._streams.values():  # type: ignore[attr-defined]
            coming = [one.size for one in stream.bundles if id(one) not in stream.resident]
            pinned = sum(one.size for one in stream.bundles if one.is_pinned)
            self.places = {"resident": len(stream.resident), "copied_gb": sum(coming) / 1e9, "pinned_gb": pinned / 1e9}
        self.also(len(self.marks) + 1)
        self.marks.append((called, time.perf_counter()))

    @property
    def seconds(self) -> list[float]:
        return [after[0] - before[1] for before, after in zip(self.marks, self.marks[1:], strict=False)]


class Bench:
    def __init__(self, args: argparse.Namespace, dtype: str) -> None:
        self.args, self.dtype = args, dtype
        self.variant: Variant = tiny_variant(VARIANTS["flux-dev"]) if args.tiny else VARIANTS["flux-dev"]
        if args.random:
            fewer = replace(self.variant.params, depth=2, depth_single_blocks=4)
            self.variant = replace(self.variant, params=fewer)
        self.model = MODELS[dtype](self.variant.params, args.device).to("cpu")
        install(self.model, torch.device(args.device))
        ae = random_autoencoder(self.variant, args.device)
        install_decode(ae, torch.device(args.device))
        self.components = Components(self.text, self.vector, self.model, ae.to("cpu"))
        self.how = {"num_steps": args.steps, **dict.fromkeys(("width", "height"), 64 if args.tiny else args.size)}

    def text(self, prompts: list[str]) -> Tensor:
        """In place of T5."""
        shape = len(prompts), self.variant.max_text, self.variant.params.context_in_dim
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def vector(self, prompts: list[str]) -> Tensor:
        """In place of CLIP."""
        return torch.randn(len(prompts), self.variant.params.vec_in_dim, generator=torch.Generator().manual_seed(2))

    def say(self, what: str, **figures: Any) -> None:
        figures = {key: round(x, 4) if isinstance(x, float) else x for key, x in figures.items()}
        print(json.dumps({"benchmark": "memory", "dtype": self.dtype, "what": what, **figures}), flush=True)

    def pipeline(self, budget: str) -> Pipeline:
        size = bytes_of(budget, "--budgets") - CONTEXT * (not self.args.tiny)
        device = torch.device(self.args.device) if self.args.device == "cuda" else torch.device("cpu", 0)
        return Pipeline(
            self.variant, self.components, device, torch.bfloat16, offload=True, budget=Budget(size, budget)
        )

    def draw(self, pipeline: Pipeline, **also: Any) -> tuple[float, Watch, str]:
        """Seconds, what was seen, and a hash of the pixels."""
        watch, began = Watch(pipeline, **also), time.perf_counter()
        image = pipeline.generate("x", 1, on_step=watch, force=True, **self.how)[0]
        watch.restore()
        return time.perf_counter() - began, watch, hashlib.sha256(image.tobytes()).hexdigest()[:16]

    def budgets(self) -> None:
        taken = 0
        if self.args.device == "cuda":
            self.release()
            free, total = torch.cuda.mem_get_info()
            taken = total - free - torch.cuda.memory_reserved()
        rates = measured(torch.device(self.args.device))
        copy = rates.copy if rates else float("inf")
        self.say("rates", copy_gb=copy / 1e9, tera=rates.tera if rates else None, context_gib=taken / 2**30)
        products, pixels = 0.0, ""
        for budget in sorted(self.args.budgets, key=lambda x: -bytes_of(x, "--budgets")):
            self.release()
            pipeline = self.pipeline(budget)
            first, _, _ = self.draw(pipeline)
            second, watch, found = self.draw(pipeline)
            ms = 1000 * statistics.median(watch.seconds[SETTLING - 1 :])
            products, pixels = products or ms, pixels or found
            longest = max(products, 1e12 * watch.places.get("copied_gb", 0.0) / copy)
            sizes = {"used": watch.used, "reserved": watch.reserved, "tensors": watch.peak}
            queued = 1000 * statistics.median(watch.queued[SETTLING:])
            figures = {"budget": budget, "ms": ms, "queued_ms": queued, **watch.places, "share": longest / ms}
            figures |= {f"{kind}_gib": size / 2**30 for kind, size in sizes.items()}
            figures |= {"first_s": first, "second_s": second, "steps": self.args.steps}
            figures |= {"pixels": found, "equal": found == pixels}
            self.say("budget", **figures)
            del pipeline, watch

    def shortage(self) -> None:
        """Another process takes what is free after a step of the second picture."""
        if self.args.device != "cuda":
            return
        self.release()
        pipeline = self.pipeline(self.args.shortage)
        _, _, expected = self.draw(pipeline)
        with subprocess.Popen([sys.executable, "-c", HOG], stdin=-1, stdout=-1, text=True) as other:
            assert other.stdin is not None and other.stdout is not None
            other.stdout.readline()

            def take(step: int) -> None:
                if step == 4:
                    torch.cuda.empty_cache()
                    other.stdin.write("\n")
                    other.stdin.flush()
                    other.stdout.readline()

            _, watch, found = self.draw(pipeline, also=take)
            other.kill()
        times = watch.seconds
        cost = times[3] / statistics.median(times[4:]) - 1
        ms = [round(1000 * x, 1) for x in times]
        self.say("shortage", budget=self.args.shortage, ms=ms, cost=cost, equal=found == expected, **watch.places)

    def random(self, number: int) -> None:
        """Pictures in budgets from the smallest that `doctor` prints to one where all fits."""
        draw, failed, began = random.Random(0), [], time.perf_counter()
        sizes = [32, 48, 64] if self.args.tiny else [256, 512, 768, 1024, 1280]
        whole = "1GB" if self.args.tiny else "80GiB"
        expected: dict[str, str] = {}
        drawn = 0
        with suppress(KeyboardInterrupt):  # then those so far are told
            for _ in range(number):
                drawn += 1
                width, height = draw.choice(sizes), draw.choice(sizes)
                how: dict[str, Any] = {"width": width, "height": height, "num_steps": draw.choice([2, 3])}
                what = draw.choice(["nothing", "plan", "guidance"])
                how |= {"plan": {"plan": [Skip(blocks="layer.1")]}, "guidance": GUIDED}.get(what, {})
                rows, dtype = 1 + (what == "guidance"), NAMED.get(self.dtype, self.dtype)
                plan = make_plan(self.variant, 0, dtype, None, Picture(width, height, rows))
                most = round(1.1 * (plan.smallest + sum(plan.blocks)))
                budget, request = str(draw.randint(plan.smallest, most)), json.dumps(how, default=str)
                for size in dict.fromkeys([budget] if request in expected else [whole, budget]):
                    pipeline = self.pipeline(size)
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            image = pipeline.generate("x", 1, force=True, **how)[0]
                    except Exception as error:
                        failed.append({"budget": size, "request": request, "error": str(error)[-300:]})
                        continue
                    found = hashlib.sha256(image.tobytes()).hexdigest()[:16]
                    if found != expected.setdefault(request, found):
                        failed.append({"budget": size, "request": request, "pixels": "differ"})
                    del pipeline
        seconds = time.perf_counter() - began
        self.say("random", pictures=drawn, requests=len(expected), failed=len(failed), some=failed[:4], s=seconds)

    def elsewhere(self) -> None:
        """diffusers' group offloading, blocks or leaves, with a stream, and its model offloading."""
        from accelerate import cpu_offload_with_hook

        inputs = in_dtype_of(self.model, random_inputs(self.variant.params, 64, 512, self.args.device))
        for level in ("block_level", "leaf_level", "model"):
            self.release()
            other = build_theirs(self.model)
            began = time.perf_counter()
            if level == "model":  # what `enable_model_cpu_offload` calls for each model of a pipeline
                other, _ = cpu_offload_with_hook(other.cpu(), torch.device("cuda"))
            else:
                other.enable_group_offload(
                    onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type=level,
                    num_blocks_per_group=1 if level == "block_level" else None, use_stream=True, record_stream=True,
                )  # fmt: skip
            setup, times = time.perf_counter() - began, []
            torch.cuda.reset_peak_memory_stats()
            for _ in range(4):
                torch.cuda.synchronize()
                began = time.perf_counter()
                call_theirs(other, inputs)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            peaks = {"tensors": torch.cuda.max_memory_allocated(), "allocator": torch.cuda.max_memory_reserved()}
            shown = {kind: round(size / 2**30, 3) for kind, size in peaks.items()}
            seconds = {"ms": 1000 * min(times), "first_s": times[0], "setup_s": setup}
            self.say(f"diffusers, {level}", **seconds, peak_gib=shown)
            del other

    def release(self) -> None:
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comma: Callable[[str], list[str]] = partial(str.split, sep=",")
    parser.add_argument("--dtype", type=comma, default=["bf16"], help=f"some of {','.join(MODELS)}")
    parser.add_argument("--budgets", type=comma, default=BUDGETS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--shortage", metavar="BUDGET")
    parser.add_argument("--elsewhere", action="store_true")
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for dtype in args.dtype:
        bench = Bench(args, dtype)
        if args.random:
            bench.random(args.random)
            continue
        bench.budgets()
        if args.shortage:
            bench.shortage()
        if args.elsewhere and dtype == "bf16":
            bench.elsewhere()
        del bench
        gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
