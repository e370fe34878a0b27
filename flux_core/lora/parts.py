"""Low-rank differences as parts of a Linear's rows, cut where a dialect has several modules, joined where it has one.

Nothing is multiplied, so nothing is rounded. Cutting: every piece has the same factor down and its own rows of up;
where up is block-diagonal (trained by parts, stored in one), each piece has its own ranks, too. Joining is the
opposite: pieces with the same factor down share it, others are stacked, and up is zero where a piece has no rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

SAME = Fraction(1, 2**22)
"""relative difference below which two alpha / rank are one, of which one alpha was rounded to fp32"""


class CannotSay(Exception):
    """What a dialect has no words for."""


@dataclass(frozen=True)
class Part:
    """The difference alpha / rank * up @ down to some rows of a Linear, in the official order."""

    stem: str
    """the module's name in the file that it is from"""
    start: int
    """the first of the rows"""
    down: Tensor
    """[R, K]"""
    up: Tensor
    """[n, R], n rows"""
    alpha: Tensor
    """one number"""
    magnitude: Tensor | None = None
    """DoRA's, for each row [n]"""
    bias: Tensor | None = None
    """a difference to the bias of these rows [n]"""

    @property
    def stop(self) -> int:
        return self.start + len(self.up)

    @property
    def unit(self) -> Fraction:
        """alpha / rank"""
        return Fraction(float(self.alpha)) / len(self.down)

    def with_ranks(self, down: Tensor, up: Tensor) -> "Part":
        """Other factors, at the same alpha / rank."""
        if len(down) == len(self.down):
            return replace(self, down=down, up=up)
        return replace(self, down=down, up=up, alpha=alpha_of(float(self.unit * len(down)), self.alpha))


def alpha_of(value: float, like: Tensor) -> Tensor:
    """An alpha in the dtype of `like`, or in fp32 where that cannot hold it."""
    whole = torch.tensor(value, dtype=torch.float32, device="cpu").reshape(like.shape)
    found = whole.to(like.dtype)
    return found if float(found) == float(whole) else whole


def cut(part: Part, bounds: Sequence[tuple[int, int]]) -> list[Part]:
    """The pieces of a part within each of these rows (start, stop); those that are zero are left out."""
    inside = [(max(a, part.start), min(b, part.stop)) for a, b in bounds if a < part.stop and b > part.start]
    if len(inside) == 1:
        return [part]
    pieces = [
        replace(
            part,
            start=a,
            up=part.up[a - part.start : b - part.start],
            magnitude=None if part.magnitude is None else part.magnitude[a - part.start : b - part.start],
            bias=None if part.bias is None else part.bias[a - part.start : b - part.start],
        )
        for a, b in inside
    ]
    used = torch.stack([_set_bits(piece.up).any(0) for piece in pieces])  # [pieces, R]
    kept = [x for x, ranks in zip(pieces, used, strict=True) if ranks.any() or _has_more(x)] or pieces
    owner = used.int().argmax(0)
    alone = bool((used.sum(0) == 1).all()) and bool((owner.diff() >= 0).all())
    if not alone or any(not ranks.any() and _has_more(x) for x, ranks in zip(pieces, used, strict=True)):
        return kept
    ranks_of = [owner == i for i in range(len(pieces))]
    return [x.with_ranks(x.down[at], x.up[:, at]) for x, at in zip(pieces, ranks_of, strict=True) if at.any()]


def _has_more(part: Part) -> bool:
    """Whether a part changes something even where its factors are zero."""
    return part.magnitude is not None or (part.bias is not None and bool(_set_bits(part.bias).any()))


def _set_bits(x: Tensor) -> Tensor:
    """Where a tensor is not exactly 0: -0 counts as a number of its own, since it is one in the file."""
    x = x.contiguous()
    return x.view(torch.uint8).reshape(*x.shape, x.dtype.itemsize).any(-1)


def join(parts: Sequence[Part], start: int, stop: int) -> Part:
    """The part of these rows that is the sum of its pieces. CannotSay."""
    parts = sorted(parts, key=lambda part: part.start)
    first, rows = parts[0], stop - start
    if len(parts) == 1 and (first.start, first.stop) == (start, stop):
        return first
    apart = all(a.stop <= b.start for a, b in pairwise(parts))
    magnitude = _joined_magnitude(parts, rows, apart)
    bias = None
    if any(part.bias is not None for part in parts):
        if not apart:
            raise CannotSay("several biases for the same rows")
        bias = _placed([(part.start - start, part.bias) for part in parts if part.bias is not None], rows)
    if apart and all(_same_down(first, part) for part in parts):
        up = _placed([(part.start - start, part.up) for part in parts], rows)
        return Part(first.stem, start, first.down, up, first.alpha, magnitude, bias)
    ups = _of_one_dtype([_placed([(part.start - start, _folded(part, first))], rows) for part in parts])
    downs = _of_one_dtype([part.down for part in parts])
    joined = first.with_ranks(torch.cat(downs), torch.cat(ups, dim=1))
    return replace(joined, start=start, magnitude=magnitude, bias=bias)


def _joined_magnitude(parts: Sequence[Part], rows: int, apart: bool) -> Tensor | None:
    found = [part.magnitude for part in parts if part.magnitude is not None]
    if not found:
        return None
    if len(found) < len(parts) or not apart or sum(map(len, found)) < rows:
        raise CannotSay("DoRA of some of its rows")
    return torch.cat(_of_one_dtype(found))


def _same_down(one: Part, other: Part) -> bool:
    return one is other or (
        one.down.dtype == other.down.dtype
        and torch.equal(_bytes(one.down), _bytes(other.down))
        and _alike(one.unit, other.unit)
    )


def _bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor: equal numbers may differ in their sign, as 0 and -0."""
    return x.contiguous().view(torch.uint8)


def _alike(one: Fraction, other: Fraction) -> bool:
    return abs(one - other) <= SAME * abs(one)


def _placed(pieces: Sequence[tuple[int, Tensor]], rows: int) -> Tensor:
    """[rows, ...] with pieces at their places, and zeros elsewhere."""
    same = _of_one_dtype([piece for _, piece in pieces])
    found = torch.zeros(rows, *same[0].shape[1:], dtype=same[0].dtype, device="cpu")
    for (at, _), piece in zip(pieces, same, strict=True):
        found[at : at + len(piece)] = piece
    return found


def _of_one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the least dtype that holds all of them; torch promotes no fp8 by itself."""
    kinds = {x.dtype for x in tensors}
    if len(kinds) == 1:
        return list(tensors)
    wide = reduce(torch.promote_types, [torch.bfloat16 if kind.itemsize == 1 else kind for kind in kinds])
    return [x.to(wide) for x in tensors]


def _folded(part: Part, like: Part) -> Tensor:
    """Its up, for another part's alpha / rank. CannotSay where that would round."""
    if _alike(part.unit, like.unit):
        return part.up
    ratio = part.unit / like.unit if like.unit else Fraction(0)
    if ratio and all(x & (x - 1) == 0 for x in (abs(ratio.numerator), ratio.denominator)):
        whole = part.up.double() * float(ratio)
        if torch.equal((found := whole.to(part.up.dtype)).double(), whole):
            return found
    raise CannotSay("alphas that differ between its parts")
