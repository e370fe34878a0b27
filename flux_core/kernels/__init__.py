"""Fast twins of `model/ops` for devices that Triton compiles for, put in place once a model is loaded.

A block's text calls `self.ops`, a static tuple of functions. Which tuple stands there is decided here, once, by what
the device can do; the plain tuple stays the truth that `tests/kernels` holds the other to. Triton is imported only
where it is used: nothing below asks for it on a CPU, on MPS, or on a card older than Ampere.
"""

from functools import cache
from importlib.util import find_spec

import torch

from ..model import Flux
from ..model.ops import PLAIN, Ops
from ..terminal import note

__all__ = ["can_fuse", "fused_ops", "install"]

OLDEST = (8, 0)
"""compute capability from which bf16 is in hardware and the kernels are worth having"""


def can_fuse(device: torch.device | str) -> bool:
    """Whether Triton is here, and made for this device."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST


@cache
def compiles(device: torch.device | str) -> bool:
    """Whether Triton does compile for it: tried on one small row, since it needs a C compiler and the driver, too."""
    x, row = torch.randn(1, 2, 16, device=device), torch.zeros(1, 1, 16, device=device)
    try:
        return torch.allclose(_fused().modulate(x, row, row), PLAIN.modulate(x, row, row), atol=1e-5)
    except Exception as error:  # Triton's own, its compiler's, the driver's
        reason = (str(error).splitlines() or [""])[0][:120]
        note(f"Triton does not compile here ({type(error).__name__}: {reason}): plain functions take its place, slower")
        return False


def fused_ops(device: torch.device | str) -> Ops:
    """The fastest functions that the device has: the fused ones, or PLAIN."""
    return _fused() if can_fuse(device) and compiles(device) else PLAIN


def install(model: Flux, device: torch.device | str) -> Ops:
    """Put the functions of that device into every block and the last layer of a model; returns them.

    All hold one and the same tuple, so compiled blocks of a kind go on sharing a graph (dynamo guards on its functions,
    which are module-level ones). Blocks that were compiled before compile once more at their next call.
    """
    ops = fused_ops(device)
    put(model, ops)
    return ops


def put(model: Flux, ops: Ops) -> None:
    """These functions into every block and the last layer, attention included."""
    for part in (*model.double_blocks, *model.single_blocks, model.final_layer):
        part.ops = ops


@cache
def _fused() -> Ops:
    from . import fused  # defines its kernels, for which it needs Triton

    return PLAIN._replace(
        modulate=fused.modulate,
        norm_rope=fused.norm_rope,
        norm_rope_join=fused.norm_rope_join,
        join_gelu=fused.join_gelu,
    )
