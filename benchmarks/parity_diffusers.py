"""Error and speed of our transformer relative to diffusers', at full size, with the same weights.

    python benchmarks/parity_diffusers.py

12 billion random weights are drawn on the device, in bf16, and both networks are built on them: all of
diffusers' tensors but two are views of ours (`checkpoint/keymaps.py`), so that both fit in the memory of one
model. Both run a forward of the same 1024x1024 picture's tokens (4096, and 512 of text), in bf16, then with
the same weights in fp32.

Prints a line of JSON: `fp32_relative_l2` between the two (goal 1e-5), `bf16_relative_l2` between the two,
each one's distance in bf16 from its own fp32, seconds of a forward, and `ratio`, our bf16 time over theirs.
Without TF32. Exits with 1 if the goal is missed. Needs a GPU of 80 GB and diffusers; `--tiny` runs small on
any machine.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from flux_core.checkpoint import to_diffusers
from flux_core.checkpoint.layouts import transformer_config
from flux_core.model import Flux, FluxParams
from flux_core.sampling import image_ids
from flux_core.variants import VARIANTS

GOAL = 1e-5
Inputs = dict[str, Tensor]


def random_flux(params: FluxParams, device: str, seed: int = 0) -> Flux:
    """A model in bf16 with weights normal(0, 0.02) and scales of norms normal(1, 0.02), drawn on the device."""
    with torch.device("meta"):
        model = Flux(params).to(torch.bfloat16)
    model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(1.0 if name.endswith("scale") else 0.0, 0.02, generator=generator)
    return model


def random_inputs(params: FluxParams, side: int, text: int, device: str, seed: int = 1) -> Inputs:
    """Inputs of a forward for one picture of side x side tokens, with values that are exact in bf16."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "img": (side * side, params.in_channels),
        "txt": (text, params.context_in_dim),
        "y": (params.vec_in_dim,),
    }
    inputs = {name: torch.randn(1, *shape, generator=draw).bfloat16() for name, shape in shapes.items()}
    inputs |= {"timesteps": torch.tensor([0.6875]), "guidance": torch.tensor([3.5])}
    inputs |= {"img_ids": image_ids(1, side, side), "txt_ids": torch.zeros(1, text, 3)}
    return {name: x.to(device) for name, x in inputs.items()}


def build_theirs(ours: Flux) -> torch.nn.Module:
    """diffusers' model on views of our weights."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(transformer_config(ours.params))
    model.load_state_dict(to_diffusers(ours.state_dict(), ours.params), assign=True)
    return model.eval().requires_grad_(False)


def call_theirs(model: torch.nn.Module, inputs: Inputs) -> Tensor:
    return model(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y"],
        timestep=inputs["timesteps"],
        guidance=inputs["guidance"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        return_dict=False,
    )[0]


def timed(call: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """The result of a first call, moved to the CPU to free memory, and the median seconds of `repeats` more calls."""
    result = call().cpu()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call().cpu()  # the copy waits for the device
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def run_ours(ours: Flux, inputs: Inputs, repeats: int) -> tuple[Tensor, float]:
    given = in_dtype_of(ours, inputs)
    return timed(lambda: ours(**given), repeats)


def run_theirs(ours: Flux, inputs: Inputs, repeats: int) -> tuple[Tensor, float]:
    """diffusers' model exists only here: its views would keep our weights in memory when those are cast."""
    theirs, given = build_theirs(ours), in_dtype_of(ours, inputs)
    return timed(lambda: call_theirs(theirs, given), repeats)


def in_dtype_of(model: Flux, inputs: Inputs) -> Inputs:
    """The inputs in the model's dtype, but position ids in fp32, as in both models."""
    dtype = model.img_in.weight.dtype
    return {name: x if name.endswith("ids") else x.to(dtype) for name, x in inputs.items()}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def measure(params: FluxParams, side: int, text: int, device: str, repeats: int) -> dict[str, Any]:
    ours = random_flux(params, device)
    inputs = random_inputs(params, side, text, device)
    mine, my_seconds = run_ours(ours, inputs, repeats)
    other, other_seconds = run_theirs(ours, inputs, repeats)
    gc.collect()
    ours.float()
    mine32, my_seconds32 = run_ours(ours, inputs, repeats)
    other32, other_seconds32 = run_theirs(ours, inputs, repeats)
    return {
        "ratio": my_seconds / other_seconds,
        "fp32_relative_l2": distance(mine32, other32),
        "bf16_relative_l2": distance(mine, other),
        "bf16_from_fp32": {"ours": distance(mine, mine32), "diffusers": distance(other, other32)},
        "seconds_bf16": {"ours": my_seconds, "diffusers": other_seconds},
        "seconds_fp32": {"ours": my_seconds32, "diffusers": other_seconds32},
        "parameters": sum(p.numel() for p in ours.parameters()),
        "tokens": {"image": side * side, "text": text},
    }


def surroundings(device: str) -> dict[str, Any]:
    import diffusers

    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "peak_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if cuda else None,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few blocks of 64 features, 16 + 8 tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed forwards of each model and dtype")
    args = parser.parse_args()

    torch.set_float32_matmul_precision("highest")
    params, side, text = VARIANTS["flux-dev"].params, 64, 512
    if args.tiny:
        params, side, text = tiny(params), 4, 8
    figures = measure(params, side, text, args.device, args.repeats)
    met = figures["fp32_relative_l2"] <= GOAL
    print(json.dumps({"benchmark": "parity_diffusers", "goal_met": met, **figures, **surroundings(args.device)}))
    return 0 if met else 1


def tiny(params: FluxParams) -> FluxParams:
    """Sizes of the same network, small enough for any machine."""
    heads = {"hidden_size": 64, "num_heads": 4, "axes_dim": (4, 6, 6)}
    return replace(params, **heads, depth=2, depth_single_blocks=3, context_in_dim=48, vec_in_dim=32)


if __name__ == "__main__":
    raise SystemExit(main())
