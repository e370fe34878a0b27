"""Attention in eight bits: its error on flux-mini, and its time at full size on a card.

    python benchmarks/attention.py --errors [--prompts 3] [--steps 28]

repeats forwards at latents of drawn pictures, as `velocity_error.py` does, with attention alone in eight bits, by the
plain functions; with q and k alone, rotated and centred or not; and models in fp8 and int8 with each. Prints a line of
JSON for each: the velocity's relative L2 error to exact attention in fp32, and for a model in few bits its ratio to the
same with exact attention.

    python benchmarks/attention.py [--parts kernels tiles steps] [--rounds 3]

needs a card of compute capability 8.9 on, with 40 GB for `steps`. Everything is replayed from CUDA graphs, in turns
(`timing.py`). What fails is a line with its error, and the rest goes on.

kernels   at [1, 24, 4608, 128]: each exact backend; for each form the whole way, its quantizing and its attention
          alone; and the kernels that norm q and k, to bf16 and to codes. Milliseconds, TFLOP/s, and the error to
          attention in fp32
tiles     attention alone by other tiles, in bursts: milliseconds and error of each, the quickest first in the last
          line. What follows it uses the quickest
steps     a step of flux-dev with random weights in fp8 and in int8 with each way, in turns with the floors of
          `floor.py`; `ratio` is to that of fp8, which has exact attention

`--tiny` runs small on any machine, without what needs a card.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
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
from flux_core.kernels.eight_bits import E4M3_LARGEST, FORMS, Form, to_e4m3
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


def as_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The form fp8 as cuDNN computes it: values, and the result, by one scale."""
    scale = v.abs().max() / E4M3_LARGEST
    return to_e4m3(eight_bits.attend(q, k, to_e4m3(v / scale).float(), Form(False, True))).float() * scale


PLAIN: dict[str, Attend] = {
    **{name: partial(eight_bits.attend, form=form) for name, form in FORMS.items() if name != "fp8"},
    "fp8": as_cudnn,
    "fp8, by our kernel": partial(eight_bits.attend, form=FORMS["fp8"]),
}
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
    """These functions with attention in each form that works here, `fp8` by cuDNN; with q and k quantized apart from
    their norm; and with our kernel in the place of cuDNN's."""
    from flux_core.kernels import flash

    found: dict[str, ops.Ops] = {}
    for name in attention.EIGHT:
        made = tried("ways", name, partial(attention.in_eight_bits, own, name, torch.bfloat16))
        if made is not None:
            found[name] = made
            if made.opened is not None:
                found[f"{name}, quantized apart"] = made.opened
    found["fp8, by our kernel"] = own._replace(attend=lambda q, k, v: flash.attend_op(q, k, v, "fp8"))
    return found


def heads_of(params: Any) -> tuple[Any, ...]:
    """Arguments of `ops.norm_rope_join`: slices of two products, 512 tokens of text before 4096."""
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    streams = [split_heads(draw(1, tokens, 3 * HEADS * FEATURES), HEADS) for tokens in (512, TOKENS - 512)]
    scales = [(draw(FEATURES).abs() + 0.5, draw(FEATURES).abs() + 0.5) for _ in range(2)]
    ids = torch.rand(1, TOKENS, 3, device="cuda", dtype=torch.float32) * 64
    return *streams, *scales, embed_nd(ids, params.axes_dim, params.theta)


def kernels(rounds: int) -> None:
    from flux_core.kernels import flash

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
    given = heads_of(VARIANTS["flux-dev"].params)
    single = (*given[1][:2], *given[3], given[4][:, :, : TOKENS - 512])
    for name, way in {"bf16": own, **ways(own)}.items():
        if name != "bf16":
            call = partial(way.attend, q, k, v)
            add(name, call, call)
        if "apart" not in name and "fp8" not in name:
            add(f"norm_rope_join, {name}", partial(way.norm_rope_join, *given))
            add(f"norm_rope, {name}, 4096 tokens", partial(way.norm_rope, *single))
    for name, form in FORMS.items():
        plain = tried("kernels", name, partial(eight_bits.attend, q, k, v, form))
        if plain is not None:
            say("kernels", f"{name}, plain functions", error_of_output=distance(plain, truth))
        add(f"{name}: quantizing", partial(flash.quantize, q, k, v, form))
        codes = tried("kernels", name, partial(flash.quantize, q, k, v, form))
        if codes is not None:
            add(f"{name}: attention", partial(flash.attend_codes, codes, TOKENS, q.dtype, flash.TILES[name]))

    def of_cudnn() -> None:
        from flux_core.kernels import cudnn_fp8

        codes = flash.quantize(q, k, v, FORMS["fp8"], rows=True)
        add("cudnn fp8: quantizing", partial(flash.quantize, q, k, v, FORMS["fp8"], rows=True))
        add("cudnn fp8: attention", partial(cudnn_fp8.attend_codes, codes.q, codes.k, codes.v, codes.v_scale, TOKENS))

    tried("kernels", "cudnn fp8", of_cudnn)
    with watched("cuda") as card:
        times = turns(calls, rounds, 0.4, "cuda")
    for name, found in times.items():
        ms = statistics.median(found)
        rate = {} if "quantizing" in name or "norm" in name else {"tflop_per_s": 1000 * TFLOP / ms}
        to = ratio(times, name, "cudnn") if "cudnn" in times else None
        say("kernels", name, ms=ms, **rate, to_cudnn_bf16=to, **card)


def tile_choices(name: str) -> Iterator[Any]:
    """The tiles to try for a form, likely ones first."""
    from flux_core.kernels import flash

    yield flash.TILES[name]
    sizes = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 32, 4, 4)]
    for size, registers in product(sizes, (None, 168)):
        if (one := flash.Tiles(*size, registers)) != flash.TILES[name]:
            yield one
    yield flash.Tiles(64, 64, 4, 2, 128)


def tiles() -> None:
    from flux_core.kernels import flash

    q, k, v = drawn()
    truth = exact_of(q, k, v)
    for name, form in FORMS.items():
        codes = flash.quantize(q, k, v, form)
        found = []
        for size in tile_choices(name):

            def measure(codes: Any = codes, size: Any = size, found: list[Any] = found, name: str = name) -> None:
                call = partial(flash.attend_codes, codes, TOKENS, q.dtype, size)
                off, ms = distance(call(), truth), statistics.median(burst(graphed(call), 60, "cuda"))
                say("tiles", name, tiles=size._asdict(), ms=ms, tflop_per_s=1000 * TFLOP / ms, error_of_output=off)
                found.append((ms, size))

            tried("tiles", f"{name}, {size}", measure)
        if found:
            found.sort(key=lambda one: one[0])
            flash.TILES[name] = found[0][1]
            say(
                "tiles", f"{name}, quickest", tiles=[str(size) for _, size in found[:4]], ms=[ms for ms, _ in found[:4]]
            )


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
        calls[f"floor of {floor}"] = graphed(FloorStep(floor, "cuda", variant.params, 4096, variant.max_text))
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
    parser.add_argument("--parts", nargs="*", default=["tiles", "kernels", "steps"], help="what to time")
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
