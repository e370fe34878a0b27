"""How far quantized Linears move flux-mini's velocity: the relative L2 error over recorded forwards.

    python benchmarks/velocity_error.py [--prompts 3] [--steps 28]

Each prompt is drawn in fp32 on the CPU, and the latents of every third step are kept. The forwards at these are
repeated with the Linears that `linears/fp8.py` quantizes in another format: with weights rounded alone, and with tokens
rounded, too, as a card's units see them. Everything else is in fp32, so nothing but the format stands between the
velocities. Prints a line of JSON: errors, and their squares as a ratio to that of fp8 with both rounded. `--tiny` draws
one prompt with one step at 128x128.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from flux_core import load_pipeline
from flux_core.linears.fp8 import Fp8Linear, quantize_rows, stays_bf16
from flux_core.linears.int8 import Int8Linear
from flux_core.methods import calibration
from flux_core.methods.importance import default_prompts, read_prompts
from flux_core.pipeline import Pipeline
from flux_core.request.generation import GenerationRequest

Replace = Callable[[nn.Linear], nn.Module]


def velocities(pipeline: Pipeline, paths: Sequence[calibration.Path]) -> Tensor:
    """The velocities at the kept latents, all in one vector, fp64."""
    found = []
    for request, latents in paths:
        strengths = [request.guidance or 0.0] * len(request.texts)
        velocity = pipeline.denoiser.velocity(request.texts, strengths, request.padded_size, sigmas=tuple(latents))
        found += [velocity(x.expand(len(request.texts), -1, -1), sigma) for sigma, x in latents.items()]
    return torch.cat([x.double().flatten() for x in found])


@contextmanager
def replaced(model: nn.Module, replace: Replace) -> Iterator[None]:
    """Each Linear that is quantized becomes what `replace` makes of it, until the end."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not stays_bf16(name)}
    try:
        for name, linear in linears.items():
            model.set_submodule(name, replace(linear))
        yield
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)


@torch.no_grad()
def velocity_error(pipeline: Pipeline, paths: Sequence[calibration.Path], exact: Tensor, replace: Replace) -> float:
    """Relative L2 distance of the velocities with replaced Linears from `exact`, those of the model as it is."""
    with replaced(pipeline.model, replace):
        found = velocities(pipeline, paths)
    return float((found - exact).norm() / exact.norm())


def int8(linear: nn.Linear) -> Int8Linear:
    """Weights and tokens rounded."""
    layer = Int8Linear.of(linear)
    layer.scaled = True  # which the CPU computes, too
    return layer


def fp8(linear: nn.Linear) -> Fp8Linear:
    """Weights and tokens rounded; the products are in fp32, where the units' results are in bf16."""
    layer = Fp8Linear.of(linear)
    layer.register_forward_pre_hook(_coarse)
    return layer


def _coarse(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
    codes, scale = quantize_rows(args[0])
    return codes.float() * scale


FORMATS: dict[str, Replace] = {
    "fp8": fp8,
    "fp8 weights": Fp8Linear.of,
    "int8": int8,
    "int8 weights": Int8Linear.of,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3, help="number of flux-mini's prompts to draw")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--tiny", action="store_true", help="one prompt, one step, 128x128")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="where int8 and fp8 are not the card's own")
    args = parser.parse_args()

    number, steps, size = (1, 1, 128) if args.tiny else (args.prompts, args.steps, 256)
    prompts = read_prompts(default_prompts("flux-mini"))[:number]
    how = {"num_steps": steps, "width": size, "height": size}
    pipeline = load_pipeline("flux-mini", args.device, "float32")
    requests = [pipeline.complete(GenerationRequest(prompt=p.prompt, seed=p.seed, **how)) for p in prompts]
    with torch.no_grad():
        paths = calibration.trajectories(pipeline, requests)
        exact = velocities(pipeline, paths)
    errors = {name: velocity_error(pipeline, paths, exact, replace) for name, replace in FORMATS.items()}
    ratios = {name: (error / errors["fp8"]) ** 2 for name, error in errors.items()}
    found = {"error": errors, "squared_to_fp8": ratios}
    rounded = {what: {name: round(x, 4) for name, x in table.items()} for what, table in found.items()}
    about = {"forwards": sum(len(path.latents) for path in paths), "steps": steps, "torch": torch.__version__}
    print(json.dumps({"benchmark": "velocity_error", **rounded, **about}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
