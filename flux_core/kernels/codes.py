"""Queries, keys and values in eight bits as Triton kernels: the codes of `eight_bits.quantize`.

sums        of every eighth key, for the mean, in pieces that `rotate` adds up
rotate      queries, and then keys: one read, and their codes written, with heads outside tokens
largest     of v, one read: of each feature, or of all, in pieces
values      of v, another read, and codes written
widened     what a kernel wrote in e4m3, times its scale

Each takes tensors as the norm before it leaves them, tokens outside heads. Both in one kernel, from the products of the
Linears, took longer than norm and codes apart: 0.18 for 0.13 ms of a step's 4608 tokens (H200).

*The order of values' tokens*, by int8. The sum over keys has no order. An accumulator gives a thread the columns 2t,
2t + 1, and 8 + 2t, 8 + 2t + 1 of each 16; as the first operand in eight bits it wants 4t to 4t + 3. So p stays where it
is and its columns are renamed, and the values of tokens are written in the renamed order: no exchange between threads.
They are transposed, since units that multiply e4m3 on Hopper take the second operand with the summed index innermost.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linears.int8 import hadamard
from .eight_bits import BLOCK, E4M3, EVERY, GROUP, LARGEST, SMALLEST, Eight
from .int8 import rounded
from .launch import cdiv, dense_rows

PIECE = 4
"""blocks that one program reads for a statistic"""
WARPS = 4


@triton.jit
def sums_kernel(
    x, sums, x_batch, x_head, x_row, L,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Sums of one token in EVERY."""
    piece, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, col = piece * PIECE * BLOCK + EVERY * tl.arange(0, PIECE * BLOCK // EVERY), tl.arange(0, D)
    at = x + batch * x_batch + head * x_head + row.to(tl.int64)[:, None] * x_row + col[None, :]
    y = tl.load(at, mask=(row < L)[:, None], other=0.0).to(tl.float32)
    at = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + piece) * D + col
    tl.store(sums + at, tl.sum(y, axis=0))


@triton.jit
def largest_kernel(
    x, largest, x_batch, x_head, x_row, L,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    piece, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x += batch * x_batch + head * x_head
    col, most = tl.arange(0, D), tl.zeros((D,), tl.float32)
    for i in range(PIECE):
        row = (piece * PIECE + i) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(x + row.to(tl.int64)[:, None] * x_row + col[None, :], mask=(row < L)[:, None], other=0.0)
        most = tl.maximum(most, tl.max(tl.abs(y.to(tl.float32)), axis=0))
    at = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + piece
    if FEATURES:
        tl.store(largest + at * D + col, most)
    else:
        tl.store(largest + at, tl.max(most, axis=0))


@triton.jit
def e4m3(y):
    return tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def rotate_kernel(
    x, sums, rotation, codes, scale, x_batch, x_head, x_row, L, pieces,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, EVERY: tl.constexpr, CENTRED: tl.constexpr,
    INT8: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """CENTRED: keys, less their mean, with one scale for a block; else queries, with a scale each."""
    head, block, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    one, padded = batch * tl.num_programs(0) + head, tl.num_programs(1) * BLOCK
    row, col, group = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, 64)
    inside = (row < L)[:, None]
    at = x + batch * x_batch + head * x_head + row.to(tl.int64)[:, None] * x_row + col[None, :]
    y = tl.load(at, mask=inside, other=0.0)
    turn = tl.load(rotation + group[:, None] * 64 + group[None, :])
    if CENTRED:
        piece = tl.arange(0, PIECES)
        found = sums + (one * pieces + piece[:, None]) * D + col[None, :]
        centre = tl.sum(tl.load(found, mask=(piece < pieces)[:, None], other=0.0), axis=0) / tl.cdiv(L, EVERY)
        y = tl.where(inside, y.to(tl.float32) - centre[None, :], 0.0)
    y = tl.reshape(y.to(turn.dtype), (BLOCK * D // 64, 64))
    y = tl.reshape(tl.dot(y, turn, input_precision="ieee"), (BLOCK, D))
    to = codes + (one * padded + row.to(tl.int64)[:, None]) * D + col[None, :]
    if not INT8:
        tl.store(to, e4m3(y))
    elif CENTRED:
        own = tl.maximum(tl.max(tl.max(tl.abs(y), axis=1), axis=0) / LARGEST, SMALLEST)
        tl.store(to, rounded(y * (1.0 / own)))
        tl.store(scale + one * tl.num_programs(1) + block, own)
    else:
        own = tl.maximum(tl.max(tl.abs(y), axis=1) / LARGEST, SMALLEST)
        tl.store(to, rounded(y * (1.0 / own)[:, None]))
        tl.store(scale + one * padded + row, own)


@triton.jit
def values_kernel(
    x, largest, codes, scale, x_batch, x_head, x_row, L, pieces,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, FEATURES: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """FEATURES: a scale for each, and codes transposed, in the units' order of tokens; else one scale of all."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    one, padded = batch * tl.num_programs(1) + head, tl.num_programs(0) * BLOCK
    row, col, piece = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, PIECES)
    at = x + batch * x_batch + head * x_head + row.to(tl.int64)[:, None] * x_row + col[None, :]
    y = tl.load(at, mask=(row < L)[:, None], other=0.0).to(tl.float32)
    if FEATURES:
        found = largest + (one * pieces + piece[:, None]) * D + col[None, :]
        most = tl.max(tl.load(found, mask=(piece < pieces)[:, None], other=0.0), axis=0)
        own = tl.maximum(most / 448.0, SMALLEST)
        y = tl.trans(e4m3(y * (1.0 / own)[None, :]))
        y = tl.permute(tl.reshape(y, (D, BLOCK // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
        to = codes + (one * D + col.to(tl.int64)[:, None]) * padded + block * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(to, tl.reshape(y, (D, BLOCK)))
        if block == 0:
            tl.store(scale + one * D + col, own)
    else:
        most = tl.max(tl.load(largest + piece, mask=piece < pieces, other=0.0), axis=0)
        own = tl.maximum(most / 448.0, SMALLEST)
        tl.store(codes + (one * padded + row.to(tl.int64)[:, None]) * D + col[None, :], e4m3(y * (1.0 / own)))
        if block == 0:  # all programs of a block write the same
            tl.store(scale, own)
            tl.store(scale + 1, 1.0 / own)


@triton.jit
def widened_kernel(codes, scale, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(codes + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < count)


def quantize(q: Tensor, k: Tensor, v: Tensor, form: str) -> Eight:
    """`eight_bits.quantize` of q, k, v [B, H, L, D]; by int8 values are in the units' order of tokens, and by fp8
    `v_scale` [2] has the scale's inverse behind it."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    (q, k, q_scale, k_scale), (v, v_scale) = tokens(q, k, form == "int8"), values(v, form == "int8")
    return Eight(q, k, v, q_scale, k_scale, v_scale)


def tokens(q: Tensor, k: Tensor, int8: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of q and k [B, H, P, D], and their scales [B, H, P] and [B, H, P / BLOCK], empty for e4m3."""
    B, H, L, D = q.shape
    blocks = cdiv(L, BLOCK)
    pieces, kind = cdiv(blocks, PIECE), torch.int8 if int8 else E4M3
    q_codes, k_codes = (torch.empty((B, H, blocks * BLOCK, D), dtype=kind, device=q.device) for _ in range(2))
    sums, q_scale, k_scale = (
        torch.empty((B, H, *size), dtype=torch.float32, device=q.device)
        for size in ((pieces, D), (blocks * BLOCK if int8 else 0,), (blocks if int8 else 0,))
    )
    sums_kernel[(pieces, H, B)](
        k, sums, *k.stride()[:3], L, D=D, BLOCK=BLOCK, PIECE=PIECE, EVERY=EVERY, num_warps=WARPS
    )
    for x, codes, scale, keys in ((q, q_codes, q_scale, False), (k, k_codes, k_scale, True)):
        rotate_kernel[(H, blocks, B)](
            x, sums, rotation(q.dtype if q.is_cuda else torch.float32, q.device), codes, scale, *x.stride()[:3], L,
            pieces, D=D, BLOCK=BLOCK, PIECES=triton.next_power_of_2(pieces), EVERY=EVERY, CENTRED=keys, INT8=int8,
            LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=WARPS,
        )  # fmt: skip
    return q_codes, k_codes, q_scale, k_scale


@cache
def rotation(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rotation of a group, [64, 64]."""
    return hadamard(GROUP, dtype, device)


def values(v: Tensor, features: bool) -> tuple[Tensor, Tensor]:
    """Codes of v and their scale: features: [B, H, D, P] and [B, H, D], else [B, H, P, D], and [2] with its inverse."""
    B, H, L, D = v.shape
    blocks = cdiv(L, BLOCK)
    pieces, padded, fp32 = cdiv(blocks, PIECE), blocks * BLOCK, torch.float32
    codes = torch.empty((B, H, *((D, padded) if features else (padded, D))), dtype=E4M3, device=v.device)
    scale = torch.empty((B, H, D) if features else (2,), dtype=fp32, device=v.device)
    largest = torch.empty((B, H, pieces, *([D] if features else [])), dtype=fp32, device=v.device)
    shape = {"D": D, "BLOCK": BLOCK, "FEATURES": features, "num_warps": WARPS}
    largest_kernel[(pieces, H, B)](v, largest, *v.stride()[:3], L, PIECE=PIECE, **shape)
    pieces = pieces if features else largest.numel()
    values_kernel[(blocks, H, B)](
        v, largest, codes, scale, *v.stride()[:3], L, pieces, PIECES=triton.next_power_of_2(pieces), SMALLEST=SMALLEST,
        **shape,
    )  # fmt: skip
    return codes, scale


def widened(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes times the first of `scale`, in that dtype."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    widened_kernel[(cdiv(out.numel(), 4096),)](codes, scale, out, out.numel(), BLOCK=4096, num_warps=8)
    return out
