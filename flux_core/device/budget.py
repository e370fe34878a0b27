"""How much of a device's memory a model may take: `--memory` and `--reserve`."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from ..errors import MemoryShortage, UsageError
from .memory import Picture, at_least, ram
from .threads import ROOT, groups

CGROUP = ROOT
"""where the limits of containers and of services are"""
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


@dataclass(frozen=True)
class Budget:
    """Memory that a model may take."""

    size: int
    """bytes that tensors may take on the device"""
    asked: str = ""
    """as the user said; without it nothing is refused, and torch is not held to it"""
    smallest: Callable[[Picture], int] = lambda picture: 0
    """the least that he may ask for"""
    beside: int = 0
    """bytes of what he asked for that are not for tensors"""

    def admit(self, picture: Picture, nets: int = 0) -> None:
        """MemoryShortage where a picture cannot be drawn. nets: bytes of other networks than the model's."""
        if not self.admits(picture, nets):
            asked = f"--memory {self.asked} ({(self.size + self.beside) / 1e9:.2f} GB)"
            seen = f" beside {picture.behind:,} tokens of references" if picture.behind else ""
            raise MemoryShortage(
                f"{asked} is too little for {picture.width}x{picture.height} pixels{seen}: it takes at least "
                f"{at_least(self.smallest(picture) + nets)}. Next: that much, a smaller picture, or another --dtype"
            )

    def admits(self, picture: Picture, nets: int = 0) -> bool:
        """Whether a picture can be drawn."""
        return not self.asked or self.smallest(picture) + nets <= self.size + self.beside


def bytes_for(memory: str | None, reserve: str | None, device: torch.device) -> int:
    """Bytes that tensors may take on a device; None: what is free there, however little. UsageError."""
    size = None if memory in (None, "auto") else bytes_of(memory, "--memory")
    left = bytes_of(reserve or RESERVE, "--reserve")
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"--memory does not know how much {device} has. Next: leave --memory out")
    if size is not None:
        found, why = size - outside(device), f"CUDA itself takes {CONTEXT / 1e9:.1f} GB"
    else:
        free = available(device)
        found, why = free - left, f"{left / 1e9:.1f} GB are reserved"
        if memory is None and reserve is None:
            found = max(found, free // 2, 1)
    if found <= 0:
        asked = f"--memory {memory}" if memory else f"--reserve {reserve}"
        raise UsageError(f"{asked} leaves nothing for a model: {why}. Next: another size, or another device")
    return found


@contextmanager
def limited(size: int, device: torch.device) -> Iterator[None]:
    """A context in which torch takes no more than so many bytes of a card, gaps between tensors included."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def outside(device: torch.device) -> int:
    """Bytes of a budget that are not for tensors."""
    return CONTEXT if device.type == "cuda" else 0


def available(device: torch.device) -> int:
    """Bytes of a memory that tensors of this process may take: what is free, or held by what may be dropped, and on a
    card what it has already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = [ram()]
    with suppress(OSError, StopIteration, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        free.append(1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1]))
    for group in groups("memory", CGROUP):
        with suppress(OSError, StopIteration, ValueError):  # no limit; what files take of one may be dropped
            limit = int((group / "memory.max").read_text(encoding="ascii"))
            lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
            free.append(limit - int(next(line for line in lines if line.startswith("anon ")).split()[1]))
    return max(0, min(free))
