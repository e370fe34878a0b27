"""The functions that a block calls around its Linears, in plain PyTorch.

Everything in a FLUX block is a Linear or one of these. A block holds them as `block.ops`, a static tuple of functions,
so that fused functions for a device can replace any of them when weights are loaded, without a change to the block.
Functions that compute the input of a Linear, or read its output, get the Linear, so that a fused function can do both
at once. `modulate` returns what its `consumer` takes: a tensor, or quantized tokens (`linears/contract.py`). What
`linear1` returns for the MLP is read by `linear2` alone, in a form that the two agree on.

Rounding: all compute in the dtype of their input, except the norm of q and k, which takes its statistics in fp32 and
rounds before its scale, and RoPE, which rotates in fp32 and rounds once; attention is PyTorch's.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from .rope import apply_rope


def modulation(linear: nn.Linear, vec: Tensor) -> Tensor:
    """SiLU and Linear of the vector that conditions a block: [B, D] -> [B, N], or of S steps [S, B, D] -> [S, B, N].

    Each step has the same bits as when computed alone. Parameters and buffers of a Linear on another device are copied
    to that of vec for the call: a table needs them once.
    """
    if vec.ndim == 3:
        return torch.stack([modulation(linear, step) for step in vec])
    tensors = dict(chain(linear.named_parameters(), linear.named_buffers()))
    if any(x.device != vec.device for x in tensors.values()):
        return functional_call(linear, {name: x.to(vec.device) for name, x in tensors.items()}, (F.silu(vec),))
    return linear(F.silu(vec))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, consumer: nn.Module | None = None) -> Tensor:
    """LayerNorm without its own weights, then the modulation: `(1 + scale) * norm(x) + shift`.

    x: [B, L, D]; shift, scale: [B, 1, D]. consumer: the layer that takes the result, if any, for which a fused function
    may quantize it.
    """
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The residual: `x + gate * y`. x, y: [B, L, D]; gate: [B, 1, D]."""
    return x + gate * y


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the features of a head; statistics in fp32, scale in the dtype of x."""
    x32 = x.float()
    inverse = torch.rsqrt(torch.mean(x32**2, dim=-1, keepdim=True) + 1e-6)
    return (x32 * inverse).to(x.dtype) * scale


def norm_rope(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize q and k per head and rotate them by their positions. q, k: [B, H, L, D]; pe: [B, 1, L, D/2, 2, 2]."""
    return apply_rope(rms_norm(q, q_scale).to(q), pe), apply_rope(rms_norm(k, k_scale).to(k), pe)


Heads = tuple[Tensor, Tensor, Tensor]
"""q, k, v of one stream, [B, H, L, D] each"""
Scales = tuple[Tensor, Tensor]
"""of the norms of q and k, [D] each"""


def norm_rope_join(txt: Heads, img: Heads, txt_scales: Scales, img_scales: Scales, pe: Tensor) -> Heads:
    """A double block's q, k, v over the joined sequence, text first; `norm_rope` of both streams. pe: of all tokens."""
    length = txt[0].shape[2]
    txt_q, txt_k = norm_rope(txt[0], txt[1], *txt_scales, pe[:, :, :length])
    img_q, img_k = norm_rope(img[0], img[1], *img_scales, pe[:, :, length:])
    return torch.cat((txt_q, img_q), dim=2), torch.cat((txt_k, img_k), dim=2), torch.cat((txt[2], img[2]), dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention over the joined sequence. q, k, v: [B, H, L, D] -> [B, L, H*D]."""
    x = F.scaled_dot_product_attention(q, k, v)
    return rearrange(x, "B H L D -> B L (H D)")


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """A double block's MLP: Linear, GELU, Linear. [B, L, D] -> [B, L, D]."""
    return layers(x)


def linear1(linear: nn.Linear, x: Tensor, split: list[int]) -> tuple[Tensor, Tensor]:
    """A single block's first Linear: [B, L, D] -> qkv [B, L, 3*D] and the MLP's hidden features [B, L, M]."""
    qkv, hidden = torch.split(linear(x), split, dim=-1)
    return qkv, hidden


def linear2(linear: nn.Linear, attn: Tensor, hidden: Tensor) -> Tensor:
    """A single block's second Linear: attention [B, L, D] and activated hidden features, concatenated -> [B, L, D]."""
    return linear(torch.cat((attn, F.gelu(hidden, approximate="tanh")), dim=2))


class Ops(NamedTuple):
    """The functions that a block calls around its Linears."""

    modulation: Callable[[nn.Linear, Tensor], Tensor] = modulation
    modulate: Callable[..., Any] = modulate
    gated_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = gated_sum
    norm_rope: Callable[..., tuple[Tensor, Tensor]] = norm_rope
    norm_rope_join: Callable[..., Heads] = norm_rope_join
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend
    mlp: Callable[[nn.Sequential, Tensor], Tensor] = mlp
    linear1: Callable[[nn.Linear, Tensor, list[int]], tuple[Tensor, Any]] = linear1
    linear2: Callable[[nn.Linear, Tensor, Any], Tensor] = linear2


PLAIN = Ops()
