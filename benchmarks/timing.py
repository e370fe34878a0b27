"""Measure the time of calls that are compared on one card, at its sustained clocks.

A card at its power limit lowers its clock within seconds, by an amount that depends on the load. So the compared calls
take turns of about a second: all have the same temperature, and within a turn the clock settles to the load. The time
of a turn is the median of its later half.
"""

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch

Call = Callable[[], Any]


def burst(call: Call, count: int, device: str) -> list[float]:
    """Milliseconds of each of `count` calls in a row, without waiting for the device between them."""
    if not device.startswith("cuda"):
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [1000 * (b - a) for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def turns(calls: Mapping[str, Call], rounds: int, seconds: float, device: str) -> dict[str, list[float]]:
    """Settled milliseconds of each call, a figure for each round; a first round is for warm-up and not counted.

    Every call is made once before, so that one-time work (compiling, selecting kernels) is not measured.
    """
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(2, round(1000 * seconds / statistics.median(burst(call, 3, device))))
    names = list(calls)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        k = i % len(names)  # else the first would always follow the hottest
        for name in names[k:] + names[:k]:
            times = burst(calls[name], counts[name], device)
            figures[name].append(statistics.median(times[len(times) // 2 :]))
    return {name: times[1:] for name, times in figures.items()}


@contextmanager
def watched(device: str) -> Iterator[dict[str, float | None]]:
    """SM clock and power of the card by nvidia-smi, medians of the block's later half; filled in at its end."""
    figures: dict[str, float | None] = {"sm_mhz": None, "watts": None}
    seen: list[list[float]] = []
    over = threading.Event()

    def watch() -> None:
        card = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        query = "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"
        while not over.wait(0.3):
            with suppress(OSError, ValueError):  # no nvidia-smi, or [N/A]
                out = subprocess.run(["nvidia-smi", card, *query], stdout=subprocess.PIPE, text=True).stdout
                seen.append([float(x) for x in out.split(",")])

    watcher = threading.Thread(target=watch, daemon=True)
    if device.startswith("cuda"):
        watcher.start()
    yield figures
    over.set()
    if seen:
        later = zip(*seen[len(seen) // 2 :], strict=True)
        figures.update(zip(figures, map(statistics.median, later), strict=True))


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of call `name`'s time to call `to`'s. times: from `turns`."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))
