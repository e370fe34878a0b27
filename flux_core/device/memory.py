"""How much memory a model takes: from its sizes, without loading it."""

import os
from contextlib import suppress
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from ..params import AutoEncoderParams, FluxParams
from ..request.generation import PATCH
from ..variants import Variant
from .threads import groups

if TYPE_CHECKING:
    import torch

BF16, FP32 = 2, 4
"""bytes of a number"""


def ram() -> int:
    """Bytes of this machine's memory, or of what its control groups (version 2) allow this process; 0 if unknown."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Windows
        return 0
    for group in groups("memory"):
        with suppress(OSError, ValueError):  # another version, or no limit
            sizes.append(int((group / "memory.max").read_text(encoding="ascii")))
    return min(sizes)


class Picture(NamedTuple):
    """What decides how much memory is at work."""

    width: int
    height: int
    rows: int = 1
    """of a batch"""
    tiled: bool = False
    """whether the autoencoder works in strips"""
    steps: int | None = None
    """by default the model's"""
    behind: int = 0
    """tokens of pictures that are seen beside it, and not decoded"""

    @property
    def tokens(self) -> int:
        """Of a row."""
        return -(-self.width // PATCH) * -(-self.height // PATCH) + self.behind

    def with_reference(self, variant: Variant) -> "Picture":
        """The same with one picture as a reference, where the model takes any."""
        takes = variant.takes
        sizes = takes.sizes or ((self.width, self.height),)
        seen = max(Picture(*size).tokens for size in sizes) if takes.references else takes.words_of_one
        return self._replace(behind=seen)


MEGAPIXEL = Picture(1024, 1024)


class Share(NamedTuple):
    """The memory that a part of a model takes, in bytes."""

    weights: int
    at_work: int
    """beside the weights, while it computes"""
    aside: int = 0
    """of the weights: the transformer's modulation, which never comes to the device with `--offload`"""


TEXT = 200_000_000
"""bytes at work in bf16 for 512 tokens of T5 1.1 XXL, as a plain encoder's shapes say"""
CACHED_PROMPTS = 64
"""prompts whose text tokens and vectors a pipeline keeps, where it computes"""


def shares(
    variant: Variant, dtype: str = "bfloat16", t5_dtype: str | None = None, kind: "torch.dtype | None" = None
) -> tuple[Share, Share, Share]:
    """Memory of text encoders, transformer and autoencoder, by the name of a precision, for a picture of a megapixel.

    t5_dtype: T5's, if it is another: a precision or a format. kind: as in `make_plan`.
    """
    from .alive import autoencoder_at_work, torch_dtype, transformer_at_work

    format = None if dtype in ("bfloat16", "float32") else dtype
    numbers = numbers_of(variant.params, variant.ae_params, format)
    kind = kind or torch_dtype(dtype)
    wide = kind.itemsize
    less = saved(format, wide) if format else 0.0
    t5_wide, t5_less = text_width(t5_dtype, wide)
    of_forward = transformer_at_work(variant.params, variant.max_text, MEGAPIXEL, kind)
    of_decoder = autoencoder_at_work(variant.ae_params, MEGAPIXEL, kind)
    return (
        Share(
            t5_wide * variant.t5_size.all - round(variant.t5_size.in_formats * t5_less) + wide * variant.clip_size.all,
            text_at_work(variant, t5_wide),
        ),
        Share(
            wide * numbers.all - round(less * numbers.in_format),
            of_forward,
            wide * numbers.modulation - round(less * numbers.modulation_in_format),
        ),
        Share(wide * numbers.autoencoder, of_decoder),
    )


def text_width(t5_dtype: str | None, wide: int) -> tuple[int, float]:
    """Bytes of T5's numbers, and those that a format saves of each, where the transformer's have so many."""
    if t5_dtype in ("float32", "bfloat16"):
        return (FP32 if t5_dtype == "float32" else BF16), 0.0
    return wide, saved(t5_dtype, wide) if t5_dtype else 0.0


def text_at_work(variant: Variant, wide: int) -> int:
    """Bytes that a text encoder holds beside weights, in numbers of so many bytes."""
    return TEXT * wide * variant.max_text * variant.params.context_in_dim // (BF16 * 512 * 4096)


def modulation_table(variant: Variant, picture: Picture, wide: int) -> int:
    """Bytes of the modulation of a picture's steps, computed ahead, in numbers of so many bytes."""
    modulated = numbers_of(variant.params, variant.ae_params, None).modulated
    return picture.rows * (picture.steps or variant.num_steps) * modulated * wide


def prompt_cache(variant: Variant, wide: int = BF16) -> int:
    """Bytes of a full `PromptCache`: T5's tokens and CLIP's vector of each prompt, in numbers of so many bytes."""
    params = variant.params
    return CACHED_PROMPTS * wide * (variant.max_text * params.context_in_dim + params.vec_in_dim)


def saved(format: str, wide: int) -> float:
    """Bytes that a format saves of a weight of so many."""
    from ..linears.formats import FORMATS

    return wide - FORMATS[format].bits / 8


class Numbers(NamedTuple):
    """How many a transformer has, and an autoencoder."""

    all: int
    in_linears: int
    """in weights of Linears"""
    widest: int
    """in one of these"""
    in_format: int
    """in those that a format stores in few bits"""
    modulation: int
    """in projections of modulation"""
    modulation_in_format: int
    modulated: int
    """that modulation computes for a step"""
    autoencoder: int


@cache
def numbers_of(params: FluxParams, ae_params: AutoEncoderParams, format: str | None) -> Numbers:
    """Counted on a network without weights."""
    from torch import nn

    from ..linears.formats import quantizable
    from ..model import MODULATION, AutoEncoder, Flux
    from ..model.shapes import without_weights

    flux, ae = without_weights(Flux, params), without_weights(AutoEncoder, ae_params)
    linears = {name: one for name, one in flux.named_modules() if isinstance(one, nn.Linear)}
    modulation = {name: one for name, one in linears.items() if name.endswith(MODULATION)}
    few = quantizable(flux, format) if format else {}
    return Numbers(
        all=sum(p.numel() for p in flux.parameters()),
        in_linears=sum(one.weight.numel() for one in linears.values()),
        widest=max(one.weight.numel() for one in linears.values()),
        in_format=sum(one.weight.numel() for one in few.values()),
        modulation=sum(p.numel() for one in modulation.values() for p in one.parameters()),
        modulation_in_format=sum(one.weight.numel() for name, one in modulation.items() if name in few),
        modulated=sum(one.out_features for one in modulation.values()),
        autoencoder=sum(p.numel() for p in ae.parameters()),
    )


def gb(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:.0f} MB"


def at_least(count: int) -> str:
    """Bytes in words that are no fewer."""
    return f"{ceil(count / 1e7) / 100:.2f} GB"
