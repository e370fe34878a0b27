"""A type of GGUF for each block of flux-mini beside one type for all, at the same bytes.

    python benchmarks/mixed_quality.py [--prompts 4] [--judged 3] [--steps 28]

Blocks are measured on the first prompts of `flux_core/prompts/calibration.txt`, as `save --dtype mixed` does. For the
size of each type, and for sizes between, types are chosen, and the velocity's relative L2 error is measured at latents
of other prompts: the first of `flux-mini.json`. Prints a line of JSON for each size: bytes of the file, squared errors
(of one type, where there is one of that size; of the mixture; as the sum over blocks said), how many blocks have which
type, and the same for a mixture in which errors are weighted by `--importance`. In fp32 on the CPU. `--tiny`: one step.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.methods import calibration, mixing
from flux_core.methods.importance import PROMPTS, default_prompts, read_prompts
from flux_core.pipeline import Pipeline
from flux_core.request.generation import GenerationRequest
from flux_core.request.prompt_lines import read_lines


def squared_error(pipeline: Pipeline, paths: list[calibration.Path], exact: Tensor, kinds: Mapping[str, str]) -> float:
    """Of the velocities with blocks in these types, relative to `exact`."""
    with mixing.in_types(pipeline.model, kinds):
        found = calibration.velocities(pipeline, paths)
    return float(((found - exact).norm() / exact.norm()) ** 2)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="by which types are chosen")
    parser.add_argument("--judged", type=int, default=3, help="by which they are judged")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--importance", type=Path, help="importance.json of a study of flux-mini")
    parser.add_argument("--tiny", action="store_true", help="one prompt, one step, 64x64")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="where sums of errors are in fp32")
    args = parser.parse_args()
    side, steps = (64, 1) if args.tiny else (256, args.steps)
    how = {"width": side, "height": side, "num_steps": steps, "force": True}
    pipeline = load_pipeline("flux-mini", args.device, "float32")
    lines = read_lines(str(PROMPTS / "calibration.txt"))[: 1 if args.tiny else args.prompts]
    by = [line.request({"name": "flux-mini", "seed": i}).model_copy(update=how) for i, line in enumerate(lines)]
    judged = read_prompts(default_prompts("flux-mini"))[: 1 if args.tiny else args.judged]
    assert not {one.prompt for one in by} & {one.prompt for one in judged}

    errors, (sizes, rest) = (
        mixing.measured(pipeline, [pipeline.complete(one) for one in by]),
        mixing.sizes_of(pipeline.model.params),
    )
    tables = {"mixed": errors}
    if args.importance:
        importance = mixing.read_importance(args.importance, "flux-mini", pipeline.model.params)
        tables["weighted"] = mixing.weighted(errors, importance)
    paths = calibration.trajectories(
        pipeline, [pipeline.complete(GenerationRequest(prompt=x.prompt, seed=x.seed, **how)) for x in judged]
    )
    exact = calibration.velocities(pipeline, paths)
    whole = {kind: rest + sum(int(of[kind]) for of in sizes.values()) for kind in mixing.KINDS[:-1]}
    between = [sum(pair) // 2 for pair in pairwise(whole.values())]
    for budget in sorted([*whole.values(), *between]):
        line = {"benchmark": "mixed_quality", "bytes": budget}
        for kind in (kind for kind, size in whole.items() if size == budget):
            line |= {"type": kind, "one": squared_error(pipeline, paths, exact, dict.fromkeys(sizes, kind))}
        for name, table in tables.items():
            mix = mixing.choose(table, sizes, rest, budget)
            line |= {name: squared_error(pipeline, paths, exact, mix.kinds), f"{name} bytes": mix.bytes}
            line |= {f"{name} types": dict(Counter(mix.kinds.values())), f"{name} sum": mix.error}
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
