"""A Linear with branches beside it: the differences that LoRA files make, whatever the layer behind computes with.

The idea. A trained difference D to a weight W need not be added to it: (W + s D) x = W x + s D x. For a low-rank one,
D = B A (LoRA, arXiv 2106.09685), the branch is two thin products, B (s (A x)): at rank 16 half a percent of the
arithmetic, whereas W may be quantized, stays as it is to the bit, and the scale s is a number in memory that can change
between two steps. All LoRAs on a layer are one pair of factors: their rows of A and columns of B are concatenated, and
s is a vector with a number for each rank.

Other differences keep the form in which they are cheap (`Term`s): a Kronecker product (LoKr) as two small products, a
gain for each row or column (DoRA) around the layer itself, and a difference without structure as a product of its own.

The error. Factors are rounded to the dtype that the model computes in, and so is A x; products sum in fp32.

The cost is memory traffic: A reads x once more, and B adds to y. docs/lora.md has the figures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import Leaf, QuantizedTokens, dense, multiply_columns, needs_grad


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

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """[..., K] -> [..., n]. y: what the layer itself computes of x, [..., N]."""
        raise NotImplementedError


class Dense(Term):
    """x @ weight.T, for a difference without structure [n, K]."""

    def __init__(self, weight: Tensor, start: int, unit: float = 1.0) -> None:
        super().__init__(start, start + len(weight), unit)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        return F.linear(x, self.weight)


class Kron(Term):
    """x @ kron(w1, w2).T, without the Kronecker product [a c, b d] of w1 [a, b] and w2 [c, d]."""

    def __init__(self, w1: Tensor, w2: Tensor, start: int, unit: float = 1.0) -> None:
        super().__init__(start, start + len(w1) * len(w2), unit)
        self.w1, self.w2 = (nn.Parameter(x, requires_grad=False) for x in (w1, w2))

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        inner = F.linear(x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1])), self.w2)
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
        x = x * self.gain
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
    """

    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = cast(int, base.in_features), cast(int, base.out_features)
        self.base = base
        self.terms = nn.ModuleList()
        self.register_parameter("down", None)
        self.register_parameter("up", None)
        self.register_buffer("unit", None)
        self.register_buffer("factor", None)
        self.register_buffer("shift", None)
        self.owners: list[tuple[object, str, Any]] = []
        """owner, kind of its piece, and which: ranks (start, stop), an index of `terms`, or a Shift"""

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, which transformers asks for its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias."""
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def forward(self, x: Tensor | QuantizedTokens) -> Tensor:
        """[..., K] -> [..., N]"""
        return self.branched(self.base(x), cast(Tensor, x))

    def multiply_columns(self, x: Tensor, y: Tensor) -> Tensor:
        """Its forward of [x | y]: the thin product of each, and the layer's own way."""
        own = multiply_columns(self.base, x, y)
        if self.terms:
            return self.branched(own, torch.cat((x, y), dim=-1))
        if self.down is not None:
            of_x, of_y = self.down.split([x.shape[-1], y.shape[-1]], dim=1)
            own = self._raised(own, F.linear(x, of_x) + F.linear(y, of_y))
        return own if self.shift is None else own + self.shift

    def branched(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., N], the layer's own output of x [..., K], with the branches' added."""
        terms = [(term, cast(Term, term).product(x, y, self.base)) for term in self.terms]  # of y as the layer gave it
        if self.down is not None:
            y = self._raised(y, F.linear(x, self.down))
        for term, product in terms:
            y = _added(y, product, cast(Term, term))
        return y if self.shift is None else y + self.shift

    def _raised(self, y: Tensor, thin: Tensor) -> Tensor:
        """y + up @ (factor * thin), where thin is A x."""
        thin = (thin * cast(Tensor, self.factor)).to(thin.dtype)
        if needs_grad(y, thin, self.up) or not y.is_contiguous() or y.device.type == "cpu":
            return y + F.linear(thin, cast(Tensor, self.up))
        y.flatten(0, -2).addmm_(thin.flatten(0, -2), cast(Tensor, self.up).t())  # the layer's output is nobody else's
        return y

    # Branches, their owners and scales ---------------------------------------------------------------------------

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

    def _join(self, piece: LowRank) -> None:
        up = piece.up
        if len(up) < self.out_features:
            up = F.pad(up, (0, 0, piece.start, self.out_features - piece.start - len(up)))
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

    def extra_repr(self) -> str:
        ranks = 0 if self.down is None else len(self.down)
        return f"ranks={ranks}, owners={len({id(owner) for owner, _, _ in self.owners})}"


def _added(y: Tensor, product: Tensor, term: Term) -> Tensor:
    """y, with a term's product times its scale added to its rows."""
    product = (product * term.scale).to(y.dtype)
    if term.stop - term.start == y.shape[-1]:
        return y + product
    return y + F.pad(product, (term.start, y.shape[-1] - term.stop))
