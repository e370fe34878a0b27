"""Attention in eight bits: its error on flux-mini, and its time at full size on a card.

    python benchmarks/attention.py --errors [--prompts 3] [--steps 28]

repeats forwards at latents of drawn pictures, as `velocity_error.py` does, with attention alone in eight bits, by the
plain functions; with q and k alone, rotated and centred or not; and models in fp8 and int8 with each. Prints a line of
JSON for each: the velocity's relative L2 error to exact attention in fp32, and for a model in few bits its ratio to the
same with exact attention.

    python benchmarks/attention.py [--parts kernels tiles steps] [--rounds 3]

needs a card of compute capability 8.9 on, with 40 GB for `steps`. Everything is replayed from CUDA graphs, in turns
(`timing.py`). What fails is a line with its error, and the rest goes on.

kernels   at [1, 24, 4608, 128]: each exact backend; for each form the whole way, and the kernels that it is made of;
          and that which norms q and k before it. Milliseconds, TFLOP/s, and the error to attention in fp32
tiles     int8's attention alone by other tiles, in bursts: milliseconds and error of each, the quickest last
steps     a step of flux-dev with random weights in fp8 and in int8 with each way, in turns with the floors of
          `floor.py`; `ratio` is to that of fp8, which has exact attention

`--tiny` runs small on any machine, without what needs a card.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from timing import Call, burst, ratio, turns, watched
from torch import Tensor

from flux_core.kernels import attention, eight_bits, fused_ops, put
from flux_core.kernels.eight_bits import FORMS, to_e4m3
from flux_core.linears.int8 import rotate
from flux_core.model import ops
from flux_core.model.blocks import split_heads
from flux_core.model.rope import embed_nd
from flux_core.variants import VARIANTS

HEADS, TOKENS, FEATURES = 24, 4608, 128
TFLOP = 4e-12 * HEADS * TOKENS**2 * FEATURES
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def say(part: str, what: str, **figures: Any) -> None:
    figures = {key: round(x, 5) if isinstance(x, float) else x for key, x in figures.items()}
    print(json.dumps({"benchmark": "attention", "part": part, "what": what, **figures}), flush=True)


def tried(part: str, what: str, call: Callable[[], Any]) -> Any:
    """What the call returns; None with a line if it fails."""
    try:
        return call()
    except Exception as error:  # a compiler's, a driver's, a library's: the other ways are measured all the same
        text = " ".join(str(error).split())
        say(part, what, error=f"{type(error).__name__}: {text[:300]}")
        return None


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# Errors on flux-mini ----------------------------------------------------------------------------------


def rounded_products(int8: bool, rotated: bool, centred: bool) -> Attend:
    """Attention with q and k alone in eight bits, each token by a scale of its own."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k - k.mean(2, keepdim=True) if centred else k
        found = []
        for x in (q, k):
            x = rotate(x, eight_bits.GROUP if rotated else 0)
            scale = x.abs().amax(-1, keepdim=True) / 127
            found.append((x / scale).round() * scale if int8 else to_e4m3(x).float())
        return ops.attend(found[0], found[1], v)

    return attend


PLAIN: dict[str, Attend] = {form: partial(eight_bits.attend, form=form) for form in FORMS}
PARTS: dict[str, Attend] = {
    **{
        f"q and k in {'int8' if int8 else 'e4m3'}"
        f"{', rotated' if rotated else ''}{', centred' if centred else ''}": rounded_products(int8, rotated, centred)
        for int8, rotated, centred in product((True, False), (False, True), (False, True))
    },
}


@torch.no_grad()
def errors(prompts: int, steps: int, size: int) -> None:
    from velocity_error import FORMATS, replaced

    from flux_core import load_pipeline
    from flux_core.methods import calibration
    from flux_core.methods.importance import default_prompts, read_prompts
    from flux_core.request.generation import GenerationRequest

    pipeline = load_pipeline("flux-mini", "cpu", "float32")
    model = pipeline.model
    how = {"num_steps": steps, "width": size, "height": size}
    chosen = read_prompts(default_prompts("flux-mini"))[:prompts]
    requests = [pipeline.complete(GenerationRequest(prompt=one.prompt, seed=one.seed, **how)) for one in chosen]
    paths = calibration.trajectories(pipeline, requests)
    truth = calibration.velocities(pipeline, paths)

    def error(attend: Attend) -> float:
        put(model, ops.PLAIN._replace(attend=attend))
        return distance(calibration.velocities(pipeline, paths), truth)

    about = {"forwards": sum(len(path.latents) for path in paths), "steps": steps}
    for name, attend in {**PLAIN, **PARTS}.items():
        say("errors", name, model="fp32", error_of_velocity=error(attend), **about)
    for format in ("fp8", "int8"):
        with replaced(model, FORMATS[format]):
            base = error(ops.attend)
            say("errors", "exact", model=format, error_of_velocity=base, **about)
            for name, attend in PLAIN.items():
                found = error(attend)
                say("errors", name, model=format, error_of_velocity=found, ratio=found / base, **about)


# Times on a card --------------------------------------------------------------------------------------


def graphed(call: Call) -> Call:
    """The call, replayed from a CUDA graph."""
    call()  # compiles, and lets libraries choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(call: Call = call) -> None:  # it holds the call, whose tensors the graph reads
        graph.replay()

    return replay


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as `norm_rope` leaves them: keys partly alike, some features larger; tokens outside heads."""
    draw = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float32, "generator": draw}
    q, k, v = (torch.randn(1, TOKENS, HEADS, FEATURES, **options) for _ in range(3))
    large = 1 + 2 * torch.rand(2, HEADS, FEATURES, **options)
    k = k + torch.randn(HEADS, FEATURES, **options)
    q, k, v = q * large[0] / 2, k * large[1] / 2, v + torch.randn(HEADS, FEATURES, **options) / 2
    return tuple(x.bfloat16().transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]


def exact_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in fp32, some heads at a time."""
    parts = zip(*(x.float().split(4, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([ops.attend(*part) for part in parts], dim=2)


def ways(own: ops.Ops) -> dict[str, ops.Ops]:
    """These functions with attention in each form that works here."""
    found = {name: tried("ways", name, partial(attention.in_eight_bits, own, name)) for name in attention.EIGHT}
    return {name: way for name, way in found.items() if way is not None}


def heads() -> tuple[Any, ...]:
    """Arguments of `ops.norm_rope_join`: slices of two products, 512 tokens of text before 4096."""
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    streams = [split_heads(draw(1, tokens, 3 * HEADS * FEATURES), HEADS) for tokens in (512, TOKENS - 512)]
    scales = [(draw(FEATURES).abs() + 0.5, draw(FEATURES).abs() + 0.5) for _ in range(2)]
    ids, params = torch.rand(1, TOKENS, 3, device="cuda", dtype=torch.float32) * 64, VARIANTS["flux-dev"].params
    return *streams, *scales, embed_nd(ids, params.axes_dim, params.theta)


def kernels(rounds: int) -> None:
    from flux_core.kernels import codes, cudnn_fp8, flash

    q, k, v = drawn()
    truth = exact_of(q, k, v)
    calls: dict[str, Call] = {}

    def add(name: str, call: Call, attend: Call | None = None) -> None:
        """attend: the call whose result is attention, if any."""

        def ready() -> None:
            if attend is not None:
                say("kernels", name, error_of_output=distance(attend(), truth))
            calls[name] = graphed(call)

        tried("kernels", name, ready)

    for name, backend in attention.BACKENDS.items():
        call = partial(backend, q, k, v)
        add(name, call, call)
    own = fused_ops("cuda")._replace(attend=attention.BACKENDS["cudnn"])
    for name, way in ways(own).items():
        call = partial(way.attend, q, k, v)
        add(name, call, call)
        plain = tried("kernels", name, partial(eight_bits.attend, q, k, v, name))
        if plain is not None:
            say("kernels", f"{name}, plain functions", error_of_output=distance(plain, truth))
        add(f"{name}: codes", partial(codes.quantize, q, k, v, name))
        add(f"{name}: statistics alone", partial(codes.statistics, k, v, name))
        eight = codes.quantize(q, k, v, name)
        if name == "int8":
            add(f"{name}: attention", partial(flash.attend_codes, eight, TOKENS, q.dtype))
        else:
            add(f"{name}: attention", partial(cudnn_fp8.attend_codes, eight, TOKENS))
            found = tried("kernels", name, partial(cudnn_fp8.attend_codes, eight, TOKENS))
            add(f"{name}: result", partial(codes.widened, found, eight.v_scale, q.dtype))
    add("norm_rope_join", partial(own.norm_rope_join, *heads()))
    with watched("cuda") as card:
        times = turns(calls, rounds, 0.4, "cuda")
    for name, found in times.items():
        ms = statistics.median(found)
        attends = name in (*attention.BACKENDS, *FORMS) or name.endswith("attention")
        rate = {"tflop_per_s": 1000 * TFLOP / ms} if attends else {}
        to = ratio(times, name, "cudnn") if "cudnn" in times else None
        say("kernels", name, ms=ms, **rate, to_cudnn_bf16=to, **card)


def tiles() -> None:
    from flux_core.kernels import codes, flash

    q, k, v = drawn()
    truth, eight = exact_of(q, k, v), codes.quantize(q, k, v, "int8")
    found = []
    for size, registers in product([(64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4), (64, 32, 4, 4)], (None, 168, 128)):
        tile = flash.Tiles(*size, registers)

        def measure(tile: Any = tile) -> None:
            call = partial(flash.attend_codes, eight, TOKENS, q.dtype, tile)
            off, ms = distance(call(), truth), statistics.median(burst(graphed(call), 60, "cuda"))
            say("tiles", "int8", tiles=tile._asdict(), ms=ms, tflop_per_s=1000 * TFLOP / ms, error_of_output=off)
            found.append((ms, tile))

        tried("tiles", str(tile), measure)
    say("tiles", "quickest", tiles=[str(tile) for _, tile in sorted(found)[:3]])


@torch.no_grad()
def steps(dtype: str, rounds: int) -> None:
    """A step in that format with each way, beside the floors."""
    from floor import FloorStep
    from latency import SIGMAS, random_in
    from parity_diffusers import in_dtype_of, random_inputs

    from flux_core.kernels import install
    from flux_core.model import ModulationTable

    variant = VARIANTS["flux-dev"]
    model = random_in(dtype, variant.params, "cuda")
    own = install(model, "cuda")
    inputs = in_dtype_of(model, random_inputs(variant.params, 64, variant.max_text, "cuda"))
    mods = ModulationTable(model, SIGMAS, inputs["y"], inputs["guidance"]).at(SIGMAS[0])
    calls: dict[str, Call] = {}
    base = None
    for name, way in {"exact": own, **ways(own)}.items():

        def call(way: ops.Ops = way) -> Tensor:
            put(model, way)
            return model(**inputs, mods=mods)

        velocity = tried(f"step, {dtype}", name, call)
        if velocity is not None:
            base = velocity if base is None else base
            say(f"step, {dtype}", name, distance_to_exact_attention=distance(velocity, base))
            calls[name] = graphed(call)
    for floor in ("fp8", "bf16"):
        calls[f"floor of {floor}"] = FloorStep(floor, "cuda", variant.params, 4096, variant.max_text)
    with watched("cuda") as card:
        times = turns(calls, rounds, 1.0, "cuda")
    for name, found in times.items():
        ratios = {"ratio": ratio(times, name, "floor of fp8"), "to_exact": ratio(times, name, "exact")}
        say(f"step, {dtype}", name, ms=statistics.median(found), **ratios, **card)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="errors on flux-mini, on the CPU")
    parser.add_argument("--prompts", type=int, default=3, help="number of flux-mini's prompts to draw")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--parts", nargs="*", default=["kernels", "tiles", "steps"], help="what to time")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--tiny", action="store_true", help="one prompt, one step, 128x128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.errors or args.tiny or args.device == "cpu":
        errors(*(1, 1, 128) if args.tiny else (args.prompts, args.steps, 256))
        return 0
    say("about", torch.cuda.get_device_name(), torch=torch.__version__, cudnn=torch.backends.cudnn.version())
    if "tiles" in args.parts:
        tried("tiles", "all", tiles)
    if "kernels" in args.parts:
        tried("kernels", "all", partial(kernels, args.rounds))
    for dtype in ("fp8", "int8") if "steps" in args.parts else ():
        tried(f"step, {dtype}", "all", partial(steps, dtype, args.rounds))
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
