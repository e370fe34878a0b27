"""Cost of LoRAs in a full-size step, of changing their scale, and of attaching them.

    python benchmarks/lora.py [--dtype bf16|fp8] [--replay] [--compile none|blocks] [--rounds 5] [--elsewhere]

Random weights of FLUX.1-dev and random LoRAs in kohya's layout on all 304 Linears of the blocks, batch 1, the
modulation from a table, as the pipeline has it. A second model on the same weights takes the LoRAs, and the steps of
both take turns (`timing.py`). Prints a line of JSON:

ratio      of a step with a LoRA of rank 16, one of rank 128, and three of rank 16, to the step without; in bf16 also
           of one in the weights, `merged`. Goals: bf16 1.04, 1.10, 1.08 and 1.00, fp8 1.06, 1.15 and 1.12
ms         of those steps, and of the step without beside each
error      of a forward with the LoRA of rank 16: relative difference of the change that it makes, to the same in the
           plain way without kernels
scale      what a new scale costs: graphs compiled, and whether a step that was recorded before sees it
table_ms   the modulation of 28 steps, without a LoRA and with one of rank 16 on the projections
attach_s   seconds from the file of rank 128 (1.2 GB) to an attached LoRA on the device, the fastest of three, its GB,
           and seconds to take it off
peak_gib   of memory in a step without a LoRA, and with each, of the only model

`--replay` takes the steps of both from CUDA graphs, as the pipeline takes those in fp8 with LoRAs. `--elsewhere` also
measures diffusers and PEFT, if they are installed: the step with the LoRA of rank 16 to the step without, and the
seconds to load the file of rank 128. `--tiny` runs small on any machine.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from latency import MODELS, SIGMAS, compile_blocks
from parity_diffusers import build_theirs, call_theirs, distance, in_dtype_of, random_inputs, tiny
from safetensors.torch import save_file
from timing import Call, ratio, turns, watched
from torch import Tensor, nn

from flux_core import lora
from flux_core.kernels import install, put
from flux_core.linears.branch import THIN
from flux_core.model import Flux, ModulationTable, ops
from flux_core.sampling.graph import Graph
from flux_core.variants import VARIANTS

CASES = {"rank 16": [16], "rank 128": [128], "three of rank 16": [16, 16, 16]}
UP = 0.02
"""of random factors `up`: the size of a branch's output is a few percent of the layer's"""


def write_lora(model: Flux, path: Path, rank: int, seed: int) -> Path:
    """A LoRA with random factors on every Linear of the blocks."""
    device = model.img_in.weight.device
    draw = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if name.startswith(("double_blocks.", "single_blocks.")) and hasattr(layer, "in_features"):
            stem = f"lora_unet_{name.replace('.', '_')}"
            for key, shape, size in (
                ("lora_down", (rank, layer.in_features), layer.in_features**-0.5),
                ("lora_up", (layer.out_features, rank), UP),
            ):
                x = torch.randn(shape, generator=draw, device=device, dtype=torch.float32)
                tensors[f"{stem}.{key}.weight"] = (size * x).bfloat16().cpu()
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return path


def twin(model: Flux, device: str, own: bool = False) -> Flux:
    """A second model on the same weights, or on copies of its own, with kernels."""
    with torch.device("meta"):
        other = Flux(model.params).to(torch.bfloat16)
    for name, layer in model.named_modules():  # of Linears in other formats new ones, with the same tensors
        if hasattr(layer, "in_features") and type(layer) is not nn.Linear:
            copy = layer.__class__.__new__(layer.__class__)
            copy.__dict__.update(layer.__dict__)
            copy._parameters, copy._buffers = dict(layer._parameters), dict(layer._buffers)
            other.set_submodule(name, copy)
    state = {name: x.clone() if own else x for name, x in model.state_dict().items()}
    other.load_state_dict(state, assign=True)
    other.eval().requires_grad_(False)
    install(other, device)
    return other


class Bench:
    """A model without LoRAs, its inputs, and the files."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.device = args, args.device
        self.params = tiny(VARIANTS["flux-dev"].params) if args.tiny else VARIANTS["flux-dev"].params
        side, text = (4, 8) if args.tiny else (args.size // 16, 512)
        self.model = MODELS[args.dtype](self.params, self.device)
        install(self.model, self.device)
        self.inputs = in_dtype_of(self.model, random_inputs(self.params, side, text, self.device))
        small, large = (2, 4) if args.tiny else (16, 128)
        self.files = {
            16: [write_lora(self.model, folder / f"{i}.safetensors", small, i) for i in range(3)],
            128: [write_lora(self.model, folder / "large.safetensors", large, 3)],
        }
        self.seconds = 0.05 if args.tiny else 1.0

    def table(self, model: Flux) -> ModulationTable:
        return ModulationTable(model, SIGMAS, self.inputs["y"], self.inputs["guidance"])

    def step(self, model: Flux) -> Call:
        """A forward, compiled if asked for, that has run once."""
        mods = self.table(model).at(SIGMAS[0])
        if self.args.compile == "blocks":
            compile_blocks(model)
        call = partial(model, **self.inputs, mods=mods)
        call()
        if not self.args.replay:
            return call
        img = self.inputs["img"]
        graph = Graph(lambda x, _, mods: model(**self.inputs | {"img": x}, mods=mods), img, SIGMAS[0], mods)
        return partial(graph.replay, img)

    @contextmanager
    def attached(self, ranks: list[int], kernels: bool = True, merge: bool = False) -> Iterator[Flux]:
        """A second model with the LoRAs of these ranks, while it is used; without kernels by plain functions."""
        model = twin(self.model, self.device, own=merge)
        thin = THIN.copy()
        if not kernels:
            put(model, ops.PLAIN)
            THIN.clear()
        self.attach(model, ranks, merge)
        yield model
        THIN.update(thin)
        detach(model)
        del model
        self.release()

    def attach(self, model: Flux, ranks: list[int], merge: bool = False) -> None:
        for i, rank in enumerate(ranks):
            lora.attach(model, self.files[rank][i], merge=merge)

    def release(self) -> None:
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        began = time.perf_counter()
        found = call()
        self.wait()
        return time.perf_counter() - began, found

    def compare(self, calls: dict[str, Call]) -> tuple[dict[str, float], float]:
        """Milliseconds, and the ratio of the second call to the first."""
        times = turns(calls, self.args.rounds, self.seconds, self.device)
        first, second = calls
        return {name: round(statistics.median(x), 3) for name, x in times.items()}, round(
            ratio(times, second, first), 4
        )


def detach(model: Flux) -> None:
    for handle in lora.attached(model):
        handle.remove()


def steps(bench: Bench) -> dict[str, Any]:
    """Times of steps with LoRAs, beside those without."""
    plain, ms, ratios = bench.step(bench.model), {}, {}
    cases = {name: (CASES[name], False) for name in bench.args.cases}
    cases |= {"merged": ([16], True)} if bench.args.dtype == "bf16" else {}  # fp8 is not merged into
    for name, (ranks, merge) in cases.items():
        with bench.attached(ranks, merge=merge) as model:
            ms[name], ratios[name] = bench.compare({"none": plain, name: bench.step(model)})
            del model
    return {"ratio": ratios, "ms": ms}


def error(bench: Bench) -> dict[str, float]:
    """How far the change that a LoRA makes is from that of the plain functions."""
    with torch.compiler.set_stance("force_eager"):
        found = []
        for kernels in (True, False):
            with bench.attached([16], kernels) as model:
                found.append(model(**bench.inputs).float())
                detach(model)
                found.append(model(**bench.inputs).float())
                del model
    fused, fused_base, plain, plain_base = found
    return {
        "of_output": distance(fused, plain),
        "of_output_without": distance(fused_base, plain_base),
        "of_change": distance(fused - fused_base, plain - plain_base),
        "change": distance(plain, plain_base),
    }


def rescaling(bench: Bench) -> dict[str, Any]:
    """Graphs compiled by a new scale, and whether a recorded step sees it."""
    stats = torch._dynamo.utils.counters["stats"]
    with bench.attached([16]) as model:
        call, handle = bench.step(model), lora.attached(model)[0]
        before, seen = stats["unique_graphs"], [call().clone()]
        seconds, _ = bench.timed(partial(setattr, handle, "scale", 0.5))
        seen.append(call().clone())
        compiled = stats["unique_graphs"] - before
        found = {"graphs_compiled": compiled, "change": distance(seen[1], seen[0]), "ms": round(1000 * seconds, 3)}
        if bench.device.startswith("cuda"):
            found["replayed_from_called"] = replayed(bench, model, handle, call)
        del call, handle, model
    return found


def replayed(bench: Bench, model: Flux, handle: Any, call: Call) -> float:
    """How far a step that was recorded at another scale is from one that is called."""
    img, mods = bench.inputs["img"], bench.table(model).at(SIGMAS[0])
    graph = Graph(lambda x, _, mods: model(**bench.inputs | {"img": x}, mods=mods), img, SIGMAS[0], mods)
    handle.scale = 1.0
    return distance(graph.replay(img), call.func(**call.keywords | {"mods": mods}))  # type: ignore[attr-defined]


def peaks(bench: Bench) -> dict[str, dict[str, float]]:
    """GiB that a step takes, allocated and reserved, with LoRAs on the only model."""
    found: dict[str, dict[str, float]] = {}
    for name, ranks in {"none": [], **{name: CASES[name] for name in bench.args.cases}}.items():
        bench.attach(bench.model, ranks)
        call = bench.step(bench.model)
        bench.release()
        if bench.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            call()
            sizes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            found[name] = dict(zip(("allocated", "reserved"), (round(x / 2**30, 2) for x in sizes), strict=True))
        detach(bench.model)
        bench.release()
    return found


def tables(bench: Bench) -> dict[str, float]:
    with bench.attached([16]) as model:
        ms, _ = bench.compare({"none": partial(bench.table, bench.model), "rank 16": partial(bench.table, model)})
        del model
    return ms


def attaching(bench: Bench) -> dict[str, Any]:
    """Seconds to attach the large file and to take it off."""
    (path,), on, off = bench.files[128], [], []
    for _ in range(3):
        model = twin(bench.model, bench.device)
        seconds, handle = bench.timed(partial(lora.attach, model, path))
        on.append(seconds)
        off.append(bench.timed(handle.remove)[0])
        same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(
            model.state_dict().values(), bench.model.state_dict().values(), strict=True
        ))  # fmt: skip
        del model, handle
        bench.release()
    gb = path.stat().st_size / 1e9
    return {"attach": round(min(on), 3), "remove": round(min(off), 3), "same_bits": same, "gb": round(gb, 3)}


def elsewhere(bench: Bench) -> dict[str, Any] | str:
    """The same with diffusers and PEFT."""
    if not (find_spec("diffusers") and find_spec("peft")) or bench.args.dtype != "bf16":
        return "diffusers and PEFT: not installed, or not for this dtype"
    from diffusers.loaders import FluxLoraLoaderMixin

    def load(model: Any, path: Path) -> Any:
        state = FluxLoraLoaderMixin.lora_state_dict(str(path.parent), weight_name=path.name)
        model.load_lora_adapter(state, prefix="transformer")
        return model

    plain, other, large = (build_theirs(bench.model) for _ in range(3))
    seconds, _ = bench.timed(partial(load, large, bench.files[128][0]))
    del large
    load(other, bench.files[16][0])
    if bench.args.compile == "blocks":
        for model in (plain, other):
            model.compile_repeated_blocks(fullgraph=True)
    ms, found = bench.compare(
        {name: partial(call_theirs, x, bench.inputs) for name, x in (("none", plain), ("rank 16", other))}
    )
    return {"ratio": found, "ms": ms, "load_s": round(seconds, 3)}


PARTS: dict[str, Callable[[Bench], Any]] = {
    "steps": steps, "error": error, "scale": rescaling, "table_ms": tables, "attach_s": attaching,
    "peak_gib": peaks,
}  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(MODELS), default="bf16")
    parser.add_argument("--compile", choices=["none", "blocks"], default="none")
    parser.add_argument("--replay", action="store_true", help="steps from CUDA graphs, as the pipeline's in fp8")
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of a second")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--elsewhere", action="store_true", help="measure diffusers and PEFT, too")
    parser.add_argument("--tiny", action="store_true", help="a few blocks of 64 features, 16 + 8 tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, watched(args.device) as card:
        bench = Bench(args, Path(folder))
        figures: dict[str, Any] = {}
        for part in args.parts:
            print(part, file=sys.stderr, flush=True)
            found = PARTS[part](bench)
            figures |= found if part == "steps" else {part: found}
        if args.elsewhere:
            figures["elsewhere"] = elsewhere(bench)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about = {"benchmark": "lora", "dtype": args.dtype, "compile": args.compile, "replay": args.replay}
    last = {**card, "device": device, "torch": torch.__version__}
    print(json.dumps({**about, **figures, **last}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
