"""A model in a budget of a CPU's memory: what is held, where Linears stay in their files (`linears/mapped.py`).

From shapes alone. What is mapped from a file is not counted: the system drops it when memory is short, and reads it
again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ..params import AutoEncoderParams, FluxParams
from ..variants import Variant
from .memory import BF16, FP32, at_least, gb, prompt_cache, saved, text_at_work
from .plan import LARGE_SIDE, line
from .rates import Rates

WORKSPACE = 100_000_000
"""bytes at work that no tensor holds: reordered inputs of convolutions, and gaps; 0.08 GB were seen"""


@dataclass(frozen=True)
class FilePlan:
    """Bytes of a CPU's memory."""

    budget: int
    all: int
    """that weights take which are loaded whole"""
    whole: bool
    """whether they are: there is room for them and for a large picture"""
    held: int
    """otherwise, with prompts that are encoded: weights outside of Linears, and codes that no file has"""
    text: int
    transformer: int
    autoencoder: int
    """each at work, with the widest weight of a Linear in the dtype of the tokens"""

    @property
    def at_work(self) -> int:
        """At most."""
        return WORKSPACE + max(self.text, self.transformer, self.autoencoder)

    @property
    def smallest(self) -> int:
        """The least budget in which a picture can be drawn."""
        return self.held + self.at_work

    @property
    def fits(self) -> bool:
        return self.budget >= self.smallest


@dataclass(frozen=True)
class _Numbers:
    """How many a network has."""

    all: int
    of_linears: int
    widest: int
    """of one Linear"""
    in_format: int
    modulation: int
    """of a step"""


def make_file_plan(
    variant: Variant,
    budget: int,
    dtype: str,
    t5_dtype: str | None,
    width: int,
    height: int,
    rows: int = 1,
    tiled: bool = False,
    stored: tuple[bool, bool] = (False, False),
) -> FilePlan:
    """As `make_plan`. stored: whether codes of transformer and T5 in few bits are in files, not made when they load."""
    import torch

    from .alive import autoencoder_at_work, transformer_at_work

    wide = BF16 if dtype == "bfloat16" else FP32
    kind = torch.bfloat16 if wide == BF16 else torch.float32
    format = None if dtype in ("bfloat16", "float32") else dtype
    t5, clip = variant.t5_size, variant.clip_size
    flux, ae = _numbers(variant.params, format), _of_autoencoder(variant.ae_params)
    codes = [round(flux.in_format * _bytes(format)), round(t5.in_formats * _bytes(t5_dtype))]
    wider = t5.all + clip.all + flux.all + ae - flux.in_format - (t5.in_formats if t5_dtype else 0)
    whole = wide * wider + sum(codes)
    outside = sum(one.all - one.of_linears for one in (t5, clip, flux)) + ae
    image = variant.params, variant.max_text, width, height
    table = rows * variant.num_steps * flux.modulation * wide
    of_decoder = autoencoder_at_work(variant.ae_params, width, height, kind, tiled)
    side = min(LARGE_SIDE, variant.max_side)
    room = WORKSPACE + autoencoder_at_work(variant.ae_params, side, side, kind, tiled)
    return FilePlan(
        budget=budget,
        all=whole,
        whole=budget >= whole + room,
        held=wide * outside
        + prompt_cache(variant, dtype)
        + sum(size for size, there in zip(codes, stored, strict=True) if not there),
        text=text_at_work(variant, wide) + wide * t5.widest,
        transformer=transformer_at_work(*image, rows, kind) + table + wide * flux.widest,
        autoencoder=of_decoder,
    )


def _bytes(format: str | None) -> float:
    """Of a number in that format."""
    return BF16 - saved(format) if format else 0


@cache
def _numbers(params: FluxParams, format: str | None) -> _Numbers:
    """Of a transformer, built on the meta device."""
    import torch
    from torch import nn

    from ..linears.formats import quantizable
    from ..model import MODULATION, Flux

    with torch.device("meta"):
        model = Flux(params)
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    few = quantizable(model, format) if format else {}
    return _Numbers(
        all=sum(x.numel() for x in model.parameters()),
        of_linears=sum(one.weight.numel() for one in linears.values()),
        widest=max(one.weight.numel() for one in linears.values()),
        in_format=sum(one.weight.numel() for one in few.values()),
        modulation=sum(one.out_features for name, one in linears.items() if name.endswith(MODULATION)),
    )


@cache
def _of_autoencoder(params: AutoEncoderParams) -> int:
    import torch

    from ..model import AutoEncoder

    with torch.device("meta"):
        return sum(x.numel() for x in AutoEncoder(params).parameters())


def describe(plan: FilePlan, steps: int, tera: float, rates: Rates | None) -> Iterator[str]:
    """Lines for people. tera: of floating point operations of a step; rates: of this CPU, if it is the one."""
    yield line("weights", f"{gb(plan.all)} in memory" if plan.whole else _of_files(plan))
    yield line("at work", f"{gb(plan.at_work)} at most: {_of_parts(plan)}, and {gb(WORKSPACE)} that no tensor holds")
    yield line("smallest", at_least(plan.smallest))
    if not plan.fits:
        yield line("", f"too little: it takes at least {at_least(plan.smallest)}")
    elif rates is None:
        yield line("a step", f"{tera:.2g} * 10^12 operations; seconds are measured where the CPU is")
    else:
        step, speed = tera / rates.tera, f"{rates.tera:.2g} * 10^12 a second here"
        seconds = f"at least {step:.2g} s, {steps} steps {steps * step:.3g} s"
        yield line("a step", f"{tera:.2g} * 10^12 operations: {seconds} ({speed})")


def _of_files(plan: FilePlan) -> str:
    """Where weights are, in words."""
    how = "Linears mapped from their files and widened for each product"
    return f"{gb(plan.held)} in memory, {how} (whole: {gb(plan.all)})"


def _of_parts(plan: FilePlan) -> str:
    return f"text encoders {gb(plan.text)}, transformer {gb(plan.transformer)}, autoencoder {gb(plan.autoencoder)}"
