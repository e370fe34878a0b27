"""Fast versions of `model/ops` and `model/ae_ops` for devices that Triton compiles for, installed at load time.

A block calls `self.ops`, a static tuple of functions. It is chosen here, once, by what the device supports;
`tests/kernels` compares each with the plain one. Triton is imported only where it is used: never on a CPU, on MPS, or
on a card older than Ampere.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import nn

from ..errors import is_out_of_memory
from ..linears.branch import THIN, BranchedLinear, Thin
from ..linears.formats import FORMATS
from ..model import AutoEncoder, Flux, ae_ops
from ..model.ae_ops import AeOps
from ..model.ops import PLAIN, Ops
from ..model.transformer import Backbone
from ..terminal import note
from .attention import attention_for, in_eight_bits, name_of, pick_attention

__all__ = ["accelerate", "can_fuse", "describe", "fused_ops", "install", "install_decode", "pick_attention"]

OLDEST = (8, 0)
"""the lowest compute capability with bf16 in hardware, where the kernels pay"""


def can_fuse(device: torch.device | str) -> bool:
    """Whether Triton is installed and supports this device."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    if torch.version.hip:
        return False  # not tested there
    return torch.cuda.get_device_capability(device) >= OLDEST


@cache
def compiles(device: torch.device | str) -> bool:
    """Whether Triton compiles for the device: tried on one small row, since it needs a C compiler and the driver, too.

    Running out of memory in the trial is raised and not cached: the next call tries again.
    """
    row = torch.linspace(-1, 1, 16, dtype=torch.float32, device=device).expand(1, 1, 16)
    try:
        ours, plain = (ops.modulate(row, row, row) for ops in (_triton(), PLAIN))
        return torch.allclose(ours, plain, atol=1e-5)
    except Exception as error:  # Triton's own, its compiler's, the driver's
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:120]
        note(f"Triton does not compile here ({type(error).__name__}: {reason}): plain functions take its place, slower")
        return False


def fused_ops(device: torch.device | str) -> Ops:
    """The fastest functions for the device: the fused ones, or PLAIN."""
    return _triton() if can_fuse(device) and compiles(device) else PLAIN


def install(model: Backbone, device: torch.device | str, attention: str = "exact") -> Ops:
    """Set the functions for that device in every part of a model that has `ops`; returns them.

    attention: as `pick_attention` returns it.

    Running out of memory in the choice is raised. All blocks get the same tuple, so compiled blocks of a kind still
    share a graph (dynamo guards on its functions, which are the same objects). Blocks that were compiled before compile
    once more at their next call.
    """
    device = torch.device(device)
    ops = fused_ops(device)
    if ops is not PLAIN:
        found = accelerate(model, device)
        ops = next((of_tokens() for name, of_tokens in _OPS.items() if name in found), ops)
        THIN[device.type] = _triton_thin()
        for layer in model.modules():
            if isinstance(layer, BranchedLinear):
                layer.prepare()
    ops = ops._replace(attend=attention_for(model, device))
    if attention != "exact":
        ops = in_eight_bits(ops, attention)
    put(model, ops)
    return ops


def accelerate(model: nn.Module, device: torch.device | str) -> list[str]:
    """Give layers in few bits the kernels of their formats. Returns the formats whose layers have kernels now."""
    device, found = torch.device(device), dict.fromkeys(FORMATS, False)
    if fused_ops(device) is PLAIN:
        return []
    for layer in model.modules():
        for name, format in FORMATS.items():
            if isinstance(layer, format.kind) and (name not in _OPS or layer.scales_on(device)):
                found[name] = True
                for attribute, kernel in _kernels(name).items():
                    setattr(layer, attribute, kernel)
    return [name for name, has in found.items() if has]


def put(model: nn.Module, ops: Ops | AeOps) -> None:
    """Set these functions in every part of a model that has `ops` of their kind."""
    for part in model.modules():
        if isinstance(getattr(part, "ops", None), type(ops)):
            part.ops = ops  # type: ignore[assignment]


KERNELS = {
    PLAIN.modulate.__module__: "plain",
    f"{__name__}.fused": "triton",
    f"{__name__}.quantized": "triton fp8",
    f"{__name__}.int8": "triton int8",
}
"""names of tuples of functions, by the module of their `modulate`"""


def describe(model: Flux) -> dict[str, str]:
    """The names of the blocks' functions: `attention`, a key of `attention.BACKENDS` or `EIGHT`, and `kernels`, a
    value of `KERNELS`.

    "other" if they are not ours. The last bits of a picture depend on both.
    """
    ops = next(found for part in model.modules() if isinstance(found := getattr(part, "ops", None), Ops))
    return {
        "attention": name_of(ops.attend),
        "kernels": KERNELS.get(ops.modulate.__module__, "other"),
    }


def install_decode(ae: AutoEncoder, device: torch.device | str) -> AeOps:
    """`install` for the autoencoder, which may still be on another device. Its weights become channels_last."""
    if not (can_fuse(device) and compiles(device)):
        return ae_ops.PLAIN
    from .decode import OPS

    put_decode(ae, OPS)
    return OPS


def put_decode(ae: AutoEncoder, ops: AeOps) -> None:
    """Set these functions in every part of an autoencoder, and make its weights channels_last, as cuDNN wants them."""
    ae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    put(ae, ops)


@cache
def _triton() -> Ops:
    from . import fused, products  # which import Triton

    return PLAIN._replace(
        modulation=products.modulation,
        modulate=fused.modulate,
        gated_sum=fused.gated_sum,
        norm_rope=fused.norm_rope,
        norm_rope_join=fused.norm_rope_join,
        mlp=products.mlp,
        linear1=products.linear1,
        linear2=products.linear2,
    )


@cache
def _triton_fp8() -> Ops:
    """The same for models with layers that take tokens in e4m3."""
    from . import quantized

    return _triton()._replace(modulate=quantized.modulate, mlp=quantized.mlp, linear2=quantized.linear2)


@cache
def _triton_int8() -> Ops:
    """The same for models with layers that take tokens in int8, or some in e4m3."""
    from . import int8

    return _triton()._replace(modulate=int8.modulate, mlp=int8.mlp, linear2=int8.linear2)


_OPS: dict[str, Callable[[], Ops]] = {"int8": _triton_int8, "fp8": _triton_fp8}
"""functions for formats whose layers take quantized tokens; those of the first also serve the next"""


@cache
def _kernels(format: str) -> dict[str, Callable[..., object]]:
    """What kernels replace of a format's layers, by the attribute's name."""
    from . import gguf, int8, int8_product, nf4, quantized

    found: dict[str, dict[str, Callable[..., object]]] = {
        "fp8": {"quantize": quantized.quantize},
        "int8": {"quantize": int8.quantize, "product": int8_product.product},
        "nf4": {"unpack": nf4.unpack},
        "gguf": {"unpack": gguf.unpack},
    }
    return found[format]


@cache
def _triton_thin() -> Thin:
    """The functions for low-rank branches beside a layer, of these models and of those attached later."""
    from . import quantized, thin

    return Thin(quantized.quantize_wide, thin.MOST_RANKS)
