"""Time saved and quality lost by the first-block cache, by threshold and at fixed schedules.

    python benchmarks/caching.py [--prompts 8] [--seeds 1] [--chart FILE.png] [--sheet FILE.jpg]
    python benchmarks/caching.py --full-size [--rounds 4] [--compile blocks|none]

The first draws flux-mini's prompts with and without a cache, 28 steps, and prints for each setting:

saved      share of the steps at which all blocks but the first were skipped, counted at the second block
change     1 - cosine of dinov2-mini's class tokens to the uncached picture of the same prompt and seed, mean of all
           pictures with the 95 % interval over the prompts
psnr_db    of the mean squared error over all pictures, in dB; null if no pixel differs

For scale, *another seed* is the uncached picture of the prompt's next seed. --chart writes a chart of these, --sheet
the pictures of the first eight prompts.

--full-size measures time: FLUX.1-dev's sizes, random weights in bf16, 1024x1024, 512 text tokens, batch 1, blocks
compiled. With random weights a threshold is meaningless, so the decisions are forced. Forwards of one step, in turns
(`timing.py`):

plain      without a plan
kept       all blocks run, and their residual is stored; by a schedule, so without a decision
decided    the same after the decision (threshold 0); `over_plain_ms` and `over_kept_ms` are medians over the rounds,
           `waits` counts the host's synchronizations in a forward (None where CUDA does not count them)
reused     the stored residual is added again

and all 28 steps of an image, noise to latents, the faster of two: `scheduled` reuses every second step, `decided` the
same steps by its threshold. Prints lines of JSON on stdout and at the end a table on stderr. `--tiny` runs either part
small on any machine.
"""

import argparse
import io
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from latency import compile_blocks
from parity_diffusers import in_dtype_of, random_flux, random_inputs
from PIL import Image
from random_parts import tiny_variant
from timing import Call, ratio, turns

from flux_core import load_pipeline
from flux_core.hooks import At, Custom, FirstBlockCache, HookRun
from flux_core.kernels import install
from flux_core.methods.importance import Prompt, default_prompts, read_prompts
from flux_core.methods.scoring import Scorer, load_scorer
from flux_core.model import Flux
from flux_core.sampling import euler, flow_velocity, get_schedule
from flux_core.variants import VARIANTS

STEPS = 28
CACHES = {
    "threshold": ("0.05", "0.08", "0.1", "0.15", "0.2", "0.3"),
    "schedule": ("3-27/4", "1-27/2", "1-27/3,2-27/3", "1-27/4,2-27/4,3-27/4"),
    "later schedule": ("7-27/2", "7-27/3,8-27/3", "7-27/4,8-27/4,9-27/4"),
}
"""settings of each kind, from few saved steps to many; a schedule lists the cached steps"""
COLOURS = {"threshold": "#3b6fb6", "schedule": "#d9822b", "later schedule": "#5a9a4f"}
OTHER_SEED = "another seed"


# Quality --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Measurements of a setting."""

    kind: str
    setting: str
    saved: float
    change: float
    ci95: float | None
    psnr_db: float | None


def squared_error(a: Image.Image, b: Image.Image) -> float:
    """The mean squared error of the pixels, in levels of 255."""
    x, y = (np.asarray(image, dtype=np.float64) for image in (a, b))
    return float(((x - y) ** 2).mean())


def compare(kind: str, setting: str, saved: float, pairs: Sequence[tuple[Any, Any]], scorer: Scorer) -> Result:
    """The result of a setting. pairs: for each prompt the pictures and their references."""
    changes, errors = [], []
    for found, exact in pairs:
        similar = (scorer.features(found) * scorer.features(exact)).sum(1)
        changes.append(float(1 - similar.mean()))
        errors += map(squared_error, found, exact)
    error = statistics.mean(errors)
    spread = 1.96 * statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
    psnr = 10 * math.log10(255**2 / error) if error else None
    return Result(kind, setting, saved, statistics.mean(changes), spread, psnr)


def quality(prompts: Sequence[Prompt], seeds: int, size: int, steps: int, most: int, device: str) -> Any:
    """The results, and the rows of the sheet. most: the most settings of each kind."""
    pipeline, scorer = load_pipeline("flux-mini", device), load_scorer("dinov2-mini", torch.device(device))
    how = {"width": size, "height": size, "num_steps": steps, "force": True}
    ran: list[None] = []
    pipeline.model.double_blocks[1].register_forward_pre_hook(lambda *_: ran.append(None))

    def draw(plan: Sequence[FirstBlockCache], seeds: int) -> tuple[list[list[Image.Image]], float]:
        """The pictures of each prompt, and the share of saved steps."""
        ran.clear()
        pictures = [pipeline.generate(p.prompt, seed=p.seed, num_images=seeds, plan=plan, **how) for p in prompts]
        return pictures, 1 - len(ran) / (len(prompts) * seeds * steps)

    exact, _ = draw([], seeds + 1)
    pairs = [(pictures[1:], pictures[:-1]) for pictures in exact]
    results, sheet = [compare("seed", OTHER_SEED, 0.0, pairs, scorer)], [("uncached", exact)]
    say(results[0])
    references = [pictures[:seeds] for pictures in exact]
    for kind, setting in [(kind, setting) for kind, settings in CACHES.items() for setting in settings[:most]]:
        found, saved = draw([cache_of(kind, setting, steps)], seeds)
        results.append(compare(kind, setting, saved, list(zip(found, references, strict=True)), scorer))
        sheet.append((f"{setting}\n{saved:.0%} saved".replace(",", ",\n"), found))
        say(results[-1])
    return results, [(label, [pictures[0] for pictures in drawn[:8]]) for label, drawn in sheet]


def cache_of(kind: str, setting: str, steps: int) -> FirstBlockCache:
    """The cache of a setting, for a run of `steps` steps."""
    if kind == "threshold":
        return FirstBlockCache(threshold=float(setting))
    schedule = FirstBlockCache(schedule=setting).schedule or ()
    return FirstBlockCache(schedule=[step for step in schedule if step < steps] or [steps - 1])


def say(result: Result) -> None:
    rounded = {key: round(x, 4) if isinstance(x, float) else x for key, x in vars(result).items()}
    print(json.dumps({"benchmark": "caching", "part": "quality", **rounded}), flush=True)


def table(results: Sequence[Result]) -> str:
    lines = ["| cache | steps saved | change, ±95 % | PSNR |", "| --- | --- | --- | --- |"]
    for result in results:
        name = result.setting if result.kind == "seed" else f"{result.kind} {result.setting}"
        interval = "" if result.ci95 is None else f" ± {result.ci95:.4f}"
        psnr = "" if result.psnr_db is None else f"{result.psnr_db:.1f} dB"
        lines.append(f"| {name} | {result.saved:.0%} | {result.change:.4f}{interval} | {psnr} |")
    return "\n".join(lines)


def chart(results: Sequence[Result], title: str) -> bytes:
    """A PNG: quality lost over the share of saved steps, by DINOv2 and in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    scale = next(result for result in results if result.setting == OTHER_SEED)
    figures = ("change", "1 - similarity (DINOv2)"), ("psnr_db", "PSNR, dB")
    for axes, (figure_of, label) in zip(figure.subplots(1, 2), figures, strict=True):
        for kind, colour in COLOURS.items():
            mine = [result for result in results if result.kind == kind and getattr(result, figure_of) is not None]
            x, y = [100 * result.saved for result in mine], [getattr(result, figure_of) for result in mine]
            axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1, label=kind)
            for result, *place in zip(mine, x, y, strict=True) if (kind, figure_of) == ("threshold", "psnr_db") else ():
                axes.annotate(result.setting, place, (3, 4), textcoords="offset points", fontsize=7, color=colour)
        axes.axhline(getattr(scale, figure_of), color="#777777", linewidth=1, linestyle=":", label=OTHER_SEED)
        axes.set_xlabel("steps saved, %")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


# Time -----------------------------------------------------------------------------------------------------


def waits_of(call: Call, device: str) -> int | None:
    """How often the host synchronizes with the device in a call, by torch's debug mode; None without CUDA."""
    if not device.startswith("cuda"):
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def steps_in_turns(model: Flux, inputs: dict[str, Any], rounds: int, seconds: float, device: str) -> dict[str, Any]:
    """Milliseconds of a forward at step 5, after a full forward at step 0."""
    sigmas = get_schedule(STEPS, inputs["img"].shape[1])

    def after_full_forward(cache: FirstBlockCache) -> Call:
        run = HookRun([cache], model.params, sigmas)
        run.begin(sigmas[0])
        model(**inputs, run=run)
        run.begin(sigmas[5])

        def again() -> Any:
            run._calls.clear()  # each is the first forward of its step, which has the cache's memory
            return model(**inputs, run=run)

        return again

    calls = {
        "plain": partial(model, **inputs),
        "kept": after_full_forward(FirstBlockCache(schedule=[STEPS - 1])),
        "decided": after_full_forward(FirstBlockCache(threshold=0)),
        "reused": after_full_forward(FirstBlockCache(schedule=[5])),
    }
    times = turns(calls, rounds, seconds, device)
    over = {
        f"over_{name}_ms": statistics.median(a - b for a, b in zip(times["decided"], times[name], strict=True))
        for name in ("plain", "kept")
    }
    return {
        "ms": {name: round(statistics.median(found), 3) for name, found in times.items()},
        "decision": {name: round(ms, 3) for name, ms in over.items()}
        | {"waits": waits_of(calls["decided"], device), "waits_plain": waits_of(calls["plain"], device)},
        "ratio": {name: round(ratio(times, name, "plain"), 4) for name in calls},
    }


def images(model: Flux, inputs: dict[str, Any], steps: int) -> dict[str, Any]:
    """Seconds of all steps of an image, and the number of steps that ran all blocks."""
    given = [inputs[name] for name in ("img_ids", "txt", "txt_ids", "y", "guidance")]
    sigmas = get_schedule(steps, inputs["img"].shape[1])
    caches: dict[str, dict[str, Any]] = {
        "plain": {},
        "scheduled": {"schedule": range(1, steps, 2)},
        "decided": {"threshold": 1e30, "max_in_row": 1},
        "two in three": {"schedule": [step for step in range(steps) if step % 3]},
    }

    def image(cache: dict[str, Any]) -> int:
        ran = []

        def count(call: Callable[[Any], Any], x: Any, at: At) -> Any:
            ran.append(at.step)
            return call(x)

        plan = [Custom(sites="layer.1", fn=count), FirstBlockCache(**cache, follow=True)] if cache else []
        run = HookRun(plan, model.params, sigmas) if cache else None
        euler(flow_velocity(model, *given, run=run), inputs["img"], sigmas).cpu()
        return len(ran) if cache else steps

    seconds: dict[str, list[float]] = {name: [] for name in caches}
    computed = {}
    for _ in range(2):
        for name, cache in caches.items():
            began = time.perf_counter()
            computed[name] = image(cache)
            seconds[name].append(time.perf_counter() - began)
    fastest = {name: min(found) for name, found in seconds.items()}
    return {
        "s": {name: round(s, 3) for name, s in fastest.items()},
        "ratio": {name: round(s / fastest["plain"], 4) for name, s in fastest.items()},
        "computed": computed,
    }


def full_size(args: argparse.Namespace) -> None:
    variant, size, seconds, number = VARIANTS["flux-dev"], 1024, 0.7, STEPS
    if args.tiny:
        variant, size, seconds, number = tiny_variant(variant), 64, 0.01, 4
    model = random_flux(variant.params, args.device)
    install(model, args.device)
    if args.compile == "blocks":
        compile_blocks(model)
    inputs = in_dtype_of(model, random_inputs(variant.params, size // 16, variant.max_text, args.device))
    lines = [
        {"part": "step", **steps_in_turns(model, inputs, args.rounds, seconds, args.device)},
        {"part": "image", **images(model, inputs, number)},
    ]
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    for line in lines:
        print(json.dumps({"benchmark": "caching", "size": size, "compile": args.compile, **line}))
    shown = [f"{variant.name}, {size}x{size}, {name}, torch {torch.__version__}", *map(str, lines)]
    print(*shown, sep="\n", file=sys.stderr)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="time at full size instead of quality")
    parser.add_argument("--prompts", type=int, default=8, help="number of flux-mini's prompts to draw")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--chart", type=Path, help="a PNG to write, with matplotlib")
    parser.add_argument("--sheet", type=Path, help="a JPEG to write")
    parser.add_argument("--compile", choices=["blocks", "none"], default="blocks")
    parser.add_argument("--rounds", type=int, default=4, help="measured rounds, with --full-size")
    parser.add_argument("--tiny", action="store_true", help="a few blocks, or few steps of small pictures")
    parser.add_argument("--device", help="default: cuda with --full-size if available, else cpu")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if args.full_size and torch.cuda.is_available() else "cpu")
    if args.full_size:
        full_size(args)
        return 0

    size, steps, most = (64, 4, 1) if args.tiny else (256, STEPS, 9)
    prompts = read_prompts(default_prompts("flux-mini"))[: args.prompts]
    results, rows = quality(prompts, args.seeds, size, steps, most, args.device)
    about = f"flux-mini, {len(prompts) * args.seeds} pictures, {steps} steps"
    if args.chart:
        args.chart.write_bytes(chart(results, about))
    if args.sheet:
        from flux_core.methods.charts import contact_sheet

        contact_sheet(rows, [prompt.prompt for prompt in prompts[:8]], 96).save(args.sheet, quality=80)
    print(about, table(results), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
