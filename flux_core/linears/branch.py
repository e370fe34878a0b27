"""A Linear with branches beside it: the differences that LoRA files make, whatever the layer behind computes with.

The idea. A trained difference D to a weight W need not be added to it: (W + s D) x = W x + s D x. For a low-rank one,
D = B A (LoRA, arXiv 2106.09685), the branch is two thin products, B (s (A x)): at rank 16 half a percent of the
arithmetic, whereas W may be quantized, stays as it is to the bit, and the scale s is a number in memory that can change
between two steps. All LoRAs on a layer are one pair of factors: their rows of A and columns of B are concatenated, and
s is a vector with a number for each rank.

Other differences keep the form in which they are cheap (`Term`s): a Kronecker product (LoKr) as two small products, a
gain for each row or column (DoRA) around the layer itself, and a difference without structure as a product of its own.

The error. Factors are rounded to the dtype that the model computes in, and so is A x; products sum in fp32.

The cost is memory traffic: A reads x once more, and B adds to y. Where kernels are installed (`Thin`), B costs less: a
weight and B lie side by side in memory, [W | B], and the function that computes x leaves room behind each row of it for
t = s (A x). Then W x + B t is one product of a few more columns, whose bias, GELU and rows are as without branches. The
layer's own weight is a view of the joined memory, equal to the bit, and gets memory of its own again when the last
branch is removed. s acts on t alone, so it may change at any time. docs/lora.md has the figures.

That is for a wide output; where it is no wider than the input, A costs more, and lies below W (`below.py`).

In fp8 B is written in the codes of W, whose rows have scales s_n already: code = B_nj / (s_n c_j), and t is multiplied
by c_j. e4m3 has the same precision over a factor of 2^15, so there is room for both: c_j is such that B's codes fill
the range, or t's are not lost in small numbers. t's range is the token's: tokens leave a margin (`fp8.MARGIN`), and one
whose t needs more is scaled down by a power of two. A product multiplies 128 columns at a time; of so many, up to 42
ranks take three each, for t and B in codes and what the codes leave over. Then only the rounding of x counts.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_out_of_memory
from .below import Below, join
from .contract import (
    Branches,
    Leaf,
    QuantizedTokens,
    Widened,
    dense,
    is_bare,
    is_leaf,
    multiply_columns,
    needs_grad,
    parts,
    sum_of_products,
)
from .fp8 import E4M3, LARGEST, Fp8Linear, product_of_tokens

TILE = 128
"""bytes of a row by whose multiples a weight widens: what a product's kernel multiplies at a time"""
WIDEST = 0.25
"""of a layer's inputs, up to which it widens"""
TYPICAL, AIM = 8.0, 8.0
"""of tokens' codes, the root of the mean square, with their margin; and of codes of t, at the least"""
UP_ERROR = 0.04
"""of up in codes, relative: about that of the weight's"""
SPARE = 4 * 2**30
"""bytes of a card that joining leaves free: the memory of weights that move is in pieces that the next do not fit in"""


class Thin(NamedTuple):
    """What kernels compute for branches on a device; without quantized inputs, branches are products of torch's."""

    quantize: Callable[[Tensor, Branches], Widened]
    """x [..., K], quantized"""
    ranks: int
    """that fit behind tokens"""


THIN: dict[str, Thin] = {}
"""by type of device; `kernels.install` fills it"""


class LowRank(NamedTuple):
    """The difference up @ diag(unit) @ down to some rows of a weight."""

    down: Tensor
    """[R, K]"""
    up: Tensor
    """[n, R], n rows"""
    unit: Tensor
    """fp32 [R], alpha / rank: the factor at scale 1"""
    start: int = 0
    """the first of the rows"""


class Term(nn.Module):
    """A difference to the rows start to stop of a layer's output that is not low-rank, times `scale`."""

    scale: Tensor
    unit: Tensor

    def __init__(self, start: int, stop: int, unit: float = 1.0) -> None:
        """unit: the factor at scale 1."""
        super().__init__()
        self.start, self.stop = start, stop
        for name in ("unit", "scale"):
            self.register_buffer(name, torch.tensor(unit, dtype=torch.float32, device="cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Term":
        _apply_but_for_casts(self, ("unit", "scale"), partial(super()._apply, fn, recurse))
        return self

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """[..., K] -> [..., n]. y: what the layer itself computes of x, [..., N]. x may have more features by now."""
        raise NotImplementedError


class Dense(Term):
    """x @ weight.T, for a difference without structure [n, K]."""

    def __init__(self, weight: Tensor, start: int, unit: float = 1.0) -> None:
        super().__init__(start, start + len(weight), unit)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return F.linear(x[..., : self.weight.shape[1]], self.weight)


class Kron(Term):
    """x @ kron(w1, w2).T, without the Kronecker product [a c, b d] of w1 [a, b] and w2 [c, d]."""

    def __init__(self, w1: Tensor, w2: Tensor, start: int, unit: float = 1.0) -> None:
        super().__init__(start, start + len(w1) * len(w2), unit)
        self.w1, self.w2 = (nn.Parameter(x, requires_grad=False) for x in (w1, w2))

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        b, d = self.w1.shape[1], self.w2.shape[1]
        inner = F.linear(x[..., : b * d].unflatten(-1, (b, d)), self.w2)
        return torch.einsum("ab,...bc->...ac", self.w1, inner).flatten(-2)


class RowGain(Term):
    """The layer's own rows, times a gain for each: DoRA's factor of W, less 1."""

    def __init__(self, gain: Tensor, start: int) -> None:
        super().__init__(start, start + len(gain))
        self.gain = nn.Parameter(gain, requires_grad=False)

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        own, bias = y[..., self.start : self.stop], _bias(base, self.start, self.stop)
        return self.gain * (own if bias is None else own - bias)


class ColumnGain(Term):
    """The layer's own rows, of inputs times a gain for each feature: DoRA's factor of W's columns, less 1."""

    def __init__(self, gain: Tensor, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self.gain = nn.Parameter(gain, requires_grad=False)

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        x = x * F.pad(self.gain, (0, x.shape[-1] - len(self.gain)))
        if found := dense(base, x):
            return F.linear(x, found[0][self.start : self.stop])
        own, bias = base(x)[..., self.start : self.stop], _bias(base, self.start, self.stop)
        return own if bias is None else own - bias


def _bias(base: nn.Module, start: int, stop: int) -> Tensor | None:
    bias = getattr(base, "bias", None)
    return None if bias is None else bias[start:stop]


class Shift(NamedTuple):
    """A difference to the bias of some rows."""

    bias: Tensor
    """[n]"""
    start: int = 0


Piece = LowRank | Term | Shift


class BranchedLinear(Leaf):
    """A layer of any kind and the branches beside it. Each branch has an owner, whose scale and removal it follows.

    `down` [R, K] and `up` [N, R] are the joined factors and `factor` [R] what is between them, or all three are None.
    `scaled` is factor * down, so that a forward does not multiply by the factor; behind it there are rows of zeros for
    the rest of the room of `wide`. Where inputs are quantized it is None.
    """

    down: nn.Parameter | None
    up: nn.Parameter | None
    factor: Tensor | None
    scaled: Tensor | None
    shift: Tensor | None

    def __init__(self, base: nn.Module, joins: bool = True) -> None:
        """joins: whether what computes its inputs may leave room behind them, so that joining pays."""
        super().__init__()
        self.joins = joins
        self.in_features, self.out_features = cast(int, base.in_features), cast(int, base.out_features)
        self.base = base
        self.terms = nn.ModuleList()
        self.register_parameter("down", None)
        self.register_parameter("up", None)
        for name in ("unit", "factor", "scaled", "shift"):
            self.register_buffer(name, None)
        self.owners: list[tuple[object, str, Any]] = []
        """owner, kind of its piece, and which: ranks (start, stop), an index of `terms`, or a Shift"""
        self.thin: Thin | None = None
        self.wide: Tensor | None = None
        """weight and up side by side"""
        self.gain: Tensor | None = None
        self.below: Below | None = None
        """weight and down one below the other"""
        self._seen: Branches | None = None
        """what `branches` returns, gathered once: a block asks for it several times"""

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias."""
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def takes_tokens(self) -> bool:
        """Whether weight and `down` are codes, one below the other."""
        below = self._below()
        return below is not None and below.scale is not None

    def forward(self, x: Tensor | QuantizedTokens | Widened) -> Tensor:
        """[..., K] -> [..., N]"""
        if isinstance(x, Widened):
            return self._of_widened(x)
        if isinstance(x, QuantizedTokens):
            return cast(Below, self.below).of_tokens(x)
        if (below := self._below()) and not needs_grad(x):
            return below.of(x) if below.scale is None else below.of_tokens(cast(Fp8Linear, self.base).quantize(x))
        found = self.branches()
        if found is not None and found.gain is not None and not needs_grad(x):
            return self._of_widened(cast(Thin, self.thin).quantize(x, found))
        return self.branched(self.base(x), x)

    def _of_widened(self, x: Widened) -> Tensor:
        wide, bias = cast(Tensor, self.wide), cast(Branches, self.branches()).bias
        if isinstance(x.both, Tensor):
            return F.linear(x.both, wide, bias)
        return product_of_tokens(x.both, wide, cast(Fp8Linear, self.base).weight_scale, bias)

    def branches(self) -> Branches | None:
        """Its low-rank branches, where there are no other terms."""
        seen = self._seen
        return seen if seen is None or seen.wide is None or self._is_joined() else seen._replace(wide=None, gain=None)

    def multiply_columns(self, x: Tensor, y: Tensor) -> Tensor:
        """Its forward of [x | y]: the thin product of each, and the layer's own way."""
        below = None if needs_grad(x, y) else self._below()
        if below is not None and below.scale is None:
            return below.of_two(x, y)
        if self.terms or below is not None or (self.gain is not None and self._is_joined()):
            return self(torch.cat((x, y), dim=-1))
        if self.down is None:
            return self._shifted(multiply_columns(self.base, x, y))
        thin = self._thin(x, y)
        if (found := dense(self.base, x, y)) and not needs_grad(x, y, self.down, self.up):
            bias = found[1] if self.shift is None else found[1] + self.shift
            up = cast(Tensor, self.up)
            add_up = torch.ops.flux_core.sum_of_three if torch.compiler.is_compiling() else sum_of_three
            return add_up(x, y, found[0], bias, thin, up)
        return self._shifted(self._raised(multiply_columns(self.base, x, y), thin))

    def branched(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., N], the layer's own output of x [..., K], with the branches' added."""
        terms = [(term, cast(Term, term).product(x, y, self.base)) for term in self.terms]  # of y as the layer gave it
        if self.down is not None:
            y = self._raised(y, self._thin(x))
        for term, product in terms:
            y = _added(y, product, cast(Term, term))
        return self._shifted(y)

    def _shifted(self, y: Tensor) -> Tensor:
        return y if self.shift is None else y + self.shift.to(y.dtype)  # which is another under autocast

    def _thin(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """factor * ([x | y] @ down.T), rounded to their dtype. [..., R]"""
        down, factor = cast(Tensor, self.down), cast(Tensor, self.factor)
        if self.scaled is None or needs_grad(down):
            down = down * factor[:, None].to(down.dtype)
        else:
            down = self.scaled[: len(down)]
        if y is None:
            return F.linear(x, down)
        of_x, of_y = down.split([x.shape[-1], y.shape[-1]], dim=1)
        return plus_product(F.linear(x, of_x), y, of_y)

    def _raised(self, y: Tensor, thin: Tensor) -> Tensor:
        """y + up @ thin; y is nobody else's."""
        return plus_product(y, thin, cast(Tensor, self.up))

    # How its device computes it ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Take the kernels of its device, and join weight and up where that is faster and there is memory for it."""
        weight = getattr(self.base, "weight", None)
        self.thin = THIN.get(weight.device.type) if isinstance(weight, Tensor) else None
        try:
            if not self._joins():
                self._part_memory()
            elif self.out_features > self.in_features:
                self._join_memory()
            else:
                self._join_below()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._part_memory()
        self._fit_scaled()
        self._seen = None
        if self.down is not None and not len(self.terms):
            up, factor, gain = cast(Tensor, self.up), cast(Tensor, self.factor), self.gain
            self._seen = Branches(self.base, self.down, up, factor, self.scaled, self.shift, self.wide, gain)
            for one in self._seen:
                if self.thin is not None and isinstance(one, Tensor):
                    _static(one)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute `scaled` again, in place, after `factor` was written to."""
        down, factor = cast(Tensor, self.down), cast(Tensor, self.factor)
        if self.below is not None:
            self.below.set_factor(down, factor)
        elif self.scaled is not None:
            torch.mul(down, factor[:, None], out=self.scaled[: len(down)])

    def _fit_scaled(self) -> None:
        """Give `scaled` as many rows as `down` has, or the room of `wide`; none where inputs are quantized, or `below`
        has them."""
        down = self.down
        if down is None or self.gain is not None or self.below is not None:
            self.scaled = None
            return None if down is None else self.refresh()
        rows = len(down) if self.wide is None else self.wide.shape[1] - down.shape[1]
        like = self.scaled
        if (
            like is None
            or like.shape != (rows, down.shape[1])
            or (like.dtype, like.device) != (down.dtype, down.device)
        ):
            self.scaled = torch.zeros(rows, down.shape[1], dtype=down.dtype, device=down.device)
        self.refresh()

    def _joins(self) -> bool:
        """Whether weight and up should be side by side: for a wide output, and in fp8."""
        base, down, up = self.base, self.down, self.up
        if not self.joins or self.thin is None or down is None or up is None or len(self.terms):
            return False
        weight = cast(Tensor, base.weight)
        if weight.device != up.device or down.shape[1] != self.in_features:
            return False
        if self._room(len(down), weight.dtype) > WIDEST * self.in_features:
            return False
        with torch.no_grad():
            if is_bare(base, nn.Linear):
                return weight.dtype == up.dtype and not weight.requires_grad
            fp8 = isinstance(base, Fp8Linear) and is_leaf(base) and base.takes_tokens()
            return fp8 and len(down) <= self.thin.ranks

    @staticmethod
    def _room(ranks: int, dtype: torch.dtype) -> int:
        tile = TILE // dtype.itemsize
        return -(-ranks // tile) * tile

    @torch.no_grad()
    def _join_memory(self) -> None:
        base, up, down = cast(Any, self.base), cast(Tensor, self.up), cast(Tensor, self.down)
        weight, (N, K) = base.weight.detach(), (self.out_features, self.in_features)
        behind, gain = up.detach(), None
        if isinstance(base, Fp8Linear):
            number = parts(len(down), self._room(len(down), weight.dtype))
            found = codes_of(up, down, cast(Tensor, self.unit), base.weight_scale, number)
            if found is None:
                return self._part_memory()
            behind, gain = found
        room = self._room(len(down), weight.dtype)
        wide = self.wide if self._is_joined(room) else None
        if wide is None:
            if not has_memory(weight, N * (K + room)):
                return self._part_memory()
            wide = torch.empty((N, K + room), dtype=weight.dtype, device=weight.device)
            wide[:, :K] = weight
        wide[:, K:] = F.pad(behind, (0, room - behind.shape[1])).to(weight.dtype)
        self.wide, self.gain = wide, gain
        base.weight.data = wide[:, :K]
        if gain is None:
            self.up.data = wide[:, K : K + len(down)]  # type: ignore[union-attr]

    @torch.no_grad()
    def _join_below(self) -> None:
        base, up, down = cast(Any, self.base), cast(Tensor, self.up), cast(Tensor, self.down)
        self._part_memory()
        scale = base.weight_scale if isinstance(base, Fp8Linear) else None
        rows = self._room(len(down) * (1 if scale is None else 2), base.weight.dtype)
        if has_memory(base.weight, (self.out_features + rows) * self.in_features):
            below = join(base.weight.detach(), rows, scale, down.detach(), up.detach())
            base.weight.data = below.both[: self.out_features]
            below.set_bias(base.bias, self.shift)
            for one in (below.both, below.bias, below.up, below.scale):
                if one is not None:
                    _static(one)
            self.below = below

    def _below(self) -> Below | None:
        """The joined memory, if the layer's weight is still a part of it, and the layer may be multiplied by it."""
        below, base = self.below, cast(Any, self.base)
        if below is None or len(self.terms):
            return None
        if not torch.compiler.is_compiling() and base.weight.data_ptr() != below.both.data_ptr():
            return None
        ours = is_bare(base, nn.Linear) if below.scale is None else is_leaf(base) and base.takes_tokens()
        return below if ours and not torch.is_autocast_enabled(below.both.device.type) else None

    def _is_joined(self, room: int | None = None) -> bool:
        """Whether the layer's weight is a part of `wide` (with that room) and the layer may be multiplied by it."""
        wide, base, down = self.wide, cast(Any, self.base), self.down
        if wide is None or down is None:
            return False
        weight = base.weight  # which a move, a copy or a new weight has parted from `wide`: then its rows are dense
        if weight.stride() != wide.stride() or weight.shape != (wide.shape[0], down.shape[1]):
            return False
        if weight.device != wide.device or weight.dtype != wide.dtype:
            return False
        if room not in (None, wide.shape[1] - down.shape[1]):
            return False
        return is_bare(base, nn.Linear) or (is_leaf(base) and base.takes_tokens())

    @torch.no_grad()
    def _part_memory(self) -> None:
        """Give weight and up memory of their own."""
        if self._below() is not None:
            weight = cast(Any, self.base).weight
            with suppress(torch.OutOfMemoryError):
                weight.data = weight.data.clone()
        self.below = None
        if self.wide is None:
            return
        for one in (getattr(self.base, "weight", None), self.up):
            if isinstance(one, nn.Parameter) and not one.is_contiguous():
                with suppress(torch.OutOfMemoryError):  # then it stays a view, of the same values
                    one.data = one.data.contiguous()
        self.wide, self.gain = None, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BranchedLinear":
        _apply_but_for_casts(self, ("unit", "factor"), partial(super()._apply, fn, recurse))
        self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy has memory of its own for weight and up."""
        return {**self.__dict__, "wide": None, "gain": None, "below": None, "_seen": None}

    # Branches, their owners and scales ---------------------------------------------------------------------------

    def exchange(self, base: nn.Module) -> None:
        """Put the branches beside another layer, which may take more features, or fewer, than the one before."""
        self._part_memory()
        self.base, self.in_features = base, cast(int, base.in_features)
        if self.down is not None:
            self.down = nn.Parameter(with_columns(self.down.detach(), self.in_features), requires_grad=False)
        self.prepare()

    def add(self, owner: object, pieces: Sequence[Piece]) -> None:
        """Add an owner's branches, at scale 1."""
        for piece in pieces:
            if isinstance(piece, LowRank):
                first = 0 if self.down is None else len(self.down)
                self.owners.append((owner, "ranks", (first, first + len(piece.down))))
                self._join(piece)
            elif isinstance(piece, Shift):
                self.owners.append((owner, "shift", [piece, 1.0]))
            else:
                self.owners.append((owner, "term", piece))
                self.terms.append(piece)
        self._sum_shifts()
        self.prepare()

    def _join(self, piece: LowRank) -> None:
        up = piece.up
        if len(up) < self.out_features:
            up = F.pad(up, (0, 0, piece.start, self.out_features - piece.start - len(up)))
        piece = piece._replace(down=with_columns(piece.down, self.in_features))
        if self.down is not None:
            assert self.up is not None and self.unit is not None and self.factor is not None
            piece = LowRank(torch.cat((self.down, piece.down)), up, torch.cat((self.unit, piece.unit)))
            up = torch.cat((self.up, up), dim=1)
            factor = torch.cat((self.factor, piece.unit[len(self.factor) :]))
        else:
            factor = piece.unit.clone()
        self._set(piece.down, up, piece.unit, factor)

    def _set(self, down: Tensor, up: Tensor, unit: Tensor, factor: Tensor) -> None:
        self.down, self.up = (nn.Parameter(x, requires_grad=False) for x in (down, up))
        self.unit, self.factor = unit, factor

    def remove(self, owner: object) -> bool:
        """Remove an owner's branches. Returns whether any are left."""
        kept: list[int] = []
        owners = [entry for entry in self.owners if entry[0] is not owner]
        self.owners, terms = [], []
        for other, kind, which in owners:
            if kind == "ranks":
                self.owners.append((other, kind, (len(kept), len(kept) + which[1] - which[0])))
                kept += range(*which)
            else:
                self.owners.append((other, kind, which))
                terms += [which] if kind == "term" else []
        self.terms = nn.ModuleList(terms)
        if self.down is not None and len(kept) < len(self.down):
            assert self.up is not None and self.unit is not None and self.factor is not None
            at = torch.tensor(kept, dtype=torch.int64, device=self.down.device)
            if kept:
                self._set(self.down[at], self.up[:, at], self.unit[at], self.factor[at])
            else:
                self.down, self.up, self.unit, self.factor = None, None, None, None  # type: ignore[assignment]
        self._sum_shifts()
        self.prepare()
        return bool(self.owners)

    def scales_of(self, owner: object) -> list[tuple[Tensor, Tensor]]:
        """The numbers that an owner's scale is written to, each with its value at scale 1."""
        found: list[tuple[Tensor, Tensor]] = []
        for other, kind, which in self.owners:
            if other is owner and kind == "ranks":
                found.append((cast(Tensor, self.factor)[slice(*which)], cast(Tensor, self.unit)[slice(*which)]))
            elif other is owner and kind == "term":
                found.append((which.scale, which.unit))
        return found

    def is_dense(self, owner: object) -> bool:
        """Whether a difference of an owner's has no structure that is cheaper than the layer itself."""
        return any(other is owner and isinstance(which, Dense) for other, _, which in self.owners)

    def scale_shifts(self, owner: object, scale: float) -> None:
        """Write an owner's scale to its differences to the bias."""
        mine = [which for other, kind, which in self.owners if other is owner and kind == "shift"]
        for which in mine:
            which[1] = scale
        if mine:
            self._sum_shifts()

    def _sum_shifts(self) -> None:
        """All differences to the bias, at their scales: in place, where there were some, for recorded graphs."""
        shifts = [which for _, kind, which in self.owners if kind == "shift"]
        if not shifts:
            self.shift = None
            return
        first = shifts[0][0].bias if self.shift is None else self.shift
        total = torch.zeros(self.out_features, dtype=torch.float32, device=first.device)
        for piece, scale in shifts:
            total[piece.start : piece.start + len(piece.bias)] += scale * piece.bias.to(first.device).float()
        if self.shift is None:
            self.shift = total.to(first.dtype)
        else:
            self.shift.copy_(total)
        if self.below is not None:
            self.below.set_bias(self.bias, self.shift)

    def extra_repr(self) -> str:
        ranks = 0 if self.down is None else len(self.down)
        return f"ranks={ranks}, owners={len({id(owner) for owner, _, _ in self.owners})}"


def _apply_but_for_casts(module: nn.Module, names: Sequence[str], apply: Callable[[], object]) -> None:
    """Apply a move or a cast to a module; the latter not to scales, of these names."""
    kept = {name: x for name in names if (x := getattr(module, name)) is not None}
    apply()
    for name, old in kept.items():
        if (new := getattr(module, name)).dtype != old.dtype:
            setattr(module, name, old.to(new.device))


def with_columns(x: Tensor, width: int) -> Tensor:
    """x [n, K] with zero columns behind, or without the last, up to `width`."""
    return x if x.shape[1] == width else F.pad(x, (0, width - x.shape[1]))


@torch.no_grad()
def codes_of(
    up: Tensor, down: Tensor, unit: Tensor, weight_scale: Tensor, number: int = 1
) -> tuple[Tensor, Tensor] | None:
    """up in codes of a weight whose rows have these scales, and the gain of each rank; None where they are not as near
    to it as a weight's are. Codes are fp32 [N, number * R], with one to three for each rank (`contract.parts`).
    """
    rows = up.float() / weight_scale[:, None]
    largest = rows.abs().amax(dim=0).clamp(min=1e-12)
    expected = TYPICAL * unit.abs() * torch.linalg.vector_norm(down.float(), dim=1)  # of t, at gain 1
    gain = torch.minimum(AIM / expected.clamp(min=1e-12), largest).maximum(largest / LARGEST)
    codes = (rows / gain).to(E4M3).float()
    rest = (rows / gain - codes).to(E4M3).float()
    found = codes if number < 3 else codes + rest
    if ((found * gain - rows) * weight_scale[:, None]).norm() > UP_ERROR * up.float().norm():
        return None
    return torch.cat((codes, codes, rest)[:number], dim=1), gain


def _static(x: Tensor) -> Tensor:
    """x, whose sizes a compiler takes for numbers, as those of parameters and buffers. Importing one takes seconds, and
    where none is, nothing has compiled yet."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.mark_static(x)
    return x


def has_memory(like: Tensor, numbers: int) -> bool:
    """Whether a card has memory for so many more numbers, and to spare."""
    return not like.is_cuda or torch.cuda.mem_get_info(like.device)[0] > numbers * like.itemsize + SPARE


def plus_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x @ weight.T, in place on a device where no gradient is needed."""
    apart = len({y.dtype, x.dtype, weight.dtype}) > 1  # under autocast, which knows no product in place
    if needs_grad(y, x, weight) or not y.is_contiguous() or y.device.type == "cpu" or apart:
        return y + F.linear(x, weight)
    add = torch.ops.flux_core.add_product if torch.compiler.is_compiling() else add_product
    add(y, x, weight)
    return y


def add_product(y: Tensor, thin: Tensor, up: Tensor) -> None:
    """y += thin @ up.T, in place: [..., N], [..., R], [N, R].

    An operator of its own, since inductor would copy y before it adds to it.
    """
    y.flatten(0, -2).addmm_(thin.flatten(0, -2), up.t())


_OPERATOR = torch.library.custom_op("flux_core::add_product", add_product, mutates_args=("y",))
_OPERATOR.register_fake(lambda y, thin, up: None)


def sum_of_three(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, thin: Tensor, up: Tensor) -> Tensor:
    """`sum_of_products`, and thin @ up.T."""
    total = sum_of_products(x, y, weight, bias)
    add_product(total, thin, up)
    return total


@torch.library.custom_op("flux_core::sum_of_three", sum_of_three, mutates_args=()).register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, thin: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _added(y: Tensor, product: Tensor, term: Term) -> Tensor:
    """y, with a term's product times its scale added to its rows."""
    product = (product * term.scale).to(y.dtype)
    if term.stop - term.start == y.shape[-1]:
        return y + product
    return y + F.pad(product, (term.start, y.shape[-1] - term.stop))
