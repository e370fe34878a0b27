"""The device and the precision to compute in, and errors that name the alternatives."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import MemoryShortage, UsageError, is_out_of_memory
from ..linears.fp8 import has_fp8_units
from ..request.fields import DTYPES, FORMATS
from ..terminal import note

OWN = tuple(name for name in FORMATS if name != "fp8")
"""formats beside which a device computes in its own precision"""


def available_devices() -> list[str]:
    """Names that `--device` takes on this machine, the best first."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, "cpu"]


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, or the best that this machine has. UsageError when it has no such device."""
    known = available_devices()
    if name in (None, "auto", *OWN):
        return torch.device(known[0])
    asked = str(name)
    if asked in known or (asked == "cuda" and known[0] == "cuda:0"):
        return torch.device("cuda:0" if asked == "cuda" else asked)
    raise UsageError(f"--device {asked} is not there: {_reason(asked)}. Use one of: auto, {', '.join(known)}")


def _reason(asked: str) -> str:
    if asked.startswith("cuda"):
        if not torch.backends.cuda.is_built():
            return f"torch {torch.__version__} was built without CUDA"
        if not torch.cuda.is_available():
            return f"torch finds no usable GPU (is the driver recent enough for CUDA {torch.version.cuda}?)"
        return f"torch sees {torch.cuda.device_count()} CUDA device(s)"
    if asked.startswith("mps"):
        return "MPS needs a Mac with Apple silicon"
    return "no such kind of device"


def pick_dtype(name: str | torch.dtype | None, device: torch.device, flag: str = "--dtype") -> torch.dtype:
    """The precision of that name; by itself bfloat16 on CUDA, else float32. UsageError names the flag if it cannot run.

    For a format it is what everything but the Linears in few bits computes in: for fp8 bfloat16, else the device's own.
    """
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name in (None, "auto", *OWN):
        return torch.bfloat16 if device.type == "cuda" and bf16 else torch.float32
    known = DTYPES.get(str(name).removeprefix("torch."))
    if known is None:
        raise UsageError(f"{flag} {name} is not known: use one of auto, {', '.join(DTYPES)}")
    if known in ("bfloat16", "fp8") and not bf16:
        card = torch.cuda.get_device_name(device)
        raise UsageError(f"{flag} {name}: {card} has no bfloat16; use {flag} float32")
    if known != "fp8":
        return getattr(torch, known)
    _check_fp8(device, flag)
    return torch.bfloat16


def format_named(name: str | torch.dtype | None) -> str | None:
    """The format of Linears that the name of a precision asks for."""
    return str(name) if str(name) in FORMATS else None


def _check_fp8(device: torch.device, flag: str) -> None:
    """UsageError where the device has no fp8 dtype (MPS); a line on stderr where it has no fp8 matrix products."""
    try:
        torch.ones(1, dtype=torch.float32, device=device).to(torch.float8_e4m3fn).float()
    except (RuntimeError, TypeError):
        raise UsageError(f"{flag} fp8: {device} has no fp8 numbers. Next: use {flag} bfloat16") from None
    if not has_fp8_units(device):
        note(f"{device} has no fp8 units: weights stay in fp8, dequantized for each product (less memory, no faster)")


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32", as requests and metadata spell it."""
    return str(dtype).removeprefix("torch.")


SMALLER = (
    "choose a smaller --width and --height, a smaller --dtype (nf4, then int8 or fp8, then bfloat16, then float32), or "
    "another --device"
)


@contextmanager
def memory_errors(what: str, device: torch.device, remedy: str = SMALLER) -> Iterator[None]:
    """Out of memory inside becomes a MemoryShortage with sizes, on any device. what: as in "drawing 64x64 pixels"."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortage(
            f"out of memory on {device} while {what}{_sizes(device, error)}. Next: {remedy}"
        ) from error


def _sizes(device: torch.device, error: Exception) -> str:
    """Text: how much was asked for, as the allocator says, and who holds the rest, where the device says."""
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    sizes = [f"{asked[1]} more were asked for"] if asked else []
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        here = torch.cuda.memory_reserved(device)
        every = (f"{size / 2**30:.1f}" for size in (total, here, total - free - here, free))
        sizes.append("of {} GiB {} are held here, {} by the driver and other programs, {} are free".format(*every))
    return ": " + "; ".join(sizes) if sizes else ""


@contextmanager
def compile_errors() -> Iterator[None]:
    """Errors of torch.compile inside (most often a missing compiler) become a UsageError of one line."""
    try:
        yield
    except RuntimeError as error:
        # its classes by name: importing them takes a second that a picture without --compile should not pay
        if "TorchDynamoException" not in {kind.__name__ for kind in type(error).__mro__}:
            raise
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
        reason = lines[0] if lines else type(error).__name__
        raise UsageError(f"--compile does not work here: {reason[:200]}. Next: leave it out") from error


def empty_device_cache(device: torch.device) -> None:
    """Return the memory of freed tensors, which torch's allocator keeps, to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
