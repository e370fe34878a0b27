"""Extract a LoRA from two transformers: of each Linear's difference the best product of so low a rank.

By Eckart and Young that is the truncated SVD, U S V^T. Factors are balanced: up = U sqrt(S), down = sqrt(S) V^T. What
it holds of the squared difference is the sum of the kept singular values' squares over the sum of all.

A whole SVD of a large Linear takes minutes on a CPU. Where the rank is low for the matrix, a subspace a few directions
wider is found by iteration (Halko, Martinsson and Tropp, arXiv 0909.4061) and the SVD is taken in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoint.contents import Contents
from ..checkpoint.names import network_shapes
from ..checkpoint.read import opened_official
from ..errors import NonFiniteError
from ..params import FluxParams
from ..terminal import no_bars
from .convert import Converted, Dialect, Words, spell
from .parts import Part, alpha_of

WIDER, ITERATIONS = 16, 8
"""directions beside the rank, and products with D D^T: a test holds them to 1e-5 where singular values fall as 1/n"""
WHOLE = 8
"""times the rank, up to which a matrix's smaller side is decomposed whole"""


@dataclass
class Extracted:
    """Low-rank parts of a difference, and how much of it they hold."""

    parts: dict[str, Part] = field(default_factory=dict)
    """by official Linear"""
    squares: dict[str, tuple[float, float]] = field(default_factory=dict)
    """of each Linear's difference: the sum of squares held, and that of all"""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """differences of biases, by official Linear, fp32"""
    others: float = 0.0
    """sum of squares of all differences of biases and norms"""

    @property
    def share(self) -> float:
        """The part of the Linears' squared difference that is held."""
        held, total = (sum(pair[i] for pair in self.squares.values()) for i in (0, 1))
        return held / total if total else 1.0

    @property
    def share_of_others(self) -> float:
        """The part of the whole squared difference that is of biases and norms, which no low rank holds."""
        total = self.others + sum(total for _, total in self.squares.values())
        return self.others / total if total else 0.0

    def worst(self, count: int = 5) -> list[tuple[str, float]]:
        """The Linears of which least is held, and the share."""
        shares = {name: held / total for name, (held, total) in self.squares.items()}
        return sorted(shares.items(), key=lambda item: item[1])[:count]


def extract(
    base: Contents, tuned: Contents, params: FluxParams, rank: int, dtype: torch.dtype, device: torch.device | str
) -> Extracted:
    """The difference of two transformers of these sizes. NonFiniteError for NaN or infinity in it."""
    found = Extracted()
    for name, difference in _differences(base, tuned, params):
        linear, _, leaf = name.rpartition(".")
        square = float(difference.norm()) ** 2
        if not square < float("inf"):
            raise NonFiniteError(f"{tuned.source.path} less {base.source.path} is not finite in {name}.")
        if square == 0:
            continue
        if leaf == "weight":
            up, down, held = low_rank(difference.to(device), rank)
            alpha = alpha_of(float(len(down)), torch.zeros((), dtype=dtype, device="cpu"))
            found.parts[linear] = Part(linear, 0, down.cpu().to(dtype), up.cpu().to(dtype), alpha)
            found.squares[linear] = min(held, square), square
        else:
            found.others += square
            if leaf == "bias":
                found.biases[linear] = difference
    return found


def _differences(base: Contents, tuned: Contents, params: FluxParams) -> Iterator[tuple[str, Tensor]]:
    """Official names, and what is tuned less what was there, fp32, with a progress bar."""
    names = network_shapes(params)
    with (
        opened_official(base, params) as before,
        opened_official(tuned, params) as after,
        tqdm(names, desc="extracting", disable=no_bars()) as bar,
    ):
        for name in bar:
            yield name, after(name, torch.float32) - before(name, torch.float32)


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best up [N, r] and down [r, K] for x [N, K], r = `rank` or less, and the sum of squares that they hold."""
    if min(x.shape) <= WHOLE * rank + WIDER:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
    else:
        q = _range(x, rank + WIDER)
        u, s, v = torch.linalg.svd(q.t() @ x, full_matrices=False)
        u = q @ u
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    return u * s.sqrt(), s.sqrt()[:, None] * v, float(s.norm()) ** 2


def _range(x: Tensor, count: int) -> Tensor:
    """An orthonormal basis [N, count] of the directions in which x [N, K] is largest."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(x.shape[1], count, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    q = torch.linalg.qr(x @ start).Q
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.t() @ q).Q).Q
    return q


def spelled(found: Extracted, params: FluxParams, to: Dialect, dtype: torch.dtype) -> Converted:
    """The extracted differences in a dialect; biases in the official one alone."""
    words, file = Words(params, to), Converted()
    for linear, part in found.parts.items():
        spell(file, words, linear, [part])
    if to == "official":
        for linear, bias in found.biases.items():
            ((name, _),) = words.linears[linear]
            file.tensors[f"{name}.diff_b"] = bias.to(dtype)
    return file
