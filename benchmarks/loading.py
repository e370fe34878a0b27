"""Speed of loading weights from files to the device, relative to the fastest plain copy of the same bytes.

    python benchmarks/loading.py [--gb 4] [--cold 2] [--rounds 5] [--folder DIR] [--limit 80]

The file has FLUX.1-dev's names and full-size blocks, as many as fill `--gb` (23.9: all), in random bf16 numbers; or it
is your own (`--file`). These methods (`way` in the JSON) take turns:

plain        the reference: each thread reads chunks into its own pinned buffers and copies them to the device, into
             memory allocated before (CPU: threads read into that memory)
bf16         the whole of `load_flux`: header, network, buffers, memory on the device
fp8          the same, quantized while loading; its GB/s are of the file, too
safetensors  `safetensors.torch.load_file` to the device, in the first round only

`warm`: the file is in the page cache. `cold`: another file, of `--cold` GB, always in the temporary folder, is dropped
from the page cache before each turn; `cached` is the fraction that was still there. Torch's caches are emptied before
each turn: a load includes memory allocation, as in a new process. `ratio` is plain's seconds to a method's in the same
round. `host_gib`: anonymous memory above that before, sampled, plus pinned memory, which may be counted twice. Prints
a line of JSON for each turn; medians and a table at the end. After `--limit` seconds no turn starts, and a turn that
fails does not end the others. `--tiny` runs on the CPU in seconds.
"""

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from load_memory import anonymous
from random_parts import tiny_variant

from flux_core.checkpoint import load_flux, stream, with_files
from flux_core.checkpoint.header import read_header
from flux_core.model import Flux
from flux_core.variants import VARIANTS, Variant

Call = Callable[[], Any]
GIB = 2**30


def write_random(path: Path, variant: Variant) -> int:
    """Write a file of these sizes that repeats 64 MiB of random numbers. Returns its size in bytes."""
    header, end = {}, 0
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Flux(variant.params).state_dict().items()}
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    noise = (0.02 * torch.randn(2**25)).bfloat16().view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(noise)):
            file.write(noise[: end - start])
    return path.stat().st_size


def of_size(variant: Variant, gb: float) -> Variant:
    """The variant with as many blocks as fill `gb` GB, at least one of each kind; two single for each double block."""

    def bytes_of(depth: int) -> int:
        with torch.device("meta"):
            model = Flux(replace(variant.params, depth=depth, depth_single_blocks=2 * depth))
        return 2 * sum(x.numel() for x in model.parameters())

    one, two = bytes_of(1), bytes_of(2)
    depth = min(1 + max(0, int((1e9 * gb - one) / (two - one))), variant.params.depth)
    return replace(variant, params=replace(variant.params, depth=depth, depth_single_blocks=2 * depth))


def plain(path: Path, device: str) -> Call:
    """The reference, as a call; all its memory is allocated before."""
    size, chunk, file = path.stat().st_size, stream.CHUNK, os.open(path, os.O_RDONLY)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    cuda = device.startswith("cuda")
    pinned = [torch.empty(2, chunk, dtype=torch.uint8, pin_memory=True) for _ in range(stream.THREADS) if cuda]
    starts = itertools.count(0, chunk)  # its next() is atomic

    def read(memory: torch.Tensor, start: int) -> None:
        view = memory.numpy().data
        while view:
            count = os.preadv(file, [view], start)
            view, start = view[count:], start + count

    def worker(i: int) -> None:
        if not cuda:
            while (start := next(starts)) < size:
                read(target[start : start + chunk], start)
            return
        with torch.cuda.stream(torch.cuda.Stream(device)):
            events = [torch.cuda.Event(blocking=True) for _ in range(2)]
            for buffer, event in itertools.cycle(list(zip(pinned[i], events, strict=True))):
                if (start := next(starts)) >= size:
                    return
                event.synchronize()
                part = buffer[: size - start]
                read(part, start)
                target[start : start + chunk].copy_(part, non_blocking=True)
                event.record()

    def call() -> torch.Tensor:
        with ThreadPoolExecutor(stream.THREADS) as pool:
            list(pool.map(worker, range(stream.THREADS)))
        os.close(file)
        return target

    return call


def by_safetensors(path: Path, device: str) -> Call:
    from safetensors.torch import load_file

    return lambda: load_file(path, device)


def methods(variant: Variant, path: Path, device: str) -> dict[str, Callable[[], Call]]:
    """By method, a function that prepares a turn and returns the call to time."""
    own = replace(variant, files={"model": str(path)})
    return {
        "plain": lambda: plain(path, device),
        "bf16": lambda: lambda: load_flux(own, device, torch.bfloat16),
        "fp8": lambda: lambda: load_flux(own, device, torch.bfloat16, format="fp8"),
        "safetensors": lambda: by_safetensors(path, device),
    }


def forget(device: str) -> None:
    """Return cached device and pinned memory to the system, and reset the peaks."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        for name in ("_host_emptyCache", "_accelerator_emptyHostCache"):  # up to torch 2.12, and since
            getattr(torch._C, name, lambda: None)()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_peak_host_memory_stats()


@contextmanager
def memory(device: str) -> Iterator[dict[str, float]]:
    """Peaks of memory during the block, in GiB; filled in at its end."""
    figures: dict[str, float] = {}
    before = peak = anonymous()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield figures
    finally:
        over.set()
        watcher.join()
    pinned = device_peak = 0
    if device.startswith("cuda"):
        found = torch.cuda.host_memory_stats()
        pinned = max(found.get(f"{kind}_bytes.peak", 0) for kind in ("allocated", "reserved"))
        device_peak = torch.cuda.max_memory_allocated()
    own = max(peak, anonymous()) - before
    sizes = {"host": own + pinned, "pinned": pinned, "device": device_peak}
    figures.update({f"{name}_gib": size / GIB for name, size in sizes.items()})


def drop(path: Path) -> None:
    """Drop a file from the page cache, as far as the system does it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> float | None:
    """The fraction of a file in the page cache, by a hundred samples; None if the file system does not report it."""
    size, there = path.stat().st_size, 0
    with path.open("rb", buffering=0) as file:
        for i in range(100):
            try:
                there += os.preadv(file.fileno(), [bytearray(1)], size * i // 100, os.RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError:
                return None
    return there / 100


@dataclass
class Bench:
    device: str
    limit: float
    """seconds after which no turn starts"""
    began: float = field(default_factory=time.perf_counter)
    failed: bool = False
    turns: dict[tuple[str, str], dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    """by state and method, then by round"""

    def say(self, **figures: Any) -> None:
        figures = {key: round(x, 4) if isinstance(x, float) else x for key, x in figures.items()}
        print(json.dumps({"benchmark": "loading", **figures}), flush=True)

    def late(self, expected: float = 0) -> bool:
        return time.perf_counter() - self.began + expected > self.limit

    def turn(self, state: str, way: str, i: int, prepare: Callable[[], Call], path: Path) -> None:
        """Measure a method in round i. An error is printed and does not end the benchmark."""
        before = [one["s"] for one in self.turns[state, way].values()]
        if self.late(max(before, default=0)):
            return self.say(state=state, way=way, round=i, left_out=f"after {self.limit} s")
        try:
            forget(self.device)
            call = prepare()
            if state == "cold":
                drop(path)
            part = cached(path)
            with memory(self.device) as peaks:
                start = time.perf_counter()
                result = call()
                if self.device.startswith("cuda"):
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            del result, call
        except Exception as error:
            self.failed = True
            return self.say(state=state, way=way, round=i, error=f"{type(error).__name__}: {error}")
        gb = path.stat().st_size / 1e9
        figures = {"s": seconds, "gb_per_s": gb / seconds, "cached": part, **peaks}
        self.turns[state, way][i] = figures
        self.say(state=state, way=way, round=i, gb=gb, **figures)

    def medians(self, state: str, way: str) -> dict[str, Any]:
        """Medians of the turns, and of the ratio to plain's in the same round."""
        mine, reference = self.turns[state, way], self.turns[state, "plain"]
        keys = [key for key, value in next(iter(mine.values())).items() if value is not None]
        figures = {key: statistics.median(one[key] for one in mine.values()) for key in keys}
        ratios = [reference[i]["s"] / one["s"] for i, one in mine.items() if i in reference]
        return figures | ({"ratio": statistics.median(ratios)} if ratios else {})

    def close(self) -> None:
        card = torch.cuda.get_device_name() if self.device.startswith("cuda") else self.device
        where = f"{card}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(f"{where}, {stream.THREADS} threads, chunks of {stream.CHUNK >> 20} MiB", file=sys.stderr)
        for (state, way), turns in self.turns.items():
            if turns:
                found = self.medians(state, way)
                self.say(state=state, way=way, median_of=len(turns), **found)
                shown = "  ".join(f"{key} {value:.3f}" for key, value in found.items())
                print(f"{state:<6}{way:<13}{shown}", file=sys.stderr)


def measure(bench: Bench, args: argparse.Namespace, variant: Variant, folder: Path, temporary: Path) -> None:
    if args.file:
        variant, path = with_files(model=args.file), Path(args.file)
    else:
        variant, path = variant if args.tiny else of_size(variant, args.gb), folder / "warm.safetensors"
        start = time.perf_counter()
        size = write_random(path, variant)
        bench.say(written_gb=size / 1e9, s=time.perf_counter() - start)
    read_header(path)
    warm = methods(variant, path, args.device)
    if args.file:
        warm["plain"]()()  # into the page cache
    for i in range(args.rounds):
        names = [name for name in warm if i == 0 or name != "safetensors"]
        for name in names[:1] + names[1:][:: 1 if i % 2 else -1]:
            bench.turn("warm", name, i, warm[name], path)
    if args.cold:
        if not args.file:
            path.unlink()
            variant, path = variant if args.tiny else of_size(variant, args.cold), temporary / "cold.safetensors"
            write_random(path, variant)
        cold = methods(variant, path, args.device)
        for i, name in itertools.product(range(2), ("plain", "bf16", "fp8")):
            bench.turn("cold", name, i, cold[name], path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4, help="size of the generated file")
    parser.add_argument("--cold", type=float, default=2, help="size in GB of the file read from the disk; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder for the generated warm file, which is removed at the end")
    parser.add_argument("--file", help="your own transformer file instead of a generated one")
    parser.add_argument("--limit", type=float, default=80, help="seconds after which no turn starts")
    parser.add_argument("--threads", type=int, default=stream.THREADS, help="reader threads, of plain and of load_flux")
    parser.add_argument("--buffers", type=int, default=stream.BUFFERS, help="buffers of load_flux")
    parser.add_argument(
        "--chunk", type=int, default=stream.CHUNK >> 20, help="MiB of a read, of plain and of load_flux"
    )
    parser.add_argument("--tiny", action="store_true", help="a few blocks of 64 features")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    stream.THREADS, stream.BUFFERS, stream.CHUNK = args.threads, args.buffers, args.chunk << 20
    variant = tiny_variant(VARIANTS["flux-dev"]) if args.tiny else VARIANTS["flux-dev"]
    free = shutil.disk_usage(args.folder or tempfile.gettempdir()).free
    if not (args.tiny or args.file) and free < 1.05e9 * args.gb:
        parser.error(f"--gb {args.gb}: only {free / 1e9:.1f} GB are free; use a smaller --gb, or another --folder")
    bench = Bench(args.device, args.limit)
    if args.device.startswith("cuda"):
        torch.ones(1, device=args.device).float().sum().item()  # starts CUDA
    made = partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)
    with made(dir=args.folder) as folder, made() as temporary:
        try:
            measure(bench, args, variant, Path(folder), Path(temporary))
        finally:
            bench.close()
    return int(bench.failed)


if __name__ == "__main__":
    raise SystemExit(main())
