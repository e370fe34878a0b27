"""How fast this machine multiplies and copies, measured in a second."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

SIDE, CPU_SIDE = 4096, 1024
"""of the matrices"""
COPIED = 2**28
"""bytes of a copy"""
SECONDS = 0.4
"""for each of the two"""


class Rates(NamedTuple):
    """Of a device."""

    tera: float
    """10^12 operations a second, of products in bf16; on a CPU in fp32"""
    copy: float
    """bytes a second, from pinned memory to the device"""


def measured(device: torch.device) -> Rates | None:
    """The rates of a card or a CPU; None for another device, and where there is no room to try."""
    if device.type == "cpu":
        x = torch.randn(CPU_SIDE, CPU_SIDE, dtype=torch.float32, device=device)
        return Rates(_per_second(lambda: x @ x, device) * 2e-12 * CPU_SIDE**3, float("inf"))
    if device.type != "cuda":
        return None
    try:
        x = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=device)
        here = torch.empty(COPIED, dtype=torch.uint8, device="cpu", pin_memory=True)
        there = torch.empty_like(here, device=device)
    except RuntimeError:
        return None
    products = _per_second(lambda: x @ x, device)
    copies = _per_second(lambda: there.copy_(here, non_blocking=True), device)
    return Rates(products * 2e-12 * SIDE**3, copies * COPIED)


def _per_second(call: Callable[[], object], device: torch.device) -> float:
    """Calls a second, after a first that is not counted."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    call()
    synchronize()
    number, start = 0, time.monotonic()
    while (passed := time.monotonic() - start) < SECONDS:
        for _ in range(4):
            call()
        synchronize()
        number += 4
    return number / passed
