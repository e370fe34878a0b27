"""The few functions that a block calls between its Linears, plain and readable.

Everything in a FLUX block is a Linear, a gated sum, or one of these five. A block holds them as `block.ops`, a static
tuple of functions, so that a fused twin for one kind of device can take the place of any of them when weights are
loaded, while the block's own text stays as it is.

Where each rounds is part of the contract: `modulate` and `join_gelu` work in the dtype of their input; the norm of q
and k takes its statistics in fp32 and rounds before its scale; RoPE turns in fp32 and rounds once at its end;
attention is left to PyTorch's fused kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .rope import apply_rope


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without its own weights, then the modulation: `(1 + scale) * norm(x) + shift`.

    x: [B, L, D]; shift, scale: [B, 1, D].
    """
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the features of a head; statistics in fp32, scale in the dtype of x."""
    x32 = x.float()
    inverse = torch.rsqrt(torch.mean(x32**2, dim=-1, keepdim=True) + 1e-6)
    return (x32 * inverse).to(x.dtype) * scale


def norm_rope(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize q and k per head and turn them by their positions. q, k: [B, H, L, D]; pe: [B, 1, L, D/2, 2, 2]."""
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


def join_gelu(attn: Tensor, mlp: Tensor) -> Tensor:
    """The input of a single block's second Linear: attention beside the activated MLP, [B, L, D + M]."""
    return torch.cat((attn, F.gelu(mlp, approximate="tanh")), dim=2)


class Ops(NamedTuple):
    """What a block computes between its Linears."""

    modulate: Callable[[Tensor, Tensor, Tensor], Tensor] = modulate
    norm_rope: Callable[..., tuple[Tensor, Tensor]] = norm_rope
    norm_rope_join: Callable[..., Heads] = norm_rope_join
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend
    join_gelu: Callable[[Tensor, Tensor], Tensor] = join_gelu


PLAIN = Ops()
