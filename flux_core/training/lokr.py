"""LoKr (Yeh et al. 2024, "Navigating Text-To-Image Customization", arXiv 2309.14859): W x + s kron(w1, w2) x.

A Linear of N rows and K columns is cut into N = a c and K = b d; w1 is [a, b] and w2 [c, d], so that the difference has
any rank up to N, of few numbers. w2 is a product of two factors of the rank, or whole where those would not be smaller
than half of it. s is alpha / rank for two factors; for a whole w2 it is 1. Keys and rules are LyCORIS'
(`lycoris/modules/lokr.py`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.keymaps import swap_halves
from ..lora.dialects import Target, flat
from .factors import Learned, draw_below


def split(size: int, factor: int) -> tuple[int, int]:
    """The size as a product, the smaller first: its largest divisor up to the factor (-1: any) and to its root."""
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first


def shapes(rows: int, columns: int, rank: int, factor: int) -> dict[str, tuple[int, int]]:
    """The sizes of what learns beside a Linear, by LyCORIS' names."""
    (a, c), (b, d) = split(rows, factor), split(columns, factor)
    whole = 2 * rank >= max(c, d)
    return {"w1": (a, b), "w2": (c, d)} if whole else {"w1": (a, b), "w2_a": (c, rank), "w2_b": (rank, d)}


class LokrFactors(Learned):
    """LoKr's factors of one module, by diffusers' order of rows; rows that only its wider MLP has are no part of it."""

    def __init__(
        self, target: Target, columns: int, rank: int, alpha: float, factor: int, device: torch.device
    ) -> None:
        sizes = shapes(target.stop - target.start, columns, rank, factor)
        whole = "w2" in sizes
        super().__init__(target, rank, 1.0 if whole else alpha / rank)
        self.later = "w2" if whole else "w2_b"
        self.alpha = float(rank) if whole else alpha  # of a whole w2, where it means nothing, as LyCORIS writes it
        for role, size in sizes.items():
            self.register_parameter(role, nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device)))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Uniform numbers below sqrt(1 / columns), as LyCORIS draws them, and zeros in the last factor."""
        for role, x in self.named_parameters():
            if role == self.later:
                nn.init.zeros_(x)
            else:
                draw_below(x, 1 / math.sqrt(x.shape[1]), generator)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """w1 [a, b] and w2 [c, d]."""
        of = dict(self.named_parameters())
        return of["w1"], of["w2"] if "w2" in of else of["w2_a"] @ of["w2_b"]

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """`Learned.forward`, without the Kronecker product."""
        w1, w2 = (one.to(x.dtype) for one in self._pair())
        inner = F.linear(x.unflatten(-1, (w1.shape[1], w2.shape[1])), w2)  # [..., b, c]
        rows = self.scale * torch.einsum("ab,...bc->...ac", w1, inner).flatten(-2)
        return y + (torch.cat(rows.chunk(2, dim=-1)[::-1], dim=-1) if self.target.swapped else rows).to(y.dtype)

    @torch.no_grad()
    def change(self, own: Tensor) -> Tensor:
        """`Learned.change`"""
        whole = self.scale * torch.kron(*self._pair())
        return swap_halves(whole) if self.target.swapped else whole

    def key(self, name: str, role: str) -> str:
        """LyCORIS'."""
        return f"lycoris_{flat(name)}.lokr_{role}"

    def beside(self, name: str) -> dict[str, Tensor]:
        """Its alpha."""
        return {f"lycoris_{flat(name)}.alpha": torch.tensor(self.alpha, dtype=torch.float32, device="cpu")}
