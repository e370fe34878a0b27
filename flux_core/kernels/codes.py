"""Queries, keys and values in eight bits as Triton kernels: the codes of `eight_bits.quantize`.

statistics  of every eighth key the sums, for the mean, and of v the largest numbers: one read, in pieces
codes       of queries, keys and values: another read; each program writes some blocks of a head of one of the three
widened     what a kernel wrote in e4m3, times its scale

Each takes tensors as the norm before it leaves them, tokens outside heads, and writes heads outside tokens. Norm and
codes in one kernel, from the products of the Linears, took longer than both apart did: 0.18 for 0.13 ms of a step's
4608 tokens (H200).

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

SUMMED = 128
"""keys that one program adds up"""
READ, MAXIMA = 4, 1024
"""blocks of v that one program looks at for the largest numbers of each feature; where that leaves more programs than
this, more blocks, so that about as many are left"""
WRITTEN = 6
"""blocks that one program writes, by which it needs the rotation and the statistics once"""
WARPS, STAGES = 4, 3


@triton.jit
def rows_of(x, row, col, x_row, L):
    """Those tokens of a head, [rows, D]; zeros from L on."""
    return tl.load(x + row.to(tl.int64)[:, None] * x_row + col[None, :], mask=(row < L)[:, None], other=0.0)


@triton.jit
def statistics_kernel(
    k, v, sums, largest, k_batch, k_head, k_row, v_batch, v_head, v_row, L, summing,
    D: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr, READ: tl.constexpr, EVERY: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """The first `summing` programs of a head add up keys, the others look at values."""
    piece, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    one, col = batch * tl.num_programs(1) + head, tl.arange(0, D)
    if piece < summing:
        key = EVERY * (piece * SUMMED + tl.arange(0, SUMMED))
        x = rows_of(k + batch * k_batch + head * k_head, key, col, k_row, L).to(tl.float32)
        tl.store(sums + (one * summing + piece) * D + col, tl.sum(x, axis=0))
    else:
        most = tl.zeros((D if FEATURES else BLOCK,), tl.float32)
        for i in range(READ):
            row = ((piece - summing) * READ + i) * BLOCK + tl.arange(0, BLOCK)
            y = rows_of(v + batch * v_batch + head * v_head, row, col, v_row, L).to(tl.float32)
            most = tl.maximum(most, tl.max(tl.abs(y), axis=0 if FEATURES else 1))
        at = one * (tl.num_programs(0) - summing) + piece - summing
        if FEATURES:
            tl.store(largest + at * D + col, most)
        else:
            tl.store(largest + at, tl.max(most, axis=0))


@triton.jit
def e4m3(y):
    return tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def write_tokens(
    x, x_row, sums, rotation, codes, scales, one, first, last, blocks, L, summed, which,
    D: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, EVERY: tl.constexpr, INT8: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A head's queries (0), or its keys (1), which are centred, and share a scale in a block."""
    piece, col, group = tl.arange(0, SUMS), tl.arange(0, D), tl.arange(0, 64)
    found = sums + (one * summed + piece[:, None]) * D + col[None, :]
    centre = tl.sum(tl.load(found, mask=(piece < summed * which)[:, None], other=0.0), axis=0) / tl.cdiv(L, EVERY)
    turn = tl.load(rotation + group[:, None] * 64 + group[None, :])
    for block in tl.range(first, last, num_stages=STAGES):
        row = block * BLOCK + tl.arange(0, BLOCK)
        y = rows_of(x, row, col, x_row, L).to(tl.float32)
        y = tl.where((row < L)[:, None], y - centre[None, :], 0.0)
        y = tl.reshape(y.to(turn.dtype), (BLOCK * D // 64, 64))
        y = tl.reshape(tl.dot(y, turn, input_precision="ieee"), (BLOCK, D))
        to = codes + (one * blocks * BLOCK + row.to(tl.int64)[:, None]) * D + col[None, :]
        if INT8:
            own = tl.max(tl.abs(y), axis=1)
            own = tl.maximum(tl.where(which == 1, tl.max(own, axis=0), own) / LARGEST, SMALLEST)
            at = tl.where(which == 1, one * blocks + block, one * blocks * BLOCK + row)
            tl.store(scales + at, own)  # a block's keys all write the same
            tl.store(to, rounded(y * (1.0 / own)[:, None]))
        else:
            tl.store(to, e4m3(y))


@triton.jit
def write_values(
    v, v_row, largest, codes, scale, one, first, last, blocks, L, read,
    D: tl.constexpr, BLOCK: tl.constexpr, MAXIMA: tl.constexpr, FEATURES: tl.constexpr, SMALLEST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """FEATURES: a scale for each, and codes transposed, in the units' order of tokens; else one scale of all, with its
    inverse behind it."""
    piece, col = tl.arange(0, MAXIMA), tl.arange(0, D)
    if FEATURES:
        found = largest + (one * read + piece[:, None]) * D + col[None, :]
        most = tl.max(tl.load(found, mask=(piece < read)[:, None], other=0.0), axis=0)
        own = tl.maximum(most / 448.0, SMALLEST)
        if first == 0:
            tl.store(scale + one * D + col, own)
        inverse = (1.0 / own)[None, :]
    else:
        own = tl.maximum(tl.max(tl.load(largest + piece, mask=piece < read, other=0.0), axis=0) / 448.0, SMALLEST)
        inverse = 1.0 / own
        if first == 0:  # every head writes the same
            tl.store(scale, own)
            tl.store(scale + 1, inverse)
    for block in tl.range(first, last, num_stages=STAGES):
        row = block * BLOCK + tl.arange(0, BLOCK)
        y = e4m3(rows_of(v, row, col, v_row, L).to(tl.float32) * inverse)
        if FEATURES:
            y = tl.permute(tl.reshape(tl.trans(y), (D, BLOCK // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
            to = codes + (one * D + col.to(tl.int64)[:, None]) * blocks * BLOCK + row[None, :]
            tl.store(to, tl.reshape(y, (D, BLOCK)))
        else:
            tl.store(codes + (one * blocks * BLOCK + row.to(tl.int64)[:, None]) * D + col[None, :], y)


@triton.jit
def codes_kernel(
    q, k, v, sums, largest, rotation, q_codes, k_codes, v_codes, q_scale, k_scale, v_scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, L, blocks, summed, read,
    D: tl.constexpr, BLOCK: tl.constexpr, WRITTEN: tl.constexpr, SUMS: tl.constexpr, MAXIMA: tl.constexpr,
    EVERY: tl.constexpr, INT8: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, first, batch = tl.program_id(0).to(tl.int64), tl.program_id(1) * WRITTEN, tl.program_id(2).to(tl.int64) // 3
    which, one, last = tl.program_id(2) % 3, batch * tl.num_programs(0) + head, tl.minimum(first + WRITTEN, blocks)
    if which == 2:
        v += batch * v_batch + head * v_head
        write_values(
            v, v_row, largest, v_codes, v_scale, one, first, last, blocks, L, read,
            D, BLOCK, MAXIMA, INT8, SMALLEST, STAGES,
        )  # fmt: skip
    else:
        if which == 0:
            x, x_row, codes, scales = q + batch * q_batch + head * q_head, q_row, q_codes, q_scale
        else:
            x, x_row, codes, scales = k + batch * k_batch + head * k_head, k_row, k_codes, k_scale
        write_tokens(
            x, x_row, sums, rotation, codes, scales, one, first, last, blocks, L, summed, which,
            D, BLOCK, SUMS, EVERY, INT8, LARGEST, SMALLEST, STAGES,
        )  # fmt: skip


@triton.jit
def widened_kernel(codes, scale, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(codes + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < count)


def quantize(q: Tensor, k: Tensor, v: Tensor, form: str) -> Eight:
    """`eight_bits.quantize` of q, k, v [B, H, L, D]; by int8 values are in the units' order of tokens, and by fp8
    `v_scale` [2] has the scale's inverse behind it."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    (B, H, L, D), int8 = q.shape, form == "int8"
    blocks = cdiv(L, BLOCK)
    padded, kind = blocks * BLOCK, torch.int8 if int8 else E4M3

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=q.device)

    if int8:
        scales = empty(B, H, padded), empty(B, H, blocks), empty(B, H, D)
    else:
        scales = empty(B, H, 0), empty(B, H, 0), empty(2)
    of_values = (D, padded) if int8 else (padded, D)
    q_codes, k_codes = (empty(B, H, padded, D, dtype=kind) for _ in range(2))
    eight = Eight(q_codes, k_codes, empty(B, H, *of_values, dtype=E4M3), *scales)
    sums, largest = statistics(k, v, form)
    summed, read = sums.shape[2], largest.shape[2] if int8 else largest.numel()
    codes_kernel[(H, cdiv(blocks, WRITTEN), 3 * B)](
        q, k, v, sums, largest, rotation(q.dtype if q.is_cuda else torch.float32, q.device), *eight,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], L, blocks, summed, read,
        D=D, BLOCK=BLOCK, WRITTEN=WRITTEN, SUMS=triton.next_power_of_2(summed), MAXIMA=triton.next_power_of_2(read),
        EVERY=EVERY, INT8=int8, LARGEST=LARGEST, SMALLEST=SMALLEST, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return eight


def statistics(k: Tensor, v: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Of keys the sums [B, H, pieces, D], and of values the largest [B, H, pieces, D], or by fp8 [B, H, pieces]."""
    (B, H, L, D), features = k.shape, form == "int8"
    blocks = cdiv(L, BLOCK)
    read = READ if features else cdiv(B * H * blocks, MAXIMA)
    summing, reading = cdiv(cdiv(L, EVERY), SUMMED), cdiv(blocks, read)
    sums = torch.empty((B, H, summing, D), dtype=torch.float32, device=k.device)
    largest = torch.empty((B, H, reading, *([D] if features else [])), dtype=torch.float32, device=k.device)
    statistics_kernel[(summing + reading, H, B)](
        k, v, sums, largest, *k.stride()[:3], *v.stride()[:3], L, summing,
        D=D, BLOCK=BLOCK, SUMMED=SUMMED, READ=read, EVERY=EVERY, FEATURES=features, num_warps=WARPS,
    )  # fmt: skip
    return sums, largest


@cache
def rotation(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rotation of a group, [64, 64]."""
    return hadamard(GROUP, dtype, device)


def widened(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes times the first of `scale`, in that dtype."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    widened_kernel[(cdiv(out.numel(), 4096),)](codes, scale, out, out.numel(), BLOCK=4096, num_warps=8)
    return out
