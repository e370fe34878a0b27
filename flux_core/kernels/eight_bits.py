"""Attention in eight bits, in plain PyTorch: what `flash` computes by kernels, and what its error is measured with.

The idea. softmax(q k^T / sqrt(D)) v has two products, and in eight bits each takes half of its time in bf16. Three
equalities make q and k fit into eight bits:

    softmax_n(q_m . (k_n - c)) = softmax_n(q_m . k_n)      for any c, since q_m . c is the same for all keys n
    (q R) . (k R) = q . k                                  for an orthogonal R
    sum_n p_mn v_nd = s_d sum_n p_mn (v_nd / s_d)          for any s

c is the mean of every eighth of a head's keys: many features of a key are nearly the same for all tokens. R is the
rotation of `linears/int8.py` in groups of 64 features, after RoPE: the norms of q and k have learned scales, by which a
few features are much larger than others, and rotated all are alike. So are the largest of neighbouring keys, and a
block of 64 keys may share a scale:

    int8    a_m = max_d |(q R)_md| / 127       b_n = the same over a block of keys      q R ~ round(q R / a) a
    fp8     no scales: rotated numbers lie between 2^-6 and 448, where e4m3 rounds all alike, and beyond they are cut

v is e4m3 in both, with a scale for each feature by int8, and one for all by fp8, which is cuDNN's kernel and writes the
result in e4m3 by that scale, too. p is e4m3, with a row's largest at 256 or 448; its sum is taken before it is rounded.

The error on flux-mini, and what each part has in it: docs/precision.md.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..linears.int8 import rotate

FORMS = ("int8", "fp8")
BLOCK = 64
"""tokens that codes are padded to, and keys that share a scale"""
EVERY = 8
"""of keys this one is in the mean: any vector near it will do"""
GROUP = 64
"""features that are rotated together"""
LARGEST = 127
SMALLEST = 1e-12
"""of the scales, so that the product of two is no zero"""
E4M3, E4M3_LARGEST = torch.float8_e4m3fn, 448.0
P_LARGEST = {"int8": 256.0, "fp8": 448.0}
"""of the codes of p, that of a row's largest logit"""


class Eight(NamedTuple):
    """q, k and v in eight bits, with tokens padded to P, whole blocks, by zeros."""

    q: Tensor
    """int8 or e4m3 [B, H, P, D], rotated"""
    k: Tensor
    """likewise, centred and rotated"""
    v: Tensor
    """e4m3, by int8 [B, H, D, P], by fp8 [B, H, P, D]"""
    q_scale: Tensor
    """fp32 [B, H, P]; empty by fp8"""
    k_scale: Tensor
    """fp32 [B, H, P / BLOCK]; empty by fp8"""
    v_scale: Tensor
    """fp32 [B, H, D]; by fp8 [1]"""


def quantize(q: Tensor, k: Tensor, v: Tensor, form: str) -> Eight:
    """The codes of q, k, v [B, H, L, D], where D is a multiple of 64. form: of `FORMS`."""
    padding = (0, 0, 0, -q.shape[2] % BLOCK)
    k = k.float() - k[:, :, ::EVERY].float().mean(2, keepdim=True)
    q, k = (F.pad(rotate(x, GROUP), padding) for x in (q, k))
    largest = v.float().abs().amax(2) if form == "int8" else v.float().abs().max()
    v_scale = (largest / E4M3_LARGEST).clamp(min=SMALLEST)
    v = F.pad(to_e4m3(v / (v_scale[:, :, None] if form == "int8" else v_scale)).view(torch.uint8), padding).view(E4M3)
    if form == "fp8":
        none = v_scale.new_empty(*q.shape[:2], 0)
        return Eight(to_e4m3(q), to_e4m3(k), v, none, none, v_scale.reshape(1))
    q_scale = (q.abs().amax(-1) / LARGEST).clamp(min=SMALLEST)
    k_scale = (k.unflatten(2, (-1, BLOCK)).abs().amax((3, 4)) / LARGEST).clamp(min=SMALLEST)
    q, k = (q / q_scale[..., None]).round(), (k / of_keys(k_scale)[..., None]).round()
    return Eight(q.to(torch.int8), k.to(torch.int8), v.mT.contiguous(), q_scale, k_scale, v_scale)


def to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(E4M3)


def of_keys(scale: Tensor) -> Tensor:
    """The scale of each key, from those of blocks. [B, H, N] -> [B, H, N * BLOCK]"""
    return scale.repeat_interleave(BLOCK, dim=-1)


def attend_codes(eight: Eight, tokens: int, form: str) -> Tensor:
    """Attention of codes, fp32 [B, tokens, H*D]; p is rounded with the largest logit of its whole row."""
    logits = eight.q.float() @ eight.k[:, :, :tokens].float().mT * eight.q.shape[-1] ** -0.5
    if form == "int8":
        logits *= eight.q_scale[..., None] * of_keys(eight.k_scale)[:, :, None, :tokens]
    p = torch.exp(logits - logits.amax(-1, keepdim=True)) * P_LARGEST[form]
    v = (eight.v.mT if form == "int8" else eight.v)[:, :, :tokens].float()
    x = p.to(E4M3).float() @ v / p.sum(-1, keepdim=True)
    x = x * eight.v_scale[:, :, None] if form == "int8" else to_e4m3(x).float() * eight.v_scale
    return rearrange(x[:, :, :tokens], "B H L D -> B L (H D)")


def attend(q: Tensor, k: Tensor, v: Tensor, form: str) -> Tensor:
    """`ops.attend` in that form: [B, H, L, D] each -> [B, L, H*D] in the dtype of q."""
    return attend_codes(quantize(q, k, v, form), q.shape[2], form).to(q.dtype)
