"""What a run will take, from shapes alone: memory of the card, disk, and the least time of a step."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..device.alive import torch_dtype, transformer_at_work
from ..device.budget import CONTEXT
from ..device.memory import Picture, gb, shares
from ..device.plan import GAPS, SLOTS, make_plan
from ..model import Flux
from ..model.shapes import without_weights
from ..params import FluxParams
from ..variants import Variant
from .adapter import Form, adapt, matching
from .recompute import WAYS, differentiable

STATES = {"adamw": 16, "adamw8bit": 10, "prodigy": 24, "adamw_schedulefree": 16}
"""bytes of a number that learns: itself and its gradient in fp32, and what the optimizer remembers of it"""
WHOLE = 2
"""blocks of a spread base that are whole at a time: one computes, the next one comes"""


class Kept(NamedTuple):
    """Bytes that a forward keeps for its backward."""

    all: int
    of_a_block: int
    """that is computed again, while its gradient is computed"""


class Plan(NamedTuple):
    """A run in numbers; bytes, and 10^12 floating point operations."""

    text: int
    """of the card, while captions are encoded"""
    weights: int
    """of the frozen transformer"""
    blocks: int
    """of them those in blocks, without modulation"""
    largest: int
    """block"""
    learning: int
    """of the factors, their gradients and moments"""
    kept: int
    at_work: int
    tera: float
    """of a step"""
    numbers: int
    """that learn"""

    @property
    def needed(self) -> int:
        """Of the card, with all blocks on it."""
        return CONTEXT + max(self.text, self.weights + self.learning + self.kept + self.at_work)

    @property
    def streamed(self) -> int:
        """Of the card, with blocks that come when they compute: the least."""
        beside = self.weights - self.blocks + SLOTS * self.largest
        return CONTEXT + max(self.text, beside + self.learning + self.kept + self.at_work)

    def lines(self, device: str, seconds: float | None, steps: int) -> list[str]:
        """For people. seconds: of a step, if it can be told."""
        needed = self.needed if device == "cuda" else self.needed - CONTEXT
        found = [
            f"memory of {device}: {gb(needed)} (weights {gb(self.weights)}, kept for gradients {gb(self.kept)}, at "
            f"work {gb(self.at_work)}, {self.numbers / 1e6:.1f} million numbers that learn {gb(self.learning)})",
        ]
        if seconds is not None:
            found.append(f"time: at least {seconds:.2f} s a step, {told(seconds * steps)} for {steps} steps")
        return found


def told(seconds: float) -> str:
    """A time for people."""
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.0f} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )


def plan_of(
    variant: Variant, size: tuple[int, int], dtype: str, t5_dtype: str | None, patterns: list[str], rank: int,
    batch: int, accumulation: int, checkpointing: str, optimizer: str, lokr: int = 0,
    ranks: Mapping[str, int] | None = None, forwards: tuple[int, int] = (1, 0), shards: int = 1,
) -> Plan:  # fmt: skip
    """The plan of steps of the largest size, width and height. dtype: of the frozen base; lokr, ranks: as in `Form`;
    forwards: of a micro-batch, those that are learned from, and frozen ones; shards: processes over which the base is
    spread. UsageError for patterns."""
    picture, kind = Picture(*size, batch), torch_dtype(dtype)
    _, transformer, _ = shares(variant, dtype, t5_dtype)
    forward = make_plan(variant, 0, dtype, t5_dtype, picture)
    numbers = count(variant.params, patterns, Form(rank, rank, lokr=lokr, ranks=ranks or {}))
    most = max([rank, *(ranks or {}).values()])
    kept = kept_of(variant.params, picture.tokens, variant.max_text, batch, kind, checkpointing, patterns, most, lokr)
    way = WAYS[checkpointing]
    again = sum(way.block(i) for i in range(10)) / 10 - (0.2 if way.attention else 0.0) - (0.3 if way.heads else 0.0)
    return Plan(
        text=forward.text_least,
        weights=transformer.weights if shards == 1 else transformer.weights // shards + WHOLE * max(forward.blocks),
        blocks=sum(forward.blocks),
        largest=max(forward.blocks),
        learning=STATES[optimizer] * numbers,
        kept=kept.all,
        at_work=GAPS + kept.of_a_block + transformer_at_work(variant.params, variant.max_text, picture, kind),
        tera=forward.tera * accumulation * (forwards[0] * (2 + again) + forwards[1]),
        numbers=numbers,
    )


def count(params: FluxParams, patterns: list[str], form: Form) -> int:
    """The numbers that learn for these patterns, but for DoRA's magnitudes. UsageError."""
    from ..lora.dialects import Table, flat

    table, found = Table(params), 0
    for name in matching(params, patterns):
        target = table.linears[flat(name)]
        found += form.numbers(name, target.stop - target.start, table.shapes[f"{target.module}.weight"][1])
    return found


def kept_of(
    params: FluxParams, image: int, text: int, batch: int, kind: torch.dtype, checkpointing: str, patterns: list[str],
    rank: int, lokr: int = 0,
) -> Kept:  # fmt: skip
    """What a forward of so many tokens keeps, counted on the meta device, where attention keeps no table of all pairs.

    Blocks that are compiled keep up to a fifth less.
    """
    names = {re.sub(r"blocks\.\d+\.", "blocks.0.", name) for name in matching(params, patterns)}
    small = without_weights(Flux, replace(params, depth=1, depth_single_blocks=1)).to(kind)
    adapt(small, names, rank, rank, lokr=lokr)
    dim, tokens = params.hidden_size, image + text
    pe = torch.empty(1, 1, tokens, params.head_dim // 2, 2, 2, dtype=torch.float32, device="meta")
    way, total, largest = WAYS[checkpointing], 0, 0

    def inputs(*lengths: int) -> list[Tensor]:
        return [torch.empty(batch, n, dim, dtype=kind, device="meta", requires_grad=True) for n in lengths]

    with torch.device("meta"), differentiable(small, "none"), KeptAttention():
        vec = torch.empty(batch, dim, dtype=kind, device="meta")
        for blocks, depth, given in (
            (small.double_blocks, params.depth, inputs(image, text)),
            (small.single_blocks, params.depth_single_blocks, inputs(tokens)),
        ):
            block: Any = blocks[0]
            sets = block.modulation(vec)
            whole = saved_by(partial(block, *given, *sets, pe), small)
            least = way.sizes * sum(x.nbytes for x in given)
            again = sum(way.block(i) for i in range(depth))
            total += again * least + (depth - again) * max(whole, least)
            largest = max(largest, whole if again else 0)
    return Kept(total, largest)


def saved_by(compute: Callable[[], object], model: nn.Module) -> int:
    """Bytes of tensors that autograd keeps of a computation, but for a model's own."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if (key := x.untyped_storage()._cdata) not in own:
            found[key] = x
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = compute()
        del result
    return sum(x.untyped_storage().nbytes() for x in found.values())


class KeptAttention(TorchFunctionMode):
    """Keeps what the kernels keep: q, k, v and the output."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Kept.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Kept(torch.autograd.Function):
    """Has no backward: what it would need is only counted."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out
