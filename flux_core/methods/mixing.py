"""A type of GGUF for each block, under a budget of bytes: `save --dtype mixed --budget 7GB`.

The idea. Errors that blocks make in the velocity are small and have little to do with each other, so their squares add
up nearly. So each block is measured alone: in each type, at latents of a few pictures, everything else as it is. Which
types to take is then a knapsack with one choice for each block (Nauss 1978), solved by dynamic programming over bytes.

An importance study may weight the blocks: an error in a block whose absence changes the picture more counts more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..checkpoint.layouts import gguf_type
from ..checkpoint.names import network_shapes
from ..errors import UsageError
from ..hooks.sites import block_names
from ..jsonfile import read_json
from ..linears.gguf import PACK, GgufLinear
from ..linears.gguf_types import is_whole, size_of
from ..params import FluxParams
from ..pipeline import Pipeline
from ..request.generation import GenerationRequest
from ..terminal import no_bars
from .calibration import trajectories, velocities

KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16")
"""types to choose from, from small to large; each has less error than those before"""
GRAINS = 8192
"""in which bytes above the smallest file are counted; a block's are rounded up"""
ENTRY = 128
"""bytes at most that a file needs for a tensor beside its numbers"""

Table = Mapping[str, Mapping[str, float]]
"""a number for each block and type"""


@dataclass(frozen=True)
class Mix:
    """A type for each block."""

    kinds: Mapping[str, str]
    bytes: int
    """of the file"""
    error: float
    """of the velocity, squared and relative, if blocks' errors add up; weighted, where they are"""


def choose(errors: Table, sizes: Table, rest: int, budget: int) -> Mix:
    """The types of least error within so many bytes. sizes: bytes of blocks; rest: of all else. UsageError."""
    least = rest + sum(int(of[KINDS[0]]) for of in sizes.values())
    if least > budget:
        raise UsageError(
            f"a budget of {budget / 1e9:.4g} GB is too small: with all blocks in {KINDS[0]} the file has "
            f"{least / 1e9:.4g} GB. Next: --budget {least}, or more"
        )
    grain = max(1.0, (budget - least) / GRAINS)
    grains = int((budget - least) / grain)
    best, chosen = np.zeros(grains + 1), []  # the least error of the blocks so far, by grains of what is spent
    for block, of in sizes.items():
        costs = [math.ceil((of[kind] - of[KINDS[0]]) / grain) for kind in KINDS]
        ways = np.stack([_later(best, n) + errors[block][kind] for n, kind in zip(costs, KINDS, strict=True)])
        best = ways.min(axis=0)
        chosen.append((block, costs, ways.argmin(axis=0)))
    kinds, left = {}, grains
    for block, costs, which in reversed(chosen):
        kinds[block] = KINDS[which[left]]
        left -= costs[which[left]]
    kinds = {block: kinds[block] for block in sizes}
    size = rest + sum(int(sizes[block][kind]) for block, kind in kinds.items())
    while steps := list(_steps(kinds, errors, sizes, budget - size)):  # what rounding up has left over
        _, block, other, more = max(steps)
        kinds[block], size = other, size + more
    return Mix(kinds, size, sum(errors[block][kind] for block, kind in kinds.items()))


def _steps(kinds: Mapping[str, str], errors: Table, sizes: Table, left: int) -> Iterator[tuple[float, str, str, int]]:
    """Larger types of single blocks within so many bytes: the error that each saves, block, type and bytes."""
    for block, kind in kinds.items():
        for other in KINDS[KINDS.index(kind) + 1 :]:
            more, saves = int(sizes[block][other] - sizes[block][kind]), errors[block][kind] - errors[block][other]
            if more <= left and saves > 0:
                yield saves, block, other, more


def _later(best: np.ndarray, grains: int) -> np.ndarray:
    """`best`, where so many grains more are spent."""
    return np.concatenate((np.full(min(grains, len(best)), np.inf), best[: max(0, len(best) - grains)]))


def sizes_of(params: FluxParams) -> tuple[Table, int]:
    """Bytes of each block in each type, and of all else, in a GGUF file."""
    sizes = {block: dict.fromkeys(KINDS, 0) for block in block_names(params)}
    rest = 0
    for name, shape in network_shapes(params).items():
        block = ".".join(name.split(".")[:2])
        rest += ENTRY
        if block in sizes:
            for kind in KINDS:
                sizes[block][kind] += size_of(gguf_type(name, shape, kind), shape)
        else:
            rest += size_of(gguf_type(name, shape, KINDS[-1]), shape)
    return sizes, rest


@torch.no_grad()
def measured(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> Table:
    """The velocity's relative squared error with one block in a type, for each, at latents of these requests."""
    paths = trajectories(pipeline, requests)
    exact = velocities(pipeline, paths)
    errors: dict[str, dict[str, float]] = {block: {KINDS[-1]: 0.0} for block in block_names(pipeline.model.params)}
    tasks = [(block, kind) for block in errors for kind in KINDS[:-1]]
    for block, kind in tqdm(tasks, "blocks in types", unit="forwards", disable=no_bars()):
        with in_types(pipeline.model, {block: kind}):
            found = velocities(pipeline, paths)
        errors[block][kind] = float(((found - exact).norm() / exact.norm()) ** 2)
    return {block: _monotone(of) for block, of in errors.items()}


@contextmanager
def in_types(model: nn.Module, kinds: Mapping[str, str]) -> Iterator[None]:
    """A context in which blocks are in types, as a file of these has them."""
    of = {name: (kind, one) for block, kind in kinds.items() for name, one in _linears(model, block, kind).items()}
    try:
        for name, (kind, linear) in of.items():
            model.set_submodule(name, GgufLinear.of(linear, kind))
        yield
    finally:
        for name, (_, linear) in of.items():
            model.set_submodule(name, linear)


def _linears(model: nn.Module, block: str, kind: str) -> dict[str, nn.Linear]:
    """The block's Linears that have that type in a file of it."""
    named = {name: one for name, one in model.named_modules() if name.startswith(f"{block}.")}
    linears = {name: one for name, one in named.items() if isinstance(one, nn.Linear) and kind in PACK}
    return {name: one for name, one in linears.items() if is_whole(kind, tuple(one.weight.shape))}


def _monotone(errors: Mapping[str, float]) -> dict[str, float]:
    """A larger type has no larger error than a smaller one: where it was measured so, that is rounding."""
    least, found = float("inf"), {}
    for kind in KINDS:
        least = min(least, errors[kind])
        found[kind] = least
    return found


def weighted(errors: Table, importance: Mapping[str, float]) -> Table:
    """Errors times the importance of their blocks."""
    return {block: {kind: x * importance[block] for kind, x in of.items()} for block, of in errors.items()}


def read_importance(path: Path, name: str, params: FluxParams) -> dict[str, float]:
    """The importance of each block in a study's `importance.json`. FileError; UsageError for another model's."""
    found: Any = read_json(path, "the importance of blocks")
    try:
        rows = {str(row["block"]): float(row["importance"]) for row in found["blocks"]}
        model = str(found["model"])
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"{path} holds no importance of blocks. Next: give the importance.json that `importance` writes"
        ) from None
    if model != name or set(rows) != set(block_names(params)):
        raise UsageError(f"{path} holds the importance of the blocks of {model!a}, not of {name}")
    return {block: max(0.0, x) for block, x in rows.items()}


def describe(mix: Mix, errors: Table, sizes: Table) -> list[str]:
    """The plan as lines of a table: block, type, bytes, and its share of the error."""
    lines = [
        f"{block:<18}{kind:<6}{sizes[block][kind] / 1e6:>9.2f} MB{errors[block][kind] / (mix.error or 1):>7.1%}"
        for block, kind in mix.kinds.items()
    ]
    return [*lines, f"{mix.bytes / 1e9:.4f} GB; squared error of the velocity about {mix.error:.2e}"]
