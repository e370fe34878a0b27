"""How much memory an official model takes, and whether it fits a device: from its sizes, without loading it."""

import os
from collections.abc import Mapping
from functools import cache
from itertools import product
from math import ceil
from typing import NamedTuple

from ..params import AutoEncoderParams, FluxParams
from ..variants import Variant

BF16, FP32 = 2, 4
"""bytes of a number"""


def ram() -> int:
    """Bytes of this machine's memory; 0 if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0


class Share(NamedTuple):
    """The memory that a part of a model takes, in bytes."""

    weights: int
    at_work: int
    """beside the weights, while it computes"""
    aside: int = 0
    """of the weights: the transformer's modulation, which never comes to the device with `--offload`"""


TEXT = 200_000_000
"""bytes at work in bf16 for 512 tokens of T5 1.1 XXL, as a plain encoder's shapes say"""
MEGAPIXEL = 1024, 1024
CACHED_PROMPTS = 64
"""prompts whose text tokens and vectors a pipeline keeps, where it computes"""
LIBRARIES = 1_000_000_000
"""bytes that no tensor holds: CUDA's context and kernels, workspaces of cuBLAS and cuDNN, gaps in the allocator's
blocks; on the CPU Python and torch themselves. With half of it, which is little more than the context, it is a matter
of luck and of a screen that hangs on the same card: so it is with 24 GB and bf16 (huggingface/diffusers#11922)"""


def shares(variant: Variant, dtype: str = "bfloat16", t5_dtype: str | None = None) -> tuple[Share, Share, Share]:
    """Memory of text encoders, transformer and autoencoder, by the name of a precision, for a picture of a megapixel.

    t5_dtype: T5's format, if its Linears are in one.
    """
    from .alive import autoencoder_at_work, torch_dtype, transformer_at_work

    format = None if dtype in ("bfloat16", "float32") else dtype
    flux, modulation, less, ae = _count(variant.params, variant.ae_params, format)
    kind = torch_dtype(dtype)
    wide = kind.itemsize
    t5_less = round(variant.t5_size.in_formats * saved(t5_dtype)) if t5_dtype else 0
    of_forward = transformer_at_work(variant.params, variant.max_text, *MEGAPIXEL, 1, kind)
    of_decoder = autoencoder_at_work(variant.ae_params, *MEGAPIXEL, kind, tiled=False)
    return (
        Share(wide * (variant.t5_size.all + variant.clip_size.all) - t5_less, text_at_work(variant, wide)),
        Share(wide * flux - less[0], of_forward, wide * modulation - less[1]),
        Share(wide * ae, of_decoder),
    )


def text_at_work(variant: Variant, wide: int) -> int:
    """Bytes that a text encoder holds beside weights, in numbers of so many bytes."""
    return TEXT * wide * variant.max_text * variant.params.context_in_dim // (BF16 * 512 * 4096)


def prompt_cache(variant: Variant, dtype: str = "bfloat16") -> int:
    """Bytes of a full `PromptCache`: T5's tokens and CLIP's vector of each prompt."""
    params, wide = variant.params, FP32 if dtype == "float32" else BF16
    return CACHED_PROMPTS * wide * (variant.max_text * params.context_in_dim + params.vec_in_dim)


def saved(format: str) -> float:
    """Bytes that a format saves of a weight in bf16."""
    from ..linears.formats import FORMATS

    return BF16 - FORMATS[format].bits / 8


@cache
def _count(
    params: FluxParams, ae_params: AutoEncoderParams, format: str | None
) -> tuple[int, int, tuple[int, int], int]:
    """Numbers of parameters of transformer, its modulation and autoencoder; third, the bytes that a format saves, of
    bf16's, of the transformer and of its modulation.

    Built on the meta device: shapes without memory.
    """
    import torch
    from torch import nn

    from ..linears.formats import quantizable
    from ..model import MODULATION, AutoEncoder, Flux

    with torch.device("meta"):
        flux, ae = Flux(params), AutoEncoder(ae_params)
    linears = {name: one for name, one in flux.named_modules() if isinstance(one, nn.Linear)}
    modulation = sum(p.numel() for name, one in linears.items() if name.endswith(MODULATION) for p in one.parameters())
    of_all, of_modulation = 0, 0
    for name, one in quantizable(flux, format).items() if format else ():
        less = round(one.weight.numel() * saved(format))  # type: ignore[arg-type]
        of_all += less
        of_modulation += less if name.endswith(MODULATION) else 0
    whole_flux, whole_ae = (sum(p.numel() for p in network.parameters()) for network in (flux, ae))
    return whole_flux, modulation, (of_all, of_modulation), whole_ae


def fit(variant: Variant, memory: int, dtypes: Mapping[str, str], ram: int | None) -> str:
    """Whether a model fits that memory, in words, with the fewest flags that make it fit.

    memory: the device's bytes. dtypes: those that it computes in -> the flag that asks for it, the device's own choice
    first. ram: bytes of the CPU's memory, where `--offload` keeps the parts that wait; None on the CPU itself. 0 is an
    unknown size.
    """
    if not memory:
        return "does not say its memory"
    lack = ""
    for sure, (dtype, flag), small_t5, offload in product((True, False), dtypes.items(), (False, True), (False, True)):
        if small_t5 and dtype in ("bfloat16", "float32"):
            continue
        # a cache of prompts is full only after 64 of them
        margin = LIBRARIES + prompt_cache(variant, dtype) if sure else LIBRARIES // 2
        parts = shares(variant, dtype, dtype if small_t5 else None)
        weights = sum(part.weights for part in parts)
        whole = weights + max(part.at_work for part in parts)
        largest = max(part.weights - part.aside + part.at_work for part in parts)
        if (offload and ram is None) or (largest if offload else whole) + margin > memory:
            continue
        if offload and ram and weights + LIBRARIES > ram:
            kept = (weights + LIBRARIES) / 1e9
            lack = f" (--offload keeps {kept:.1f} GB in the CPU's memory of {ram / 1e9:.1f} GB)"
            continue
        flags = " and ".join(filter(None, (flag, f"--t5-dtype {dtype}" * small_t5, "--offload" * offload)))
        word = "fits" if sure else "may just fit"
        return f"{word}{'' if offload else ' whole'}{flags and ' with ' + flags}"
    return f"does not fit{lack}"


def gb(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.0f} MB"


def at_least(count: int) -> str:
    """Bytes in words that are no fewer."""
    return f"{ceil(count / 1e7) / 100:.2f} GB"
