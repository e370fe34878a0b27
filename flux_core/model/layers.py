"""The small layers of FLUX.1, named as in the official checkpoint."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops


def timestep_embedding(t: Tensor, dim: int, max_period: int = 10_000, time_factor: float = 1000.0) -> Tensor:
    """Sinusoidal embedding of a time in [0, 1]. t: [B] -> [B, dim], cosines first, in the dtype of t.

    The product with 1000 rounds in the dtype of t, as in the official code: in bf16 that moves the time by up to 0.2 %.
    """
    t = time_factor * t
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1).to(t.dtype)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: embeds time, guidance or the CLIP vector; their sum is `vec`."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class Embedding(nn.Embedding):
    """Rows by number. They begin as uniform numbers: to draw normal ones on `meta`, torch imports its compiler."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -1.0, 1.0)


class RMSNorm(nn.Module):
    """Holds the scale of a norm; `ops.norm_rope` applies it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    """RMS norms of queries and keys, each with a scale for every feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        return self.query_norm.scale, self.key_norm.scale


class SelfAttention(nn.Module):
    """The weights of one stream's attention; the double block computes the joint attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


class ModulationOut(NamedTuple):
    """Shift, scale and gate of one residual branch, [B, 1, D] each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """vec [B, D] -> shift, scale and gate; two sets of them (attention, MLP) in a double block.

    For vec of S steps, [S, B, D], each is [S, B, 1, D].
    """

    ops = ops.PLAIN

    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.multiplier = 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        out = self.ops.modulation(self.lin, vec)[..., None, :].chunk(self.multiplier, dim=-1)
        return tuple(ModulationOut(*out[i : i + 3]) for i in range(0, self.multiplier, 3))
