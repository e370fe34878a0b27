"""How far quantized Linears move flux-mini's velocity: the relative L2 error over recorded forwards.

    python benchmarks/velocity_error.py [--prompts 3] [--steps 28] [--formats int8 nf4]

Each prompt is drawn in fp32 on the CPU, and the latents of every third step are kept. The forwards at these are
repeated with Linears in a format, those that `--dtype` or `save` put into it: fp8 and int8 with tokens rounded, too, as
a card's units see them, and with weights alone; nf4 and GGUF's types with the modulation, which they have, too, and
some without. Everything else is in fp32, so nothing but the format stands between the velocities. "int6 weights" is no
format: int8's formula with 31 in the place of 127 for weights alone. Prints a line of JSON: errors, and their squares
as a ratio to that of fp8 with both rounded. `--tiny` draws one prompt with one step at 128x128.

    python benchmarks/velocity_error.py --name flux-dev

needs a card of 40 GB: one forward of random weights at full size in each format that can be made, beside bf16, by the
kernels of the pipeline and by plain functions. Prints a line of JSON for each; `ratio` is of the error to fp8's.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from in_format import NAMES, Make, as_in_units, linears_for, maker, quantize
from parity_diffusers import in_dtype_of, random_flux, random_inputs
from random_parts import tiny_variant
from torch import Tensor, nn

from flux_core import load_pipeline
from flux_core.kernels import install, put
from flux_core.linears.int8 import SMALLEST, Int8Linear, group_for, rotate
from flux_core.methods import calibration
from flux_core.methods.importance import default_prompts, read_prompts
from flux_core.model import ops
from flux_core.pipeline import Pipeline
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS, Variant


class Row(NamedTuple):
    """How Linears are replaced, and the format whose Linears these are."""

    make: Make
    linears: str


@contextmanager
def replaced(model: nn.Module, row: Row) -> Iterator[None]:
    """Each Linear that the format has becomes what the row makes of it, until the end."""
    linears = linears_for(model, row.linears)
    try:
        for name, linear in linears.items():
            model.set_submodule(name, row.make(linear))
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


@torch.no_grad()
def velocity_error(pipeline: Pipeline, paths: Sequence[calibration.Path], exact: Tensor, row: Row) -> float:
    """Relative L2 distance of the velocities with replaced Linears from `exact`, those of the model as it is."""
    with replaced(pipeline.model, row):
        found = calibration.velocities(pipeline, paths)
    return float((found - exact).norm() / exact.norm())


def int6(linear: nn.Linear) -> Int8Linear:
    """Rotated weights in codes from -31 to 31, and int8 tokens."""
    group = group_for(linear.in_features)
    weight = rotate(linear.weight.detach(), group)
    scale = (weight.abs().amax(dim=1, keepdim=True) * (1 / 31)).clamp(min=SMALLEST)
    return Int8Linear((weight / scale).round().to(torch.int8), scale.flatten(), linear.bias, group)


def in_units(make: Make) -> Make:
    """The same, with tokens rounded, too. Products of fp8 are in fp32 here, where the units' results are in bf16."""
    return lambda linear: as_in_units(make(linear))


FORMATS: dict[str, Row] = {
    **{name: Row(in_units(maker(name)), name) for name in NAMES},
    **{f"{name} weights": Row(maker(name), name) for name in ("fp8", "int8")},
    **{f"{name}, modulation kept": Row(maker(name), "fp8") for name in ("nf4", "q4_0", "q5_k", "q8_0")},
    "int6 weights": Row(in_units(int6), "int8"),
}


@torch.no_grad()
def at_full_size(variant: Variant, formats: Sequence[str], device: str) -> Iterator[dict[str, object]]:
    """Of each format: the velocity's error at random weights, relative to bf16's by the same functions."""
    inputs = random_inputs(variant.params, 64, variant.max_text, device)
    exact: dict[str, Tensor] = {}
    of_fp8: dict[str, float] = {}
    for name in ("bf16", "fp8", *(name for name in formats if name != "fp8")):
        model = random_flux(variant.params, device)
        if name != "bf16":
            quantize(model, name)
        found = {}
        for way in ("kernels", "plain"):
            install(model, device)
            if way == "plain":
                put(model, ops.PLAIN)
            velocity = model(**in_dtype_of(model, inputs)).float()
            base = exact.setdefault(way, velocity)
            found[way] = float((velocity - base).norm() / base.norm())
        of_fp8 = found if name == "fp8" else of_fp8
        ratios = {way: round(error / of_fp8[way], 4) for way, error in found.items()} if of_fp8 else {}
        yield {"format": name, "error": {way: round(error, 5) for way, error in found.items()}, "ratio": ratios}
        del model
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3, help="number of flux-mini's prompts to draw")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), help="names of rows (default: all)")
    parser.add_argument("--tiny", action="store_true", help="one prompt, one step, 128x128")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="where int8 and fp8 are not the card's own")
    parser.add_argument("--name", default="flux-mini", choices=["flux-mini", "flux-dev"])
    args = parser.parse_args()
    if args.name != "flux-mini":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        variant = tiny_variant(VARIANTS[args.name]) if args.tiny else VARIANTS[args.name]
        for line in at_full_size(variant, NAMES, device):
            print(json.dumps({"benchmark": "velocity_error", "name": args.name, **line}), flush=True)
        return 0
    chosen = dict.fromkeys(["fp8", *args.formats])
    if unknown := set(chosen) - set(FORMATS):
        parser.error(f"--formats: unknown {', '.join(sorted(unknown))}")

    number, steps, size = (1, 1, 128) if args.tiny else (args.prompts, args.steps, 256)
    prompts = read_prompts(default_prompts("flux-mini"))[:number]
    how = {"num_steps": steps, "width": size, "height": size}
    pipeline = load_pipeline("flux-mini", args.device, "float32")
    requests = [pipeline.complete(GenerationRequest(prompt=p.prompt, seed=p.seed, **how)) for p in prompts]
    with torch.no_grad():
        paths = calibration.trajectories(pipeline, requests)
        exact = calibration.velocities(pipeline, paths)
    errors = {name: velocity_error(pipeline, paths, exact, FORMATS[name]) for name in chosen}
    ratios = {name: (error / errors["fp8"]) ** 2 for name, error in errors.items()}
    found = {"error": errors, "squared_to_fp8": ratios}
    rounded = {what: {name: round(x, 4) for name, x in table.items()} for what, table in found.items()}
    about = {"forwards": sum(len(path.latents) for path in paths), "steps": steps, "torch": torch.__version__}
    print(json.dumps({"benchmark": "velocity_error", **rounded, **about}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
