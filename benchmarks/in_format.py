"""Models in any format that can be made in memory: those of `--dtype`, and each type of GGUF that can be written.

    python benchmarks/in_format.py [--name flux-dev]

prints a line of JSON for bf16 and for each format, computed from shapes: bits for each weight of the layers in few
bits, scales included; GB of the transformer; and GB of what stays on the device with `--offload`, all but modulation.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from flux_core.linears.formats import FORMATS, quantizable
from flux_core.linears.fp8 import Fp8Linear, quantize_rows
from flux_core.linears.frozen import Frozen
from flux_core.linears.gguf import PACK, GgufLinear
from flux_core.linears.gguf_types import is_whole
from flux_core.linears.int8 import Int8Linear
from flux_core.model import MODULATION, Flux, FluxParams
from flux_core.variants import VARIANTS

NAMES = ("fp8", "int8", "nf4", *(kind.lower() for kind in PACK))
Make = Callable[[nn.Linear], nn.Module]


def maker(name: str) -> Make:
    """The function that makes a layer in that format of a Linear."""
    kind = name.upper()
    return partial(GgufLinear.of, kind=kind) if kind in PACK else FORMATS[name].kind.of


def linears_for(model: nn.Module, name: str) -> dict[str, nn.Linear]:
    """The Linears that get that format, by name; of GGUF those whose rows are whole blocks of the type."""
    kind = name.upper()
    if kind not in PACK:
        return quantizable(model, name)
    return {name: one for name, one in quantizable(model, "gguf").items() if is_whole(kind, one.weight.shape)}


def quantize(model: nn.Module, name: str) -> None:
    """Put a model into that format."""
    make, linears = maker(name), linears_for(model, name)
    while linears:  # each is freed before the next
        place, linear = linears.popitem()
        model.set_submodule(place, make(linear))


def as_in_units(layer: nn.Module) -> nn.Module:
    """The layer, with tokens rounded as a card's fp8 or int8 units take them, where the device has none."""
    if isinstance(layer, Fp8Linear) and not layer.scaled:
        layer.register_forward_pre_hook(_coarse)
    if isinstance(layer, Int8Linear) and layer.weight.device.type == "cpu":
        layer.scaled = True  # which the CPU computes, too
    return layer


def _coarse(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
    codes, scale = quantize_rows(args[0])
    return (codes.float() * scale).to(args[0].dtype)


def bits(model: nn.Module) -> float:
    """Bits for each weight of the layers in few bits, scales included."""
    layers = [layer for layer in model.modules() if isinstance(layer, Frozen)]
    kept = [getattr(layer, name) for layer in layers for name in layer.CODES]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * sum(x.nbytes for x in kept if isinstance(x, Tensor)) / max(1, weights)


def sizes(params: FluxParams, name: str) -> tuple[float, int, int]:
    """Bits, and bytes of the transformer whole and without its modulation; built on `meta`."""
    with torch.device("meta"):
        model = Flux(params).to(torch.bfloat16)
    if name in NAMES:
        quantize(model, name)
    whole = sum(x.nbytes for x in model.state_dict().values())
    aside = [layer for name, layer in model.named_modules() if name.endswith(MODULATION)]
    return bits(model), whole, whole - sum(x.nbytes for layer in aside for x in layer.state_dict().values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=list(VARIANTS), default="flux-dev")
    args = parser.parse_args()
    for name in ("bf16", *NAMES):
        per_weight, whole, kept = sizes(VARIANTS[args.name].params, name)
        line = {"benchmark": "in_format", "name": args.name, "format": name, "bits": round(per_weight, 3) or 16}
        print(json.dumps({**line, "gb": round(whole / 1e9, 2), "gb_without_modulation": round(kept / 1e9, 2)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
