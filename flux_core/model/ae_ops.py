"""The functions around the autoencoder's convolutions, in plain PyTorch; `ops.py` says why they are functions.

A convolution or norm that a fused function computes with its neighbour is an argument of one function for both.
All feature maps are [B, C, H, W], in any memory format.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return norm(x)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x))


def conv_norm_silu(conv: nn.Conv2d, norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(conv(x)))


def conv_add(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    return conv(x) + residual


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention over all positions: q, k, v [B, C, H, W] -> [B, C, H, W]."""
    height = q.shape[2]
    q, k, v = (rearrange(x, "B C H W -> B 1 (H W) C").contiguous() for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "B 1 (H W) C -> B C H W", H=height)


def upsample_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution: [B, C, H, W] -> [B, C', 2H, 2W]."""
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class AeOps(NamedTuple):
    """The functions that the autoencoder's blocks call around their convolutions."""

    norm: Callable[[nn.GroupNorm, Tensor], Tensor] = norm
    norm_silu: Callable[[nn.GroupNorm, Tensor], Tensor] = norm_silu
    conv_norm_silu: Callable[[nn.Conv2d, nn.GroupNorm, Tensor], Tensor] = conv_norm_silu
    conv_add: Callable[[nn.Conv2d, Tensor, Tensor], Tensor] = conv_add
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend
    upsample_conv: Callable[[nn.Conv2d, Tensor], Tensor] = upsample_conv


PLAIN = AeOps()
