"""Peak memory of loading beyond the weights themselves, for FLUX.1-dev's transformer on the CPU.

    python benchmarks/load_memory.py

The files are sparse (zeros that take no space on the disk) and have the official names and shapes. Three modes:
*mapped* (bf16 as bf16, the whole 23.8 GB), *cast* (fp16 to bf16) and *read* (bf16 where nothing can be mapped), the
last two with a fifth of the blocks, as they need real memory. A new process loads, and its peak anonymous memory is
sampled from /proc; `over` is that peak without the process before loading and without anonymous weights, as a fraction
of the weights. Prints a line of JSON; the goal is 0.1.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flux_core.variants import VARIANTS

DEV = VARIANTS["flux-dev"]
FIFTH = replace(DEV.params, depth=4, depth_single_blocks=8)
MODES = {"mapped": (DEV.params, "BF16"), "cast": (FIFTH, "F16"), "read": (FIFTH, "BF16")}


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Write a file of tensors of two bytes a number. Returns the bytes of the weights."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def shapes_of(kind: Callable[[Any], Any], sizes: Any) -> dict[str, tuple[int, ...]]:
    """Of a network's tensors, without making them."""
    import torch

    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in kind(sizes).state_dict().items()}


def anonymous() -> int:
    """Bytes of this process's anonymous memory, which no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


def load(mode: str) -> None:
    """In the new process: load, and print the peak above the memory before, and the seconds."""
    import torch

    from flux_core.checkpoint import load_flux, tensors

    if mode == "read":

        def forbidden(*_: object, **__: object) -> None:
            raise OSError(19, "No such device")

        tensors.safe_open = forbidden
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load_flux(replace(DEV, params=MODES[mode][0]), "cpu", torch.bfloat16)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert model.img_in.weight.dtype == torch.bfloat16
    print(json.dumps({"peak": max(peak, anonymous()) - before, "seconds": round(seconds, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.load)
    from flux_core.model import Flux

    figures = {}
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / DEV.flow_file
            params, dtype = MODES[mode]
            weights = write_sparse(path, shapes_of(Flux, params), dtype)
            environment = os.environ | {"FLUX_MODEL": str(path)}
            command = [sys.executable, __file__, "--load", mode]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        anonymous_weights = 0 if mode == "mapped" else weights
        figures[mode] = {
            "weights_gb": round(weights / 1e9, 2),
            "peak_gb": round(found["peak"] / 1e9, 3),
            "over": round((found["peak"] - anonymous_weights) / weights, 4),
            "seconds": found["seconds"],
        }
    print(json.dumps({"benchmark": "load_memory", **figures}))


if __name__ == "__main__":
    main()
