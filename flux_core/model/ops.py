"""The few functions that a block calls around its Linears, plain and readable.

Everything in a FLUX block is a Linear or one of these. A block holds them as `block.ops`, a static tuple
of functions, so that a fused twin for one kind of device can take the place of any of them when weights are loaded,
while the block's own text stays as it is. Those that work on the input or the output of a Linear are given the Linear,
so that a twin can do both at once; what one of them hands to the next is their own affair: `modulate` gives what a
Linear takes, and the MLP's part of `linear1` is read by `linear2` alone.

Where each rounds is part of the contract: all work in the dtype of their input, but for the norm of q and k, which
takes its statistics in fp32 and rounds before its scale, and RoPE, which turns in fp32 and rounds once at its end;
attention is left to PyTorch's fused kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from .rope import apply_rope


def modulation(linear: nn.Linear, vec: Tensor) -> Tensor:
    """SiLU and Linear of what conditions a block: vec [B, D], or [S, B, D] at S steps -> as many rows of [N].

    Of several steps each is computed as it would be alone, to the bit. A Linear that is not where vec is comes there
    for the length of the call: a table needs it once.
    """
    if vec.ndim == 3:
        return torch.stack([modulation(linear, one) for one in vec])
    if any(x.device != vec.device for x in linear.parameters()):
        return functional_call(linear, brought(linear, vec.device), (F.silu(vec),))
    return linear(F.silu(vec))


def brought(linear: nn.Linear, device: torch.device) -> dict[str, Tensor]:
    """Its tensors on that device."""
    return {name: x.to(device) for name, x in linear.state_dict().items()}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without its own weights, then the modulation: `(1 + scale) * norm(x) + shift`.

    x: [B, L, D]; shift, scale: [B, 1, D].
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


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """A double block's MLP: Linear, GELU, Linear. [B, L, D] -> [B, L, D]."""
    return layers(x)


def linear1(linear: nn.Linear, x: Tensor, split: list[int]) -> tuple[Tensor, Tensor]:
    """A single block's first Linear: [B, L, D] -> qkv [B, L, 3*D] and the MLP's part [B, L, M], for `linear2`."""
    qkv, hidden = torch.split(linear(x), split, dim=-1)
    return qkv, hidden


def linear2(linear: nn.Linear, attn: Tensor, hidden: Tensor) -> Tensor:
    """Its second: of attention [B, L, D] beside the MLP's part, activated. -> [B, L, D]"""
    return linear(torch.cat((attn, F.gelu(hidden, approximate="tanh")), dim=2))


class Ops(NamedTuple):
    """What a block computes beside its Linears."""

    modulation: Callable[[nn.Linear, Tensor], Tensor] = modulation
    modulate: Callable[[Tensor, Tensor, Tensor], Any] = modulate
    gated_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = gated_sum
    norm_rope: Callable[..., tuple[Tensor, Tensor]] = norm_rope
    norm_rope_join: Callable[..., Heads] = norm_rope_join
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend
    mlp: Callable[[nn.Sequential, Tensor], Tensor] = mlp
    linear1: Callable[[nn.Linear, Tensor, list[int]], tuple[Tensor, Tensor]] = linear1
    linear2: Callable[[nn.Linear, Tensor, Tensor], Tensor] = linear2


PLAIN = Ops()
