"""Factors that learn, of one module each, beside a frozen Linear: y = W x + s B A x.

    LoRA    s = alpha / rank (Hu et al. 2021)
    rsLoRA  s = alpha / sqrt(rank), which does not fade with the rank (Kalajdzievski 2023, arXiv 2312.03732)
    T-LoRA  the first r(t) rows of A alone, by the noise level of each picture (`lora/ranks.py`)
    DoRA    y = m V / |V| x with V = W + s B A: rows have a magnitude m and a direction (Liu et al. 2024, arXiv
            2402.09353); |V| is that of each row, and has no gradient, as in PEFT

`lokr.py` has another form of the same interface.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.keymaps import swap_halves
from ..errors import UsageError
from ..linears.frozen import Frozen
from ..lora.dialects import Target

PREFIX = "transformer."
"""before every key of a file"""
ENDINGS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""of a file's keys, by the parameter's name in `Factors`"""


class Learned(nn.Module):
    """What learns beside rows `start` to `stop` of a Linear, in fp32. Before the first step they are as they were."""

    mask: Tensor | None = None
    """of T-LoRA's active ranks, [B, rank]; None: all of all pictures"""
    later = "up"
    """the factor that begins at zero: B, which LoRA+ gives a rate of its own"""

    def __init__(self, target: Target, rank: int, scale: float) -> None:
        super().__init__()
        self.target, self.rank, self.scale = target, rank, scale

    def rows_of(self, x: Tensor) -> Tensor:
        """What of a layer's weight or bias is of these rows."""
        return x[self.target.start : self.target.stop]

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the first numbers."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """These rows' outputs, of the layer's inputs and of its own outputs y. [..., K], [..., N] -> [..., N]"""
        raise NotImplementedError

    def change(self, own: Tensor) -> Tensor:
        """The difference to these rows of the layer's weight, which are `own`, dense. [N, K] -> [N, K]"""
        raise NotImplementedError

    # In a file, whose modules are diffusers' ---------------------------------------------------------------

    def key(self, name: str, role: str) -> str:
        """The key of a parameter."""
        raise NotImplementedError

    def to_file(self, role: str, x: Tensor) -> Tensor:
        """A parameter, or its gradient, as diffusers has it."""
        return x

    def from_file(self, role: str, x: Tensor) -> Tensor:
        """The opposite; may have more rows and columns."""
        return x

    def beside(self, name: str) -> dict[str, Tensor]:
        """Other tensors of a file, which do not learn."""
        return {}


def draw_below(x: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill x with uniform numbers between -bound and bound, drawn on the CPU."""
    drawn = torch.empty(x.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        x.copy_(drawn)


class Factors(Learned):
    """LoRA's factors: the rows change by scale * up @ down."""

    def __init__(self, target: Target, columns: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__(target, rank, scale)
        rows = target.stop - target.start
        self.down = nn.Parameter(torch.empty(rank, columns, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=device))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Uniform numbers below sqrt(1 / columns) in `down`, as PEFT draws them, and zeros in `up`."""
        draw_below(self.down, 1 / math.sqrt(self.down.shape[1]), generator)
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """`Learned.forward`"""
        return y + self.product(x, self.up).to(y.dtype)

    def product(self, x: Tensor, up: Tensor) -> Tensor:
        """scale * up @ down @ x, in the dtype of x, of the ranks that are active."""
        thin = F.linear(x, self.down.to(x.dtype))
        if self.mask is not None:
            thin = thin * self.mask.reshape(-1, *[1] * (x.ndim - 2), self.rank).to(x.dtype)
        return self.scale * F.linear(thin, up.to(x.dtype))

    @torch.no_grad()
    def change(self, own: Tensor) -> Tensor:
        """`Learned.change`, with all ranks."""
        return self.scale * self.up @ self.down

    def key(self, name: str, role: str) -> str:
        """PEFT's."""
        return f"{PREFIX}{name}.{ENDINGS[role]}"

    def to_file(self, role: str, x: Tensor) -> Tensor:
        """By diffusers' order of rows, with zeros for what only its wider MLP has."""
        if role == "down":
            return F.pad(x, (0, self.target.spare_columns))
        x = swap_halves(x) if self.target.swapped else x
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, self.target.spare_rows))

    def from_file(self, role: str, x: Tensor) -> Tensor:
        """By our order of rows; what only diffusers' wider MLP has is behind them."""
        return swap_halves(x) if self.target.swapped and role != "down" else x


class DoraFactors(Factors):
    """DoRA's factors: those of LoRA, and a magnitude for each row."""

    def __init__(
        self, target: Target, columns: int, rank: int, scale: float, device: torch.device, weight: Tensor
    ) -> None:
        super().__init__(target, columns, rank, scale, device)
        self.squares: Tensor
        """of the weight's rows, summed"""
        self.register_buffer("squares", self.rows_of(weight).square().sum(1), persistent=False)
        self.magnitude = nn.Parameter(root(self.squares))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """`Factors.forward`. A bias is no part of the direction."""
        gain = self.magnitude / self.norms(base, x.dtype)
        bias = cast(Tensor | None, base.bias)
        own = y if bias is None else y - self.rows_of(bias).to(y.dtype)
        return y + (gain - 1).to(y.dtype) * own + self.product(x, gain[:, None] * self.up).to(y.dtype)

    @torch.no_grad()
    def norms(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """|V| by rows, fp32 [N], without V: |W|^2 + 2 B (s A W^T) + B (s^2 A A^T) B^T."""
        weight = self.rows_of(weight_of(base, dtype))
        mixed = F.linear(self.down.to(dtype), weight).t().float()
        inner = 2 * self.scale * mixed + self.scale**2 * self.up @ (self.down @ self.down.t())
        return root(self.squares + (self.up * inner).sum(1))

    @torch.no_grad()
    def change(self, own: Tensor) -> Tensor:
        """`Factors.change`"""
        trained = own + super().change(own)
        return trained * (self.magnitude / root(trained.square().sum(1)))[:, None] - own


def root(x: Tensor) -> Tensor:
    """sqrt(x), above 0 where rounding leaves nothing."""
    return x.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A layer's weight [N, K] in that dtype, whatever format it is in. UsageError for a layer that cannot say."""
    if isinstance(layer, Frozen):
        return layer.widen(dtype)
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().to(dtype)
    raise UsageError(
        f"{type(layer).__name__} does not tell its weight, which DoRA and the table of changes need. Next: take off "
        "what is attached to the model, or train without them"
    )
