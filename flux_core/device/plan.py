"""What a model in a budget of memory would look like: what lies where, and how long a step takes at least.

From shapes alone: no weights, no card. A step takes its products or its copies, whichever is longer, since blocks are
copied while others compute (`pipeline/stream.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ..params import FluxParams
from ..variants import Variant
from .budget import CONTEXT
from .memory import Picture, Share, at_least, gb, modulation_table, saved, shares, text_width
from .rates import Rates

if TYPE_CHECKING:
    import torch

SLOTS = 2
"""buffers through which blocks come and go"""
GAPS = 250_000_000
"""bytes at work that no tensor holds: workspaces of cuBLAS and cuDNN, and gaps in the allocator's pieces"""
LARGE_SIDE = 2048
"""pixels of a picture's side for which there has to be room beside weights that all stay, if a model draws that"""


@dataclass(frozen=True)
class Network:
    """A transformer's blocks by their shapes."""

    sizes: tuple[int, ...]
    """bytes of each block without its modulation"""
    tokens_flops: tuple[float, float]
    """floating point operations of a step for each image token, and for each text token, but for attention"""

    @property
    def largest(self) -> int:
        return max(self.sizes)


@dataclass(frozen=True)
class Plan:
    """A model in a budget; bytes."""

    budget: int
    """on the device, with `CONTEXT`"""
    text: Share
    text_least: int
    """that text encoders take while they compute with T5 in pieces"""
    transformer: Share
    autoencoder: Share
    outside: int
    """of the transformer's weights: neither in blocks nor modulation"""
    blocks: tuple[int, ...]
    resident: tuple[int, ...]
    """numbers of the blocks that stay"""
    slots: int
    """buffers for the others, as large as the largest block"""
    at_work: int
    """of a forward, beside weights"""
    tera: float
    """of floating point operations of a step, 10^12"""

    @property
    def streamed(self) -> int:
        """Bytes that come to the device at each step."""
        return sum(size for i, size in enumerate(self.blocks) if i not in self.resident)

    @property
    def fits(self) -> bool:
        """Whether a picture can be drawn."""
        return self.budget >= self.smallest

    @property
    def smallest(self) -> int:
        """The least budget in which a text can be encoded, a step computed, and a picture decoded in one piece."""
        step = self.outside + self.at_work + max(self.blocks)
        return CONTEXT + max(self.text_least, step, self.autoencoder.weights + self.autoencoder.at_work)

    @property
    def home(self) -> int:
        """Bytes of the CPU's memory that hold all weights."""
        return self.text.weights + self.transformer.weights + self.autoencoder.weights

    def seconds(self, tera_rate: float, copy_rate: float) -> float:
        """The least time of a step, by 10^12 operations and bytes a second."""
        return max(self.tera / tera_rate, self.streamed / copy_rate)


def make_plan(
    variant: Variant,
    budget: int,
    dtype: str,
    t5_dtype: str | None,
    picture: Picture,
    kind: "torch.dtype | None" = None,
) -> Plan:
    """The plan of a picture.

    dtype: of the transformer, a precision or a format; t5_dtype: likewise T5's, if it is another. kind: what all but
    Linears in few bits are in; by default as on a card that has bfloat16.
    """
    from .alive import autoencoder_at_work, torch_dtype, transformer_at_work

    kind = kind or torch_dtype(dtype)
    text, transformer, autoencoder = shares(variant, dtype, t5_dtype, kind)
    network = _network(variant.params, dtype, kind.itemsize)
    of_decoder = autoencoder_at_work(variant.ae_params, picture, kind)
    autoencoder = autoencoder._replace(at_work=GAPS + of_decoder)
    of_forward = transformer_at_work(variant.params, variant.max_text, picture, kind)
    at_work = GAPS + of_forward + modulation_table(variant, picture, kind.itemsize)
    image, tokens = picture.tokens, picture.tokens + variant.max_text
    outside = transformer.weights - transformer.aside - sum(network.sizes)
    room = budget - CONTEXT - outside - at_work
    slots, resident = 0, spread(network.sizes, room)
    if len(resident) < len(network.sizes):
        slots = max(0, min(SLOTS, room // network.largest))
        resident = spread(network.sizes, room - slots * network.largest) if slots else []
    of_image, of_text = network.tokens_flops
    flops = image * of_image + variant.max_text * of_text
    flops += 4 * tokens**2 * variant.params.hidden_size * len(network.sizes)
    t5, wide = variant.t5_size, kind.itemsize
    t5_wide, less = text_width(t5_dtype, wide)
    t5_block = round(t5_wide * t5.of_linears - less * t5.in_formats) // t5.blocks
    text_least = t5_wide * (t5.all - t5.of_linears) + wide * variant.clip_size.all + t5_block + text.at_work + GAPS
    return Plan(
        budget,
        text,
        min(text_least, text.weights + text.at_work + GAPS),
        transformer,
        autoencoder,
        outside,
        network.sizes,
        tuple(resident),
        slots,
        at_work,
        picture.rows * flops / 1e12,
    )


def is_whole(
    variant: Variant,
    budget: int,
    dtype: str,
    t5_dtype: str | None,
    t5_comes: bool = True,
    kind: "torch.dtype | None" = None,
) -> bool:
    """Whether all parts may stay in so many bytes, with room for a large picture.

    dtype, t5_dtype, kind: as in `make_plan`. t5_comes: whether text is encoded on the device.
    """
    side = min(LARGE_SIDE, variant.max_side)
    plan = make_plan(variant, budget, dtype, t5_dtype, Picture(side, side).with_reference(variant), kind)
    at_work = max(plan.text.at_work, plan.at_work, plan.autoencoder.at_work)
    return plan.home - (0 if t5_comes else plan.text.weights) + at_work <= budget


@cache
def _network(params: FluxParams, dtype: str, wide: int) -> Network:
    """Counted on a network without weights."""
    from torch import nn

    from ..linears.formats import quantizable
    from ..model import MODULATION, Flux
    from ..model.shapes import without_weights

    model = without_weights(Flux, params)
    few = quantizable(model, dtype) if dtype not in ("bfloat16", "float32") else {}
    sizes, of_image, of_text = [], 0.0, 0.0
    for kind in ("double_blocks", "single_blocks"):
        for i, block in enumerate(getattr(model, kind)):
            size = 0.0
            for name, layer in block.named_modules(prefix=f"{kind}.{i}"):
                if name.endswith(MODULATION):
                    continue
                size += wide * sum(x.numel() for x in layer.parameters(recurse=False))
                size -= saved(dtype, wide) * layer.weight.numel() if name in few else 0
                if isinstance(layer, nn.Linear):
                    flops = 2.0 * layer.weight.numel()
                    of_image += 0 if ".txt_" in name else flops
                    of_text += 0 if ".img_" in name else flops
            sizes.append(round(size))
    return Network(tuple(sizes), (of_image, of_text))


def describe(plan: Plan, steps: int, rates: Rates | None, others: Mapping[str, Plan]) -> Iterator[str]:
    """Lines for people. rates: of the card, if there is one; others: plans by other values of --dtype."""
    text, network = plan.text, plan.transformer
    whole = text.weights + text.at_work <= plan.budget - CONTEXT
    yield line("text encoders", f"{gb(text.weights)}: {'whole' if whole else 'blocks of T5 come when they compute'}")
    parts = f"{gb(network.aside)} of modulation stay on the CPU, {gb(plan.outside)} are outside blocks"
    yield line("transformer", f"{gb(network.weights)}: {parts}, {gb(sum(plan.blocks))} in {len(plan.blocks)} blocks")
    yield line("", _of_blocks(plan))
    yield line("a forward", f"{gb(plan.at_work)} beside weights")
    yield line("autoencoder", f"{gb(plan.autoencoder.weights)}, and {gb(plan.autoencoder.at_work)} at work")
    yield line("smallest", f"{at_least(plan.smallest)}, of which {gb(CONTEXT)} are CUDA's own")
    yield line("CPU memory", f"{gb(plan.home)} for all weights, at their turn on the card")
    work = f"{plan.tera:.0f} * 10^12 operations, {gb(plan.streamed)} copied"
    if rates is None:
        yield line("a step", f"{work}; seconds are measured where the card is")
    elif plan.fits:
        step = plan.seconds(rates.tera, rates.copy)
        speed = f"{rates.tera:.0f} * 10^12 operations and {rates.copy / 1e9:.1f} GB a second here, in bf16"
        yield line("a step", f"{work}: at least {step:.2f} s, {steps} steps {steps * step:.0f} s ({speed})")
    for dtype, other in others.items():
        if other.fits and (other.streamed < plan.streamed or not plan.fits):
            yield line("less to copy", f"--dtype {dtype}: {_of_blocks(other)}")


def _of_blocks(plan: Plan) -> str:
    """Which blocks stay on the card, in words."""
    number, stay = len(plan.blocks), len(plan.resident)
    if not plan.fits:
        return f"too little: it takes at least {at_least(plan.smallest)}"
    if stay == number:
        return "all blocks stay on the card"
    through = f"{plan.slots} buffer{'s' * (plan.slots > 1)} of {gb(max(plan.blocks))}"
    return f"{stay} of {number} blocks stay on the card, the others, {gb(plan.streamed)}, come through {through}"


def line(title: str, text: str) -> str:
    return f"{title:<14}{text}"


def spread(sizes: Sequence[int], room: int) -> list[int]:
    """Numbers of the blocks that stay in so many bytes, so that the bytes of the others come evenly over time.

    Each block takes about the same time, whatever its bytes: a double block's weights see either image or text tokens.
    """
    come, came, used, stay = sum(sizes) - room, 0, 0, []
    for i, size in enumerate(sizes):
        if used + size > room or (came + size) * len(sizes) <= come * (i + 1):
            came += size
        else:
            stay.append(i)
            used += size
    for i in set(range(len(sizes))) - set(stay):  # what is left may be enough for a smaller one
        if used + sizes[i] <= room:
            stay.append(i)
            used += sizes[i]
    return sorted(stay)
