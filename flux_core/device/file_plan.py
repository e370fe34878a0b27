"""A model in a budget of a CPU's memory: what is held, where Linears stay in their files (`linears/mapped.py`).

From shapes alone. What is mapped from a file is not counted: the system drops it when memory is short, and reads it
again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..variants import Variant
from .memory import (
    BF16,
    FP32,
    Picture,
    at_least,
    gb,
    modulation_table,
    numbers_of,
    prompt_cache,
    saved,
    text_at_work,
    text_width,
)
from .plan import line
from .rates import Rates

WORKSPACE = 100_000_000
"""bytes at work that no tensor holds: reordered inputs of convolutions, and gaps; 0.08 GB were seen"""
WIDENING = {"int8": 2.6, "fp8": 2.0, "nf4": 1.5, "gguf": 1.0}
"""times a wide weight that its widening holds, by format, measured for one of 21504 x 3072"""
JOINED = 2
"""the same for a weight of plain numbers, which may be joined of several"""
QUANTIZING = 4.1
"""times a weight in fp32 that its quantizing holds, for int8, which takes most"""


@dataclass(frozen=True)
class FilePlan:
    """Bytes of a CPU's memory."""

    budget: int
    all: int
    """that weights take which are loaded whole, with prompts that are encoded"""
    whole: bool
    """whether they are: there is room for them and for the largest picture"""
    held: int
    """the same otherwise: of weights outside of Linears, and codes that no file has"""
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
    def needed(self) -> int:
        """What a picture takes as the model is loaded."""
        return (self.all if self.whole else self.held) + self.at_work

    @property
    def fits(self) -> bool:
        return self.budget >= self.smallest


def make_file_plan(
    variant: Variant,
    budget: int,
    dtype: str,
    t5_dtype: str | None,
    picture: Picture,
    stored: tuple[bool, bool] = (False, False),
) -> FilePlan:
    """As `make_plan`. stored: whether codes of transformer and T5 in few bits are in files, not made when they load."""
    import torch

    from .alive import autoencoder_at_work, transformer_at_work

    format = None if dtype in ("bfloat16", "float32") else dtype
    wide = BF16 if dtype in ("bfloat16", "fp8") else FP32  # as `choice.pick_dtype` has it on a CPU
    kind = torch.bfloat16 if wide == BF16 else torch.float32
    t5_wide, _ = text_width(t5_dtype, wide)
    t5_format = None if t5_dtype in ("bfloat16", "float32") else t5_dtype
    t5, clip = variant.t5_size, variant.clip_size
    flux = numbers_of(variant.params, variant.ae_params, format)
    codes = [round(flux.in_format * _bytes(format)), round(t5.in_formats * _bytes(t5_format))]
    whole = wide * (flux.all - flux.in_format + clip.all + flux.autoencoder) + sum(codes)
    whole += t5_wide * (t5.all - (t5.in_formats if t5_format else 0))
    outside = t5_wide * (t5.all - t5.of_linears) + wide * (clip.all - clip.of_linears)
    outside += wide * (flux.all - flux.in_linears + flux.autoencoder)
    made = sum(size for size, there in zip(codes, stored, strict=True) if not there)
    largest = picture._replace(width=variant.max_side, height=variant.max_side)
    room = WORKSPACE + autoencoder_at_work(variant.ae_params, largest, kind)
    forward = transformer_at_work(variant.params, variant.max_text, picture, kind)
    forward += modulation_table(variant, picture, wide)
    widening = wide * flux.widest * WIDENING.get(format or "", JOINED)
    loading = QUANTIZING * FP32 * max(flux.widest if format else 0, t5.widest if t5_format else 0) if made else 0
    return FilePlan(
        budget=budget,
        all=whole + prompt_cache(variant, wide),
        whole=budget >= whole + room,
        held=outside + made + prompt_cache(variant, wide),
        text=text_at_work(variant, t5_wide) + round(t5_wide * t5.widest * WIDENING.get(t5_format or "", JOINED)),
        transformer=max(forward + round(widening), round(loading)),
        autoencoder=autoencoder_at_work(variant.ae_params, picture, kind),
    )


def _bytes(format: str | None) -> float:
    """Of a number in that format."""
    return BF16 - saved(format, BF16) if format else 0


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
