"""The algebras: the difference that a module's factors make to its weight, as pieces of a branch, and dense.

    lora   up @ down                           (with a Tucker core: up @ mid @ down)
    lokr   kron(w1, w2), w1 and w2 whole or products of two factors
    loha   (w1_a @ w1_b) * (w2_a @ w2_b)
    glora  b1 @ b2 + W @ a1 @ a2
    diff   itself
    dora   m * V / |V| - W, with V = W + D of one of the above, and |V| of V's rows or columns

all but diff and dora times alpha / rank. Factors are multiplied in fp32. Sources: PEFT `tuners/lora/layer.py` and
`dora.py`; LyCORIS `modules/{locon,lokr,loha,glora,full}.py`, whose forward is what was trained (its own `merge_to`
applies alpha / rank twice to LoKr and LoHa); ComfyUI `weight_adapter/` for the older GLoRA.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import FileError
from ..linears.branch import ColumnGain, Dense, Kron, LowRank, Piece, RowGain, Shift
from .file import BIASES, Module, glora_is_new

WORTH_IT = 0.5
"""of a dense difference's arithmetic, below which structure is kept"""


@dataclass(frozen=True)
class Delta:
    """The difference that one module makes to rows of a weight."""

    module: Module
    tensors: Mapping[str, Tensor]
    """its factors by role, as they are in the file"""
    alpha: float | None
    rows: int
    """of the weight, which the module trains"""
    columns: int
    weight: Callable[[], Tensor] | None
    """those rows, dense, in fp32 [rows, K]; asked by DoRA and GLoRA alone"""

    def beside(self, weight: Tensor) -> "Delta":
        """The same difference, to rows of that weight [N, K]."""
        rows = weight[self.start : self.start + self.rows]
        return replace(self, weight=lambda: rows.to(next(iter(self.tensors.values())).device, torch.float32))

    def _own(self) -> Tensor:
        """The rows of the weight, fp32 [rows, K]."""
        assert self.weight is not None
        return self.weight()

    @property
    def unit(self) -> float:
        """The factor of the difference at scale 1: alpha / rank, as the file or its header has it; 1 without."""
        if self.module.algebra.endswith("lokr") and self.module.rank is None:
            return 1.0  # both factors whole: alpha means nothing
        if self.module.algebra == "diff":
            return 1.0
        if self.alpha is not None:
            return self.alpha / (self.module.rank or 1)
        return 1.0 if self.module.scale is None else self.module.scale

    def factor(self, role: str) -> Tensor:
        """A factor as a matrix in fp32: 1x1 convolutions are flattened."""
        x = self.tensors[role].float()
        return x.flatten(1) if x.ndim > 2 and math.prod(x.shape[2:]) == 1 else x

    @property
    def start(self) -> int:
        """The first of the rows in the weight."""
        return self.module.target.start

    def changes(self, what: str) -> bool:
        """Whether it changes the "weight", or the "bias"."""
        return self.module.algebra != "bias" if what == "weight" else not self.tensors.keys().isdisjoint(BIASES)

    def pieces(self, dtype: torch.dtype) -> list[Piece]:
        """The branch: pieces whose sum is this difference."""
        found: list[Piece] = [Shift(shift.to(dtype), self.start) for shift in self.shifts()]
        if self.changes("weight"):
            dora = "magnitude" in self.tensors
            found += self._dora(self.start, dtype) if dora else self._plain(self.start, dtype)
        return found

    def shifts(self) -> list[Tensor]:
        """The differences to the bias of these rows at scale 1, fp32 [rows], by the official order."""
        units = {"diff_b": 1.0, "up_bias": self.unit}  # the latter is of the product, and scaled with it
        biases = {role: self.tensors[role].flatten().float() for role in units if role in self.tensors}
        return [self._by_rows(bias * units[role]) for role, bias in biases.items()]

    def dense(self) -> Tensor:
        """The difference at scale 1, fp32 [rows, K], by the official order of rows."""
        if "magnitude" in self.tensors:
            weight, trained = self._own(), self._trained()
            by_rows, gain = self._gain(trained)
            return trained * (gain[:, None] if by_rows else gain) - weight
        return self._difference()

    # Without DoRA --------------------------------------------------------------------------------------------------

    def _difference(self) -> Tensor:
        """The difference without DoRA, fp32 [rows, K]."""
        algebra = self.module.algebra.removeprefix("dora of ")
        if algebra == "lokr":
            found = torch.kron(*self._kron())
        elif algebra == "loha":
            found = self._hadamard("hada_w1", "hada_t1") * self._hadamard("hada_w2", "hada_t2")
        elif algebra == "diff":
            found = self.factor("diff")
        else:
            down, up = self._thin()
            return (up * self.unit) @ down
        return self._official(found * self.unit)

    def _plain(self, start: int, dtype: torch.dtype) -> list[Piece]:
        rows, columns, algebra = self.rows, self.columns, self.module.algebra.removeprefix("dora of ")
        if algebra == "lokr" and not self.module.target.swapped:
            w1, w2 = self._kron()
            fits = (len(w1) * len(w2), w1.shape[1] * w2.shape[1]) == (rows, columns)
            if fits and 1 / len(w1) + 1 / w2.shape[1] < WORTH_IT:
                return [Kron(w1.to(dtype), w2.to(dtype), start, self.unit)]
        thin = self._thin() if self._is_thin(algebra) else None
        ranked = self.module.schedule is not None  # ranks that come and go, whatever that costs
        if thin is not None and (ranked or len(thin[0]) * (rows + columns) < WORTH_IT * rows * columns):
            down, up = thin
            unit = torch.full((len(down),), self.unit, dtype=torch.float32, device=down.device)
            return [LowRank(down.to(dtype), up.to(dtype), unit, start)]
        return [Dense(self._difference().to(dtype), start)]

    def _is_thin(self, algebra: str) -> bool:
        return algebra in ("lora", "glora") or (algebra == "loha" and "hada_t1" not in self.tensors)

    def _thin(self) -> tuple[Tensor, Tensor]:
        """Factors down [R, K] and up [rows, R] whose product is the difference without its unit."""
        algebra = self.module.algebra.removeprefix("dora of ")
        if algebra == "glora":
            a1, a2, b1, b2 = (self.factor(f"glora_{x}") for x in ("a1", "a2", "b1", "b2"))
            if not glora_is_new(*(tuple(x.shape) for x in (a1, a2, b1, b2))):
                a1, a2, b1, b2 = a2, a1, b2, b1
            return self._narrow(torch.cat((b2, a2))), torch.cat((self._by_rows(b1), self._own() @ a1), dim=1)
        if algebra == "loha":  # a product of sums is a sum over pairs: rank R^2
            w1_a, w1_b, w2_a, w2_b = (self.factor(f"hada_{x}") for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
            up = torch.einsum("ni,nj->nij", w1_a, w2_a).flatten(1)
            return self._narrow(torch.einsum("ik,jk->ijk", w1_b, w2_b).flatten(0, 1)), self._by_rows(up)
        up = self.factor("up")
        if "mid" in self.tensors:
            up = up @ self.factor("mid")
        return self._narrow(self.factor("down")), self._by_rows(up)

    def _kron(self) -> tuple[Tensor, Tensor]:
        w1, w2 = (self._product(f"lokr_{x}", f"lokr_t{x[1]}") for x in ("w1", "w2"))
        return w1, w2

    def _product(self, name: str, core: str) -> Tensor:
        """A factor of LoKr: whole, or the product of two, or of two and a core."""
        if name in self.tensors:
            return self.factor(name)
        return self._hadamard(name, core)

    def _hadamard(self, name: str, core: str) -> Tensor:
        a, b = self.factor(f"{name}_a"), self.factor(f"{name}_b")
        return a.t() @ self.factor(core) @ b if core in self.tensors else a @ b

    # DoRA ----------------------------------------------------------------------------------------------------------

    def _trained(self) -> Tensor:
        """V = W + D, fp32 [rows, K]."""
        return self._own() + self._difference()

    def _gain(self, trained: Tensor) -> tuple[bool, Tensor]:
        """Whether magnitudes are of rows, and magnitude / norm for each: [rows] or [K]."""
        magnitude = self.tensors["magnitude"].float()
        of_columns = magnitude.ndim > 1 and len(magnitude) == 1 and self.rows != 1
        flat = magnitude.flatten()
        if not of_columns:
            return True, self._by_rows(flat) / trained.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        return False, flat[: self.columns] / trained.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny)

    def _dora(self, start: int, dtype: torch.dtype) -> list[Piece]:
        """A low-rank part with the gain in a factor, and the gain of the layer itself; or dense."""
        plain = self._plain(start, torch.float32)
        if not isinstance(plain[0], LowRank):
            return [Dense(self.dense().to(dtype), start)]
        (down, up, unit, _), (by_rows, gain) = plain[0], self._gain(self._trained())
        if by_rows:
            thin = LowRank(down.to(dtype), (up * gain[:, None]).to(dtype), unit, start)
            return [thin, RowGain((gain - 1).to(dtype), start)]
        thin = LowRank((down * gain).to(dtype), up.to(dtype), unit, start)
        return [thin, ColumnGain((gain - 1).to(dtype), start, start + self.rows)]

    # From a tool's order of rows to ours ---------------------------------------------------------------------------

    def _official(self, x: Tensor) -> Tensor:
        """A difference or a factor up of it, by the official rows."""
        return self._narrow(self._by_rows(x))

    def _by_rows(self, x: Tensor) -> Tensor:
        """[n, ...] in the official order of rows, without those that only diffusers' wider MLP has."""
        return _cut(torch.cat(x.chunk(2)[::-1]) if self.module.target.swapped else x, 0, self.rows, self.module)

    def _narrow(self, x: Tensor) -> Tensor:
        """[..., K] without the columns that only diffusers' wider MLP has."""
        return _cut(x, 1, self.columns, self.module)


def _cut(x: Tensor, axis: int, size: int, module: Module) -> Tensor:
    """x without what is behind `size`, which must be zero. FileError."""
    rest = x.narrow(axis, size, x.shape[axis] - size) if x.shape[axis] > size else None
    if rest is None:
        return x
    if rest.any():
        raise FileError(f"{module.stem} trains features that only diffusers' wider MLP has, and they are not zero.")
    return x.narrow(axis, 0, size)
