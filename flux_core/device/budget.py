"""How much of a device's memory a model may take: `--memory` and `--reserve`."""

import re

import torch

from ..errors import UsageError

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "g": 10**9, "m": 10**6}
RESERVE = "0.5GB"
"""what `--memory auto` leaves for others"""
CONTEXT = 900_000_000
"""bytes of CUDA's context and kernels, which no allocator counts: 0.85 GB on an H200 after a few pictures"""


def bytes_of(text: str, flag: str) -> int:
    """The bytes that a size means: "8GB" are 8 * 10^9, "8GiB" are 8 * 2^30. UsageError."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise UsageError(f"{flag} must be a size, as in 8GB or 7.5GiB, not {text!a}")
    return int(float(found[1]) * UNITS[found[2]])


def budget_of(memory: str | None, reserve: str | None, device: torch.device) -> int | None:
    """Bytes that tensors may take on a device; None where nobody asked for a budget. UsageError."""
    if reserve is not None and memory != "auto":
        raise UsageError("--reserve goes with --memory auto")
    if memory is None:
        return None
    size = None if memory == "auto" else bytes_of(memory, "--memory")
    left = bytes_of(reserve or RESERVE, "--reserve")
    if device.type != "cuda":
        raise UsageError(f"--memory is for a card's memory: on {device} there is none. Next: leave --memory out")
    # what is free was measured with a context
    budget = torch.cuda.mem_get_info(device)[0] - left if size is None else size - CONTEXT
    if budget <= 0:
        why = f"CUDA itself takes {CONTEXT / 1e9:.1f} GB" if size else f"{left / 1e9:.1f} GB are reserved"
        raise UsageError(f"--memory {memory} leaves nothing for a model: {why}. Next: a larger one, or another device")
    return budget
