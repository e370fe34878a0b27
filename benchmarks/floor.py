"""The floor of a FLUX.1 step on this device: the time of its matrix products and its attention alone.

    python benchmarks/floor.py [--size 1024] [--rounds 5]

It runs every product of the 57 blocks with tokens (4096 of the image, 512 of text), each with its own random normal
weights, and every attention, with the PyTorch backend that is fastest here. No bias, no elementwise work, no modulation
(its products are with a vector, and can be computed before the loop), and one CUDA graph for all launches. In bf16; and
where the device supports it with e4m3 products, a scale for each row, and bf16 attention.

It is replayed for a second in each round, after a warm-up round; the figure is the median of the rounds, with
nvidia-smi's clock and power during them. The card's clock depends on its temperature, so a floor is comparable only to
measurements of the same minutes: other benchmarks time a `FloorStep` in turns with their own calls (`timing.py`), and
`floor` is the whole measurement in one call.

Prints a table on stderr and a line of JSON on stdout. `--tiny` runs small on any machine.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from parity_diffusers import tiny
from timing import Call, burst, turns, watched
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_core.linears.fp8 import has_fp8_units, quantize_rows, scaled_product
from flux_core.model import Flux, FluxParams
from flux_core.variants import VARIANTS

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "bf16": (lambda x: x, F.linear),
    "fp8": (quantize_rows, lambda x, weight: scaled_product(*x, *weight, None)),
}
"""for each dtype: the conversion of both operands, and the product"""


def fastest_attention(q: Tensor, k: Tensor, v: Tensor, device: str) -> tuple[SDPBackend, dict[str, float]]:
    """The fastest attention backend on this device, and the milliseconds of each that works."""
    times = {}
    for backend in BACKENDS:
        with suppress(RuntimeError), sdpa_kernel(backend):
            call = partial(F.scaled_dot_product_attention, q, k, v)
            call()
            times[backend] = statistics.median(burst(call, 10, device))
    return min(times, key=times.__getitem__), {backend.name: round(ms, 3) for backend, ms in times.items()}


class FloorStep:
    """Callable that runs the products and the attention of a step; on CUDA by replaying one graph."""

    def __init__(self, dtype: str, device: str, params: FluxParams, img: int, txt: int) -> None:
        prepare, product = PRODUCTS[dtype]
        draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
        tokens = img + txt
        q, k, v = (draw(1, params.num_heads, tokens, params.head_dim) for _ in range(3))
        self.attention, self.attention_ms = fastest_attention(q, k, v, device)
        self.tflop = 0.0
        self.calls: list[Call] = []
        with torch.device("meta"):
            model = Flux(params)
        inputs: dict[tuple[int, int], Any] = {}
        for block in (*model.double_blocks, *model.single_blocks):
            self.calls.append(partial(F.scaled_dot_product_attention, q, k, v))
            self.tflop += 4e-12 * tokens**2 * params.hidden_size
            for name, layer in block.named_modules():
                if not isinstance(layer, nn.Linear) or "mod" in name:
                    continue
                rows = {"img": img, "txt": txt}.get(name[:3], tokens)
                shape = rows, layer.in_features
                if shape not in inputs:
                    inputs[shape] = prepare(draw(shape))
                self.calls.append(partial(product, inputs[shape], prepare(draw(layer.weight.shape).mul_(0.02))))
                self.tflop += 2e-12 * rows * layer.weight.numel()
        self.graph = self._captured() if device.startswith("cuda") else None

    def _captured(self) -> torch.cuda.CUDAGraph:
        self._step()  # libraries load and select kernels before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        with sdpa_kernel(self.attention):
            for call in self.calls:
                call()

    def __call__(self) -> None:
        self._step() if self.graph is None else self.graph.replay()


def floor(
    dtype: str, device: str, params: FluxParams, img: int = 4096, txt: int = 512, rounds: int = 5, seconds: float = 1.0
) -> dict[str, Any]:
    """The settled milliseconds of a step's floor, with rates, clock and power."""
    step = FloorStep(dtype, device, params, img, txt)
    with watched(device) as card:
        times = turns({dtype: step}, rounds, seconds, device)[dtype]
    ms = statistics.median(times)
    rates = {"tflop": round(step.tflop, 3), "tflop_per_s": round(1000 * step.tflop / ms, 1)}
    spread = round((max(times) - min(times)) / ms, 4)
    attention = {"attention": step.attention.name, "attention_ms": step.attention_ms}
    return {"ms": round(ms, 3), "spread": spread, **rates, **attention, **card}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of a second")
    parser.add_argument("--tiny", action="store_true", help="a few blocks of 64 features, 16 + 8 tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    params, img, txt, seconds = VARIANTS["flux-dev"].params, (args.size // 16) ** 2, 512, 1.0
    if args.tiny:
        params, img, txt, seconds = tiny(params), 16, 8, 0.05
    figures: dict[str, Any] = {}
    for dtype in ("bf16", "fp8") if has_fp8_units(torch.device(args.device)) else ("bf16",):
        found = figures[dtype] = floor(dtype, args.device, params, img, txt, args.rounds, seconds)
        rates = f"{found['tflop_per_s']:.0f} TFLOP/s, {found['attention']}, {found['sm_mhz']} MHz, {found['watts']} W"
        print(f"{dtype:<5}{found['ms']:>8.2f} ms   {rates}", file=sys.stderr)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    about = {"tokens": {"image": img, "text": txt}, "device": name, "torch": torch.__version__}
    print(json.dumps({"benchmark": "floor", **figures, **about}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
