"""Time of FLUX.1 on this device, part by part, relative to the floor of a step and to diffusers.

    python benchmarks/latency.py [--name flux-dev] [--dtype bf16] [--compile blocks|none] [--size 1024] [--rounds 5]

Random weights of the full sizes, made on the device; batch 1. It prints for each dtype:

first call   seconds of the first compiled forward and the first compiled decoding, after eager calls, in a new process
             with an empty cache (cold), and in another with the first one's cache (warm). One block of each kind is
             enough, since all of a kind share their graphs. And of the first eager forward, which compiles Triton's
             kernels, those that an earlier dtype has not
modulation   all values computed from `vec`, for a schedule of 28 steps in advance, and for a single step
step         one forward with its modulation from that table, eager, replayed from a CUDA graph where the pipeline does
             so (small pictures), and with compiled blocks. The floor takes turns with them (`timing.py`), and so does
             diffusers' model if it is installed, on the same weights and compiled the same way
text         T5 and CLIP, eager, if transformers is installed
decode       the autoencoder from latents to pixels, eager as in the pipeline, and with plain functions, eager and
             compiled
image        text to pixels on the CPU, by runs of the sampler with blocks compiled before, the faster of two: 28 and
             50 steps, 4 for schnell, or those of `--steps` (no number: none). Its ratio is to that many floors
memory       peak GiB of a forward with only the model on the device, of a forward without the projections from which
             the table is computed, and of an image with all parts on the device

`ratio` is to the floor of the same run: that of fp8 for fp8, of bf16 for every other dtype. A dtype is bf16 or one of
`in_format.py`, int8, nf4, q8_0, and so on. Lines of JSON on stdout as figures come, a table on stderr at the end.
`--tiny` runs small on any machine.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from floor import PRODUCTS, FloorStep
from in_format import NAMES, quantize
from parity_diffusers import build_theirs, call_theirs, in_dtype_of, random_flux, random_inputs
from random_parts import random_autoencoder, random_encoders, tiny_variant
from timing import Call, ratio, turns, watched
from torch import Tensor

from flux_core.kernels import install, install_decode
from flux_core.model import MODULATION, Flux, FluxParams, ModulationTable
from flux_core.sampling import euler, flow_velocity, get_noise, get_schedule, pack, unpack
from flux_core.sampling.graph import Graph, is_worth_it
from flux_core.variants import VARIANTS, Variant


def random_in(format: str, params: FluxParams, device: str) -> Flux:
    model = random_flux(params, device)
    quantize(model, format)
    return model


MODELS: dict[str, Callable[..., Flux]] = {"bf16": random_flux, **{name: partial(random_in, name) for name in NAMES}}
"""for each dtype: makes a model of random weights from sizes and device"""
CACHE = "TORCHINDUCTOR_CACHE_DIR"
SIGMAS = get_schedule(28, 4096)[:-1]
Encode = Callable[[], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor], Tensor]


@dataclass
class Bench:
    """Settings of a measurement, and its printed lines."""

    variant: Variant
    dtype: str
    size: int
    device: str
    compiling: bool
    rounds: int
    seconds: float
    """of a turn"""
    table: list[str] = field(default_factory=list)

    def say(self, part: str, what: str, **figures: Any) -> None:
        """Print a line of JSON, and add a line to the table."""
        figures = {key: round(x, 4) if isinstance(x, float) else x for key, x in figures.items()}
        about = {"benchmark": "latency", "name": self.variant.name, "dtype": self.dtype, "size": self.size}
        print(json.dumps({**about, "part": part, "what": what, **figures}), flush=True)
        shown = (f"{key} {x}" for key, x in figures.items() if x is not None)
        self.table.append(f"{self.dtype:<6}{part:<12}{what:<22}{'  '.join(shown)}")

    def time(self, part: str, calls: dict[str, Call], seconds: float, floor: str | None = None) -> dict[str, float]:
        """The settled milliseconds of calls that take turns of `seconds`; prints them."""
        with watched(self.device) as card:
            times = turns(calls, self.rounds, seconds, self.device)
        ms = {name: statistics.median(found) for name, found in times.items()}
        for name in calls:
            against = {"ratio": ratio(times, name, floor)} if floor else {}
            self.say(part, name, ms=ms[name], **against, **card)
        return ms

    def peak(self, what: str, call: Call) -> None:
        """Print the peak memory of a call: allocated by tensors, and reserved from the device."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.seconds_of(call)
            peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            self.say("memory", what, **{f"{kind}_gib": size / 2**30 for kind, size in peaks.items()})

    def seconds_of(self, call: Call) -> float:
        began = time.perf_counter()
        call()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def model(self, params: FluxParams) -> Flux:
        """A model of random weights, with the kernels that the pipeline installs on this device."""
        model = MODELS[self.dtype](params, self.device)
        install(model, self.device)
        return model

    def inputs(self, model: Flux) -> dict[str, Any]:
        params, side = self.variant.params, self.size // 16
        given = in_dtype_of(model, random_inputs(params, side, self.variant.max_text, self.device))
        return {**given, "guidance": given["guidance"] if params.guidance_embed else None}

    def noise(self) -> Tensor:
        return get_noise(1, self.size, self.size, self.device, torch.bfloat16, seed=0)


def compile_blocks(model: Flux) -> None:
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True)


def eager(call: Call) -> Call:
    """The same call without compilation."""
    return torch.compiler.set_stance("force_eager")(lambda: call())


def first_calls(bench: Bench, cache: str) -> None:
    for what in ("cold", "warm"):
        command = [sys.executable, *sys.argv, "--first-call", bench.dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {CACHE: cache})
        bench.say("first call", what, **json.loads(done.stdout.splitlines()[-1]))


def first_call(bench: Bench) -> dict[str, Any]:
    """In the new process: seconds of the first compiled calls, and the number of the blocks' graphs."""
    model = bench.model(replace(bench.variant.params, depth=1, depth_single_blocks=1))
    ae = random_autoencoder(bench.variant, bench.device)
    forward, decode = partial(model, **bench.inputs(model)), partial(torch.compile(ae.decode), bench.noise())
    eager(forward)(), eager(decode)()
    compile_blocks(model)
    step_s = bench.seconds_of(forward)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"step_s": step_s, "decode_s": bench.seconds_of(decode), "graphs": graphs}


def steps(bench: Bench, model: Flux) -> float:
    """Measure steps. Returns the milliseconds of the floor."""
    inputs, variant = bench.inputs(model), bench.variant
    table = modulation(bench, model, inputs)
    mods = table().at(SIGMAS[0])
    ours = partial(model, **inputs, mods=mods)
    calls = {"eager": eager(ours)}
    bench.say("first call", "eager", step_s=bench.seconds_of(calls["eager"]))
    if is_worth_it(model, inputs["img"].device, inputs["img"].shape[1] + variant.max_text, len(SIGMAS)):
        ours()
        graph = Graph(lambda x, _, mods: model(**inputs | {"img": x}, mods=mods), inputs["img"], SIGMAS[0], mods)
        calls["replayed"] = partial(graph.replay, inputs["img"])
    if bench.compiling:
        compile_blocks(model)
        calls["compiled"] = ours
    for name, call in calls.items():
        call()
        bench.peak(f"step, {name}", call)
    if find_spec("diffusers") and bench.dtype == "bf16":  # it has no fp8
        other = build_theirs(model)
        theirs = partial(call_theirs, other, inputs)
        calls["diffusers, eager"] = eager(theirs)
        if bench.compiling:
            other.compile_repeated_blocks(fullgraph=True)
            calls["diffusers, compiled"] = theirs
    else:
        bench.table.append(f"diffusers in {bench.dtype}: not available")
    for name, layer in model.named_modules():
        if name.endswith(MODULATION):
            layer.to("cpu")
    bench.peak("step, modulation left on the CPU", ours)
    model.to(bench.device)
    floor_dtype = bench.dtype if bench.dtype in PRODUCTS else "bf16"
    floor = FloorStep(floor_dtype, bench.device, variant.params, inputs["img"].shape[1], variant.max_text)
    return bench.time("step", {"floor": floor, **calls}, bench.seconds, "floor")["floor"]


def modulation(bench: Bench, model: Flux, inputs: dict[str, Any]) -> Callable[[], ModulationTable]:
    """Measure modulation. Returns the function that makes a schedule's table, as the sampler does first."""
    strengths = inputs["guidance"] if inputs["guidance"] is not None else torch.ones_like(inputs["timesteps"])
    table = partial(ModulationTable, model, SIGMAS, inputs["y"], strengths)
    given = [inputs[name] for name in ("timesteps", "y", "guidance")]
    alone = lambda: model.modulations(model.embed_vec(*given))  # noqa: E731
    bench.time("modulation", {f"table of {len(SIGMAS)} steps": table, "of one step": alone}, bench.seconds / 3)
    return table


def text(bench: Bench) -> Encode:
    """Measure text encoders. Returns the function that encodes a prompt, or gives random embeddings."""
    if not find_spec("transformers"):
        bench.table.append("transformers: not available; images are measured without text encoding")
        given = random_inputs(bench.variant.params, 1, bench.variant.max_text, bench.device)
        return lambda: (given["txt"], given["y"])
    t5, clip = random_encoders(bench.variant, bench.device)
    bench.time("text", {"T5": t5, "CLIP": clip}, bench.seconds / 3)
    return lambda: (t5(), clip())


def decoding(bench: Bench) -> Decode:
    """Measure decoding. Returns the function that decodes an image."""
    ae, plain = (random_autoencoder(bench.variant, bench.device) for _ in range(2))
    install_decode(ae, bench.device)
    decodes = {"eager": ae.decode, "plain": plain.decode}
    if bench.compiling:
        decodes["plain, compiled"] = torch.compile(plain.decode)
    bench.time("decode", {name: partial(decode, bench.noise()) for name, decode in decodes.items()}, bench.seconds / 3)
    return ae.decode


def image(bench: Bench, model: Flux, encode: Encode, decode: Decode, number: int) -> Tensor:
    """Pixels on the CPU of an image by random weights. number: of steps."""
    variant, given = bench.variant, bench.inputs(model)
    txt, vec = encode()
    x = pack(bench.noise())
    sigmas = get_schedule(number, x.shape[1], shift=variant.shift)
    conditions = given["img_ids"], txt, given["txt_ids"], vec
    x = euler(flow_velocity(model, *conditions, variant.guidance, sigmas=sigmas[:-1], replay=True), x, sigmas)
    return decode(unpack(x, bench.size, bench.size)).cpu()


def measure(bench: Bench, numbers: list[int]) -> None:
    torch._dynamo.reset()
    model = bench.model(bench.variant.params)
    floor_ms = steps(bench, model)
    draw = partial(image, bench, model, text(bench), decoding(bench))
    bench.peak("image", partial(draw, 1))
    for number in numbers:
        seconds = min(bench.seconds_of(partial(draw, number)) for _ in range(2))
        bench.say("image", f"{number} steps", s=seconds, ratio=1000 * seconds / (number * floor_ms))


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=[v.name for v in VARIANTS.values() if not v.embedded], default="flux-dev")
    parser.add_argument("--dtype", default="bf16", help=f"some of {','.join(MODELS)}, separated by commas")
    parser.add_argument("--compile", choices=["blocks", "none"], default="blocks")
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels, a multiple of 16")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of a second")
    parser.add_argument("--steps", type=int, nargs="*", help="numbers of steps of whole images")
    parser.add_argument("--tiny", action="store_true", help="a few blocks of 64 features, 64x64 pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--first-call", metavar="DTYPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtypes = args.first_call.split() if args.first_call else args.dtype.split(",")
    if unknown := set(dtypes) - set(MODELS):
        parser.error(f"--dtype: unknown {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")

    variant, size, seconds, compiling = VARIANTS[args.name], args.size, 1.0, args.compile == "blocks"
    if args.tiny:
        variant, size, seconds = tiny_variant(variant), 64, 0.05
    benches = [Bench(variant, dtype, size, args.device, compiling, args.rounds, seconds) for dtype in dtypes]
    if args.first_call:
        print(json.dumps(first_call(benches[0])))
        return 0
    usual = [28, 50] if variant.params.guidance_embed else [4]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for bench in benches if compiling else ():  # before this process fills a cache
            first_calls(bench, f"{cache}/{bench.dtype}")
        for bench in benches:
            os.environ[CACHE] = f"{cache}/{bench.dtype}"
            measure(bench, usual if args.steps is None else args.steps)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(f"{variant.name}, {size}x{size}, {device}, torch {torch.__version__}", file=sys.stderr)
    print(*(line for bench in benches for line in bench.table), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
