"""How much memory does loading take, over the weights themselves? FLUX.1-dev's transformer, onto the CPU.

    python benchmarks/load_memory.py

The files are sparse (zeros that take no room on the disk) and have the official names and shapes. Three ways: *mapped*
(bf16 as bf16, the whole 23.8 GB), *cast* (fp16 to bf16) and *read* (bf16 where nothing can be mapped), the last two
with a fifth of the blocks, as they need real memory. Peak anonymous memory is sampled from /proc while a process of its
own loads; `over` is what it has beyond the process before loading and the weights that are anonymous themselves, as a
part of the weights. One line of JSON; the goal is 0.1.
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
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flux_core.variants import VARIANTS

DEV = VARIANTS["flux-dev"]
FIFTH = replace(DEV.params, depth=4, depth_single_blocks=8)
BACKENDS = {"mapped": (DEV.params, "BF16"), "cast": (FIFTH, "F16"), "read": (FIFTH, "BF16")}


def write_sparse(path: Path, way: str) -> int:
    """A file of that way's tensors. Returns the bytes of the weights."""
    import torch

    from flux_core.model import Flux

    params, dtype = BACKENDS[way]
    header, end = {}, 0
    with torch.device("meta"):
        for name, x in Flux(params).state_dict().items():
            start, end = end, end + 2 * x.numel()
            header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


def load(way: str) -> None:
    """In a process of its own: load, and print the peak over what was there before, and the seconds."""
    import torch

    from flux_core.checkpoint import load_flux, tensors

    if way == "read":

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
    model = load_flux(replace(DEV, params=BACKENDS[way][0]), "cpu", torch.bfloat16)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert model.img_in.weight.dtype == torch.bfloat16
    print(json.dumps({"peak": max(peak, anonymous()) - before, "seconds": round(seconds, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.load)
    figures = {}
    for way in BACKENDS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / DEV.flow_file
            weights = write_sparse(path, way)
            environment = os.environ | {"FLUX_MODEL": str(path)}
            command = [sys.executable, __file__, "--load", way]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        own = 0 if way == "mapped" else weights
        figures[way] = {
            "weights_gb": round(weights / 1e9, 2),
            "peak_gb": round(found["peak"] / 1e9, 3),
            "over": round((found["peak"] - own) / weights, 4),
            "seconds": found["seconds"],
        }
    print(json.dumps({"benchmark": "load_memory", **figures}))


if __name__ == "__main__":
    main()
