"""Attention in int8 as a Triton kernel, of codes by `codes.quantize`: a head's block of queries in one program.

Flash attention (arXiv 2205.14135): for each block of keys s = q k^T, p = 2^(s - m) with the largest s so far as m, and
o = sum p v / sum p, with p in e4m3 from 0 to 256. Codes are padded to whole blocks of tokens with zeros, so that only
sums of the last block are masked.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import quantize
from .eight_bits import BLOCK, Eight
from .launch import cdiv, opaque


class Tiles(NamedTuple):
    """What a program attends: queries, and keys at a time."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None
    """that a thread may take at most"""


TILES = Tiles(64, 64, 4, 3, 168)
"""the quickest of `benchmarks/attention.py --parts tiles`; with 168 registers a multiprocessor takes three programs"""


@triton.jit
def attend_kernel(
    q, k, v, q_scale, k_scale, v_scale, out, L, padded, H, factor,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """factor: log2(e) / sqrt(D). KEYS: that share a scale. EVEN: whether L is a multiple of BLOCK_N."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    one = (batch * H + head).to(tl.int64)
    row, key, col = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    x = tl.load(q + (one * padded + row)[:, None] * D + col[None, :])
    k += (one * padded + key)[:, None] * D + col[None, :]
    v += (one * D + col)[:, None] * padded + key[None, :]
    scale = tl.load(q_scale + one * padded + row) * factor
    k_scale += one * (padded // KEYS)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, L, BLOCK_N):
        s = tl.dot(x, tl.trans(tl.load(k + start * D)), out_dtype=tl.int32).to(tl.float32)
        by = scale * tl.load(k_scale + start // KEYS)
        if not EVEN:
            s = tl.where((start + key < L)[None, :], s, -float("inf"))
        now = tl.maximum(most, by * tl.max(s, axis=1))
        p = tl.exp2(s * by[:, None] - (now - 8.0)[:, None])  # to 256, in the middle of what e4m3 has
        fade = tl.exp2(most - now)
        total = total * fade + tl.sum(p, axis=1)
        p = tl.permute(tl.reshape(p.to(tl.float8e4nv), (BLOCK_M, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
        z = tl.trans(tl.load(v + start))
        # Hopper's units add up e4m3 with 14 bits: by all keys' sum 5 % of the result would be gone
        sums = tl.dot(tl.reshape(p, (BLOCK_M, BLOCK_N)), z, sums * fade[:, None], max_num_imprecise_acc=BLOCK_N)
        most = now
    y = sums * (1.0 / total)[:, None] * tl.load(v_scale + one * D + col)[None, :]
    place = out + ((batch.to(tl.int64) * L + row)[:, None] * H + head) * D + col[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(row < L)[:, None])


def attend_codes(eight: Eight, tokens: int, dtype: torch.dtype, tiles: Tiles = TILES) -> Tensor:
    """Attention of codes by `codes.quantize`: [B, tokens, H*D] in that dtype. tiles.n: a divisor of `BLOCK`."""
    B, H, padded, D = eight.q.shape
    out = torch.empty((B, tokens, H * D), dtype=dtype, device=eight.q.device)
    attend_kernel[(cdiv(tokens, tiles.m), H, B)](
        *eight, out, tokens, padded, H, 1.4426950408889634 * D**-0.5,
        D=D, BLOCK_M=tiles.m, BLOCK_N=tiles.n, KEYS=BLOCK, EVEN=tokens % tiles.n == 0,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return out


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


@opaque("attend_int8", _attended)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attend` in int8, without a gradient. q, k, v: [B, H, L, D] -> [B, L, H*D]"""
    return attend_codes(quantize(q, k, v, "int8"), q.shape[2], q.dtype)
