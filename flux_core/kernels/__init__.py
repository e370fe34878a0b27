"""Fast twins of `model/ops` and `model/ae_ops` for devices that Triton compiles for, put in place at load time.

A block's text calls `self.ops`, a static tuple of functions. Which tuple stands there is decided here, once, by what
the device can do; the plain tuple stays the truth that `tests/kernels` holds the other to. Triton is imported only
where it is used: nothing below asks for it on a CPU, on MPS, or on a card older than Ampere.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..linears.fp8 import Fp8Linear, QuantizedTokens
from ..model import AutoEncoder, Flux, ae_ops
from ..model.ae_ops import AeOps
from ..model.ops import PLAIN, Ops
from ..terminal import note
from .attention import attention_for

__all__ = ["can_fuse", "fused_ops", "install", "install_decode"]

OLDEST = (8, 0)
"""compute capability from which bf16 is in hardware and the kernels are worth having"""


def can_fuse(device: torch.device | str) -> bool:
    """Whether Triton is here, and made for this device."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    if torch.version.hip:
        return False  # nobody has seen them there
    return torch.cuda.get_device_capability(device) >= OLDEST


@cache
def compiles(device: torch.device | str) -> bool:
    """Whether Triton does compile for it: tried on one small row, since it needs a C compiler and the driver, too."""
    x = torch.randn(1, 2, 16, dtype=torch.float32, device=device)
    row = torch.zeros(1, 1, 16, dtype=torch.float32, device=device)
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
    """Put the functions of that device into every part of a model that has any; returns those of its blocks.

    All blocks hold one and the same tuple, so compiled blocks of a kind go on sharing a graph (dynamo guards on its
    functions, which are module-level ones). Blocks that were compiled before compile once more at their next call.
    """
    device = torch.device(device)
    ops = blocks_ops = fused_ops(device)
    linears = [one for one in model.modules() if isinstance(one, Fp8Linear)]
    if ops is not PLAIN and linears and all(one.scales_on(device) for one in linears):
        blocks_ops, quantize = _of_rows()
        for one in linears:
            one.quantize = quantize
    blocks_ops = blocks_ops._replace(attend=attention_for(model, device))
    put(model, ops, blocks_ops)
    return blocks_ops


def put(model: Flux, ops: Ops, blocks_ops: Ops | None = None) -> None:
    """These functions into every part of a model, attention included; blocks may have others."""
    for part in model.modules():
        if hasattr(part, "ops"):
            part.ops = ops  # type: ignore[assignment]
    for block in (*model.double_blocks, *model.single_blocks):
        block.ops = blocks_ops or ops


def install_decode(ae: AutoEncoder, device: torch.device | str) -> AeOps:
    """Likewise the autoencoder's, which may be elsewhere yet; returned. Its weights then lie as cuDNN wants them."""
    if not (can_fuse(device) and compiles(device)):
        return ae_ops.PLAIN
    from .decode import OPS

    put_decode(ae, OPS)
    return OPS


def put_decode(ae: AutoEncoder, ops: AeOps) -> None:
    """These functions into every part of an autoencoder, and its weights with channels side by side."""
    ae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in ae.modules():
        if hasattr(part, "ops"):
            part.ops = ops  # type: ignore[assignment]


@cache
def _fused() -> Ops:
    from . import fused, products  # they define kernels, for which they need Triton

    twins = vars(fused) | vars(products)
    return PLAIN._replace(**{name: twins[name] for name in Ops._fields if name in twins})


@cache
def _of_rows() -> tuple[Ops, Callable[[Tensor], QuantizedTokens]]:
    """For blocks of Fp8Linears, and what quantizes the inputs that nothing else has quantized."""
    from . import quantized

    return _fused()._replace(
        modulate=quantized.modulate, mlp=quantized.mlp, linear1=PLAIN.linear1, linear2=quantized.linear2
    ), quantized.quantize
