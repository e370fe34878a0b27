"""Quality of flux-mini's pictures when only 14 or 10 of 28 forwards run: searched steps, steps by hand, other caches.

    python benchmarks/steps_left_out.py [--prompts 16] [--first 24] [--chart FILE.png]

Draws prompts of flux_core/prompts/flux-mini.json, by default the 25th on, which no preset was searched on, and compares
with their uncached pictures. For each way:

forwards   blocks that ran for a picture, over how many the model has, the mean over pictures
psnr_db    PSNR of pixels, the mean over pictures (that of `caching.py` is of the mean squared error)
change     1 - cosine of dinov2-mini's class tokens, the mean over pictures with the 95 % interval

The ways, each for both numbers of forwards, or as near as its one parameter comes:

searched   the presets of `--cache`; their steps with the last velocity reused; and on a line (slope 1)
by hand    `methods.step_search.by_hand`
plain      a picture of so many steps
blocks     the most important blocks (`hooks.layers.IMPORTANCE`) in every step; the others in every fourth, or in those
           that `--cache faster` runs, and elsewhere what each added in its last
others     written here and in examples/ from their papers' formulae, on the residual of all blocks:
           - first-block cache (ParaAttention), by its threshold
           - TeaCache (arXiv 2411.19108), the authors' polynomial for FLUX.1-dev
           - MagCache (arXiv 2506.09045), magnitudes measured on one uncached picture of another prompt; at most 3 steps
             in a row, none in the first fifth
           - TaylorSeer (arXiv 2503.06923), order 1 and 2, the first 3 steps and then every second or third

Prints lines of JSON on stdout and at the end a table on stderr. `--tiny` runs it small.
"""

import argparse
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from teacache import TeaCache
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import At, Custom, FirstBlockCache, Intervention, StepCache
from flux_core.hooks.layers import IMPORTANCE
from flux_core.hooks.sites import block_names
from flux_core.hooks.step_cache import PRESETS
from flux_core.methods.importance import default_prompts, read_prompts
from flux_core.methods.scoring import load_scorer
from flux_core.methods.step_search import by_hand
from flux_core.pipeline import Pipeline

STEPS = 28
NEAR = {"first-block cache": (0.1, 0.15), "TeaCache": (0.3, 0.5), "MagCache": (0.2, 1.0), "TaylorSeer": (2, 3)}
"""parameters that come near 14 and 10 forwards"""


class ResidualCache:
    """Skips all blocks at chosen steps, and adds a residual that is made of those before. One for each picture."""

    def __init__(self, blocks: list[str]) -> None:
        self.blocks, self.skipping = blocks, False
        self.plan = [Custom(sites=blocks, fn=self.around)]

    def skips(self, step: int) -> bool:
        raise NotImplementedError

    def keep(self, residual: Tensor, step: int) -> None:
        raise NotImplementedError

    def residual(self, step: int) -> Tensor:
        raise NotImplementedError

    def around(self, call: Callable[[Any], Any], x: Any, at: At) -> Any:
        if at.name == self.blocks[0]:  # here x is (img, txt); in the last block, the joined sequence
            self.entered, self.skipping = torch.cat(x[::-1], dim=1), self.skips(at.step)
        last = at.name == self.blocks[-1]
        if self.skipping:
            return self.entered + self.residual(at.step) if last else x
        out = call(x)
        if last:
            self.keep(out - self.entered, at.step)
        return out


class MagCache(ResidualCache):
    """Reuses the residual while the product of its magnitudes' ratios stays near 1, in sum."""

    def __init__(self, blocks: list[str], ratios: Sequence[float], threshold: float) -> None:
        super().__init__(blocks)
        self.ratios, self.threshold = ratios, threshold
        self.product, self.error, self.in_row = 1.0, 0.0, 0

    def skips(self, step: int) -> bool:
        self.product *= self.ratios[step]
        self.error += abs(1 - self.product)
        self.in_row += 1
        skips = step >= 0.2 * len(self.ratios) and self.in_row <= 3 and self.error < self.threshold
        if not skips:
            self.product, self.error, self.in_row = 1.0, 0.0, 0
        return skips

    def keep(self, residual: Tensor, step: int) -> None:
        self.last = residual

    def residual(self, step: int) -> Tensor:
        return self.last


class Magnitudes(ResidualCache):
    """Skips nothing, and measures the ratio of each residual's magnitude to that before, the mean over tokens."""

    def __init__(self, blocks: list[str]) -> None:
        super().__init__(blocks)
        self.ratios, self.before = list[float](), None

    def skips(self, step: int) -> bool:
        return False

    def keep(self, residual: Tensor, step: int) -> None:
        now = residual.norm(dim=-1)
        self.ratios.append(1.0 if self.before is None else (now / self.before).mean().item())
        self.before = now


class TaylorSeer(ResidualCache):
    """A Taylor series of the residual in steps, its derivatives by differences of the forwards that ran."""

    def __init__(self, blocks: list[str], every: int, order: int) -> None:
        super().__init__(blocks)
        self.every, self.order, self.terms, self.step = every, order, list[Tensor](), 0

    def skips(self, step: int) -> bool:
        return step >= 3 and (step - 2) % self.every != 0

    def keep(self, residual: Tensor, step: int) -> None:
        terms = [residual]
        for before in self.terms[: self.order]:
            terms.append((terms[-1] - before) / (step - self.step))
        self.terms, self.step = terms, step

    def residual(self, step: int) -> Tensor:
        return sum(term * (step - self.step) ** i / math.factorial(i) for i, term in enumerate(self.terms))


class BlockBudgets:
    """The most important blocks run in every step, the others at `steps`, and add elsewhere what they did last."""

    def __init__(self, blocks: list[str], most: int, steps: Iterable[int]) -> None:
        ranked = sorted(zip(IMPORTANCE["flux-mini"], blocks, strict=True), reverse=True)
        self.always, self.steps = {name for _, name in ranked[:most]}, {*steps}
        self.added: dict[str, Any] = {}
        self.plan = [Custom(sites=blocks, fn=self.around)]

    def around(self, call: Callable[[Any], Any], x: Any, at: At) -> Any:
        pair = isinstance(x, tuple)
        if at.name in self.always or at.step in self.steps:
            out = call(x)
            self.added[at.name] = tuple(a - b for a, b in zip(out, x, strict=True)) if pair else out - x
            return out
        added = self.added[at.name]
        return tuple(a + b for a, b in zip(x, added, strict=True)) if pair else x + added


@dataclass(frozen=True)
class Way:
    """A way to draw with fewer forwards."""

    name: str
    forwards: int
    """those that it is near to"""
    plan: Callable[[], Sequence[Intervention]]
    """fresh for each picture"""
    steps: int


def ways(blocks: list[str], ratios: Sequence[float], steps: int) -> Iterator[Way]:
    for i, preset in enumerate(PRESETS):
        slopes = PRESETS[preset].of(steps)
        number = steps - len(slopes)

        def way(name: str, plan: Callable[[], Any], steps: int = steps, number: int = number) -> Way:
            return Way(name, number, plan, steps)

        yield way(f"searched: --cache {preset}", lambda preset=preset: [StepCache(preset=preset)])
        for how, slope in {"reuse": 0.0, "linear": 1.0}.items():
            cache = StepCache(steps=tuple(slopes), slope=slope)
            yield way(f"searched steps, {how}", lambda cache=cache: [cache])
        for name, cache in by_hand(number, steps).items():
            yield way(f"by hand: {name}", lambda cache=cache: [cache])
        yield way(f"plain, {number} steps", list, number)
        fourth, run = range(0, steps, 4), set(range(steps)) - {*PRESETS["faster"].of(steps)}
        for name, most, at in (("every fourth step", (4, 2)[i], fourth), ("the steps of faster", (3, 1)[i], run)):
            what = f"blocks: the {most} most important in every step, the others in {name}"
            yield way(what, lambda most=most, at=at: BlockBudgets(blocks, most, at).plan)
        near = {name: values[i] for name, values in NEAR.items()}
        x = near["first-block cache"]
        yield way(f"first-block cache {x}", lambda x=x: [FirstBlockCache(threshold=x)])
        x = near["TeaCache"]
        yield way(f"TeaCache {x}", lambda x=x: TeaCache(x, blocks).plan)
        x = near["MagCache"]
        yield way(f"MagCache {x}", lambda x=x: MagCache(blocks, ratios, x).plan)
        for order in (1, 2):
            x = near["TaylorSeer"]
            yield way(f"TaylorSeer N={x}, order {order}", lambda x=x, order=order: TaylorSeer(blocks, x, order).plan)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def psnr(found: Image.Image, exact: Image.Image) -> float:
    """In dB; that of one level in one of all values where none differs."""
    error = ((levels(found) - levels(exact)) ** 2).mean()
    return 10 * math.log10(255**2 / max(error, 1 / levels(exact).size))


def draw(pipeline: Pipeline, prompt: Any, plan: Sequence[Intervention], size: int, steps: int) -> tuple[Any, float]:
    """The picture, and how many forwards its blocks were."""
    ran: list[None] = []
    blocks = [*pipeline.model.double_blocks, *pipeline.model.single_blocks]
    handles = [block.register_forward_pre_hook(lambda *_: ran.append(None)) for block in blocks]
    how = {"width": size, "height": size, "num_steps": steps, "force": True}
    image = pipeline.generate(prompt.prompt, seed=prompt.seed, plan=plan, **how)[0]
    for handle in handles:
        handle.remove()
    return image, len(ran) / len(blocks)


def measured(prompts: Sequence[Any], other: Any, size: int, steps: int, device: str) -> list[dict[str, Any]]:
    """A row for each way. other: the prompt that magnitudes are measured on."""
    pipeline, scorer = load_pipeline("flux-mini", device), load_scorer("dinov2-mini", torch.device(device))
    blocks = block_names(pipeline.variant.params)
    magnitudes = Magnitudes(blocks)
    draw(pipeline, other, magnitudes.plan, size, steps)
    found: dict[Way, list[tuple[float, float, float]]] = {way: [] for way in ways(blocks, magnitudes.ratios, steps)}
    for number, prompt in enumerate(prompts, 1):
        exact, _ = draw(pipeline, prompt, [], size, steps)
        for way, values in found.items():
            image, ran = draw(pipeline, prompt, way.plan(), size, way.steps)
            one, two = scorer.features([image, exact])
            values.append((psnr(image, exact), float(1 - one @ two), ran))
        print(f"{number} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    return [row(way, values) for way, values in found.items()]


def row(way: Way, values: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    psnrs, changes, ran = zip(*values, strict=True)
    spread = 1.96 * statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
    return {
        "benchmark": "steps_left_out",
        "near": way.forwards,
        "way": way.name,
        "forwards": round(statistics.fmean(ran), 1),
        "psnr_db": round(statistics.fmean(psnrs), 2),
        "change": round(statistics.fmean(changes), 5),
        "ci95": None if spread is None else round(spread, 5),
        "pictures": len(values),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| way | forwards | PSNR | change, ±95 % |", "| --- | --- | --- | --- |"]
    for one in rows:
        wide = "" if one["ci95"] is None else f" ± {one['ci95']:.4f}"
        lines.append(f"| {one['way']} | {one['forwards']:g} | {one['psnr_db']:.1f} dB | {one['change']:.4f}{wide} |")
    return "\n".join(lines)


def chart(rows: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: PSNR over forwards, a colour for each family of ways."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = {"searched: ": "#d9822b", "searched steps": "#e8b98a", "by hand": "#3b6fb6", "plain": "#777777"}
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for one in rows:
        colour = next((x for start, x in families.items() if one["way"].startswith(start)), "#5a9a4f")
        axes.plot(one["forwards"], one["psnr_db"], "o", color=colour, markersize=4)
        axes.annotate(one["way"], (one["forwards"], one["psnr_db"]), (5, -2), textcoords="offset points", fontsize=6)
    axes.set_xlabel("forwards of 28 steps")
    axes.set_ylabel("PSNR, dB")
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="how many")
    parser.add_argument("--first", type=int, default=24, help="prompts of the file that are left out before them")
    parser.add_argument("--chart", type=Path, help="a PNG to write, with matplotlib")
    parser.add_argument("--tiny", action="store_true", help="few steps of small pictures")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    size, steps = (64, 6) if args.tiny else (256, STEPS)
    prompts = read_prompts(default_prompts("flux-mini"))
    rows = measured(prompts[args.first :][: args.prompts], prompts[0], size, steps, args.device)
    for one in rows:
        print(json.dumps(one))
    print(table(rows), file=sys.stderr)
    if args.chart:
        args.chart.write_bytes(chart(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
