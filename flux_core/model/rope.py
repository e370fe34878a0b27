"""Rotary position embedding on three axes (t, h, w): RoFormer (arXiv 2104.09864), as FLUX.1 applies it.

A head's features are cut into one group per axis (16, 56, 56 of 128 in FLUX.1). Within a group, the pair of adjacent
features 2i and 2i+1 is rotated by `position * theta^(-2i/d)`. The angles are kept as 2x2 rotation matrices, as in the
official code, so one line without einsum applies them.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


def rope(pos: Tensor, dim: int, theta: int) -> Tensor:
    """Rotation matrices of one axis. pos: [..., L] -> [..., L, dim/2, 2, 2], fp32."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=pos.device) / dim
    angle = pos.float().unsqueeze(-1) * (1.0 / theta**exponent)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return rearrange(torch.stack([cos, -sin, sin, cos], dim=-1), "... (i j) -> ... i j", i=2, j=2)


def embed_nd(ids: Tensor, axes_dim: Sequence[int], theta: int) -> Tensor:
    """Rotation matrices of every token. ids: [B, L, axes] -> [B, 1, L, sum(axes_dim)/2, 2, 2]."""
    axes = [rope(ids[..., i], dim, theta) for i, dim in enumerate(axes_dim)]
    return torch.cat(axes, dim=-3).unsqueeze(1)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """x with adjacent feature pairs rotated, in fp32. x: [B, H, L, D]; pe: [B, 1, L, D/2, 2, 2]; dtype of x is kept."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    rotated = pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]
    return rotated.reshape(x.shape).to(x.dtype)
