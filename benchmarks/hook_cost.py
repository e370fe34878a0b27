"""Cost of hooks in a full-size step: blocks without taps, blocks with taps, and with plans.

    python benchmarks/hook_cost.py [--compile] [--rounds 20]

12 billion random weights in bf16, a picture of 1024x1024 (4096 image and 512 text tokens), two rows for `share_kv`.
*bare* is the same model with every tap removed from the source of its blocks. All variants take turns in every round,
so that clocks and heat are the same for all; the ratio is the median over the rounds of a variant's time to that of
its reference in the round. Prints a line of JSON: seconds, `ratio` of `plain` and `empty` to bare (goal within 0.5 %),
of `share_kv` on every layer to the same two rows without (goal under 3 %), and the number of compiled graphs. `--tiny`
runs small on any machine.
"""

import argparse
import ast
import functools
import inspect
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from parity_diffusers import in_dtype_of, random_flux, random_inputs, tiny

from flux_core.hooks import HookRun, ShareKV, Skip
from flux_core.model import Flux, blocks
from flux_core.variants import VARIANTS

BRANCHES = ("source", "edit")


class WithoutTaps(ast.NodeTransformer):
    """Replaces every call of a tap in a syntax tree by its argument."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        f = node.func
        if isinstance(f, ast.Name) and f.id == "tap":
            return node.args[1]
        if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id == "tap":
            return ast.Call(node.args[0], node.args[1:], []) if f.attr == "attend" else node.args[1]
        return node


@functools.cache
def bare_blocks() -> types.ModuleType:
    """The module `flux_core.model.blocks` without taps."""
    tree = ast.fix_missing_locations(WithoutTaps().visit(ast.parse(inspect.getsource(blocks))))
    text = ast.unparse(tree)
    if "tap(" in text or "tap." in text:
        raise RuntimeError("a tap is left in the blocks")
    bare = types.ModuleType("flux_core.model.bare_blocks")
    sys.modules[bare.__name__] = bare  # dynamo looks it up there
    bare.__package__ = "flux_core.model"
    exec(compile(tree, "bare_blocks", "exec"), vars(bare))
    return bare


def without_taps(model: Flux) -> Flux:
    """A model of bare blocks on the same weights."""
    bare = bare_blocks()
    with torch.device("meta"):
        other = Flux(model.params)
    other.load_state_dict(model.state_dict(), assign=True)
    for block in (*other.double_blocks, *other.single_blocks):
        block.__class__ = getattr(bare, type(block).__name__)
    return other.eval().requires_grad_(False)


def variants(model: Flux, one: dict[str, Any], two: dict[str, Any]) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name -> (the reference variant, a forward)."""
    params, bare = model.params, without_taps(model)

    def planned(inputs: dict[str, Any], *plan: Any) -> Callable[[], Any]:
        run = HookRun(plan, params, branches=BRANCHES)  # once for a picture, as in the pipeline
        return lambda: model(**inputs, run=run)

    return {
        "bare": ("bare", lambda: bare(**one)),
        "plain": ("bare", lambda: model(**one)),
        "empty": ("bare", planned(one)),
        "skip_one": ("bare", planned(one, Skip(blocks="single_blocks.1"))),
        "two_rows": ("two_rows", lambda: model(**two)),
        "share_kv_all": ("two_rows", planned(two, ShareKV(blocks="layer.*"))),
        "share_kv_four": ("two_rows", planned(two, ShareKV(blocks="layer.0-2,single_blocks.0"))),
    }


def _rotated(names: list[str], i: int) -> list[str]:
    i %= len(names)
    return names[i:] + names[:i]


def measure(model: Flux, one: dict[str, Any], two: dict[str, Any], rounds: int, compiling: bool) -> dict[str, Any]:
    calls = variants(model, one, two)
    device = model.img_in.weight.device
    torch._dynamo.utils.counters.clear()
    for _, call in calls.values():  # warm-up, with compilation
        call(), call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in _rotated(list(calls), i):  # else the first would always follow the hottest
            call = calls[name][1]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))
        for name, (against, _) in calls.items()
        if name != against
    }
    return {
        "ratio": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "seconds": {name: round(statistics.median(times), 5) for name, times in seconds.items()},
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiling else None,
        "rounds": rounds,
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few blocks of 64 features, 16 + 8 tokens")
    parser.add_argument("--compile", action="store_true", help="compile every block whole")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    params, side, text = VARIANTS["flux-dev"].params, 64, 512
    if args.tiny:
        params, side, text = tiny(params), 4, 8
    model = random_flux(params, args.device)
    if args.compile:
        for kind in (*vars(blocks).values(), *vars(bare_blocks()).values()):
            if inspect.isclass(kind) and kind.__name__.endswith("StreamBlock"):
                kind.forward = torch.compile(kind.forward, fullgraph=True)
    one = in_dtype_of(model, random_inputs(params, side, text, args.device))
    two = {name: torch.cat((x, x)) for name, x in one.items()}
    figures = measure(model, one, two, args.rounds, args.compile)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    line = {"benchmark": "hook_cost", "compiled": args.compile, **figures, "device": name, "torch": torch.__version__}
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
