"""What an official model takes in memory, and whether a device holds it: from its sizes alone, nothing is loaded."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from .params import AutoEncoderParams, FluxParams
from .variants import Variant

BF16, FP32 = 2, 4
"""bytes of a number"""
T5_XXL, CLIP_L = 4_762_310_656, 123_060_480
"""parameters of every official model's text encoders: T5 1.1 XXL without its decoder, CLIP ViT-L's text half"""


class Share(NamedTuple):
    """What a part of a model takes, in bytes."""

    weights: int
    at_work: int
    """beside them while it computes"""


TEXT, TRANSFORMER, AUTOENCODER = 200_000_000, 650_000_000, 1_650_000_000
"""bytes at work in bf16: what tensors are alive at once, at most, for a picture of a megapixel with 512 text tokens, as
the networks' own shapes say (tests/test_memory.py); 2048x2048 take four times that"""
LIBRARIES = 1_000_000_000
"""bytes that no tensor holds: CUDA's context and kernels, workspaces of cuBLAS and cuDNN, gaps in the allocator's
blocks; on the CPU Python and torch themselves. With half of it, which is little more than the context, it is a matter
of luck and of a screen that hangs on the same card: so it is with 24 GB and bf16 (huggingface/diffusers#11922)"""


def shares(variant: Variant) -> tuple[Share, Share, Share]:
    """Text encoders, transformer and autoencoder of an official model, in bf16."""
    flux, ae = _count(variant.params, variant.ae_params)
    return (
        Share(BF16 * (T5_XXL + CLIP_L), TEXT),
        Share(BF16 * flux, TRANSFORMER),
        Share(BF16 * ae, AUTOENCODER),
    )


@cache
def _count(params: FluxParams, ae_params: AutoEncoderParams) -> tuple[int, int]:
    """Parameters of transformer and autoencoder, built on the meta device: shapes without memory."""
    import torch

    from .model import AutoEncoder, Flux

    with torch.device("meta"):
        networks = Flux(params), AutoEncoder(ae_params)
    flux, ae = (sum(p.numel() for p in network.parameters()) for network in networks)
    return flux, ae


def fit(parts: Sequence[Share], memory: int, widths: Mapping[int, str], ram: int | None) -> str:
    """Whether a model can be drawn with in that memory, with as few flags as will do.

    parts: in bf16, all there at once or, with `--offload`, each in its turn. memory: the device's bytes. widths: bytes
    of a number -> the flag that asks for it, the device's own choice first. ram: the CPU's memory, where `--offload`
    keeps those whose turn it is not; None on the CPU itself. 0: not known.
    """
    if not memory:
        return "does not say its memory"
    weights, lack = sum(part.weights for part in parts), ""
    whole, largest = weights + max(part.at_work for part in parts), max(map(sum, parts))
    fits = (("fits", LIBRARIES), ("may just fit", LIBRARIES // 2))
    for (word, margin), offload, (width, flag) in product(fits, (False, True), widths.items()):
        kept = weights * width // BF16 + LIBRARIES
        if (offload and ram is None) or (largest if offload else whole) * width // BF16 + margin > memory:
            continue
        if offload and ram and kept > ram:
            lack = f" (--offload keeps {kept / 1e9:.1f} GB in the CPU's memory of {ram / 1e9:.1f} GB)"
            continue
        flags = " and ".join(filter(None, (flag, "--offload" if offload else "")))
        return f"{word}{'' if offload else ' whole'}{flags and ' with ' + flags}"
    return f"does not fit{lack}"
