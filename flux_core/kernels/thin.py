"""The thin product of low-rank branches on quantized tokens, t = gain * factor * (codes @ A.T), written behind them.

Of tensors cuBLAS computes it, in a few microseconds; it does not multiply e4m3 by bf16. Here codes become bf16 in
registers. Nearly all of the time goes to reading them, so a program takes few rows and a part of their features, and
leaves its sums in fp32; a second kernel adds up the parts in a fixed order, and writes t in codes.

If a token's t would not fit into the range of codes, the second kernel scales the codes of the token down by a power of
two: exact but for the smallest, and rare, since tokens leave a margin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linears.contract import QuantizedTokens, parts
from ..linears.fp8 import LARGEST
from .launch import cdiv, dense_rows, wrap_triton

ROWS = 16
"""of tokens in a program; `MANY_ROWS` where each has so many ranks that A, too, takes time to read"""
MANY_RANKS, MANY_ROWS = 64, 32
TILE = 16384
"""numbers of A that a program holds at a time"""
FEATURES = 1024
"""of tokens in a program, at the least"""
SUMS = 512
"""ranks times parts, at the most: sums that are written and read"""
WARPS, STAGES = 4, 3
MOST_RANKS = 512
"""that fit behind tokens"""


@triton.jit
def sums_kernel(
    codes, down, sums, batch_stride, row_stride, down_row, L, R,
    K: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """codes @ down.T of PART features, fp32 [parts, B, L, RANKS]."""
    part, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANKS)
    inside, ranks, row = row < L, rank < R, row.to(tl.int64)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, PART, BLOCK):
        k = part * PART + start + tl.arange(0, BLOCK)
        there = (k < K)[None, :]
        place = codes + batch * batch_stride + (row * row_stride)[:, None] + k[None, :]
        a = tl.load(place, mask=inside[:, None] & there, other=0.0).to(down.dtype.element_ty)
        b = tl.load(down + (rank * down_row)[:, None] + k[None, :], mask=ranks[:, None] & there, other=0.0)
        if EXACT:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    out = sums + ((part * tl.num_programs(2) + batch) * L + row)[:, None] * RANKS + rank[None, :]
    tl.store(out, total, mask=inside[:, None])


@triton.jit
def behind_kernel(
    codes, scales, sums, factor, gain, batch_stride, row_stride, L, R,
    K: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr, BLOCK_ROOM: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """t in codes behind the K of each token, COLUMNS for each rank, and zeros behind it up to ROOM."""
    batch, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    inside, ranks, row = row < L, rank < R, row.to(tl.int64)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for part in range(PARTS):
        found = sums + ((part * tl.num_programs(1) + batch) * L + row)[:, None] * RANKS + rank[None, :]
        total += tl.load(found, mask=inside[:, None], other=0.0)
    f = tl.load(factor + rank, mask=ranks, other=0.0) * tl.load(gain + rank, mask=ranks, other=0.0)
    t = total * f[None, :]
    most = tl.max(tl.abs(t), axis=1)
    shrink = tl.where(most > LARGEST, tl.exp2(tl.ceil(tl.log2(most / LARGEST))), 1.0)
    t = t / shrink[:, None]
    token = codes + batch * batch_stride + row * row_stride
    if tl.max(shrink, axis=0) > 1.0:
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            there = inside[:, None] & (k < K)[None, :]
            own = tl.load(token[:, None] + k[None, :], mask=there, other=0.0).to(tl.float32)
            tl.store(token[:, None] + k[None, :], (own / shrink[:, None]).to(codes.dtype.element_ty), mask=there)
        one = scales + batch * L + row
        tl.store(one, tl.load(one, mask=inside, other=0.0) * shrink, mask=inside)
    some, place = inside[:, None] & ranks[None, :], token[:, None] + K
    rounded = t.to(codes.dtype.element_ty)
    tl.store(place + rank[None, :], rounded, mask=some)
    if COLUMNS > 1:
        left_over = t - rounded.to(tl.float32)
        tl.store(place + R + rank[None, :], left_over.to(codes.dtype.element_ty), mask=some)
    if COLUMNS > 2:
        tl.store(place + 2 * R + rank[None, :], rounded, mask=some)
    if ROOM > COLUMNS * R:
        rest = tl.arange(0, BLOCK_ROOM)[None, :]
        zeros = tl.zeros((ROWS, BLOCK_ROOM), tl.float32).to(codes.dtype.element_ty)
        tl.store(place + rest, zeros, mask=inside[:, None] & (rest >= COLUMNS * R) & (rest < ROOM))


INTERPRETED = not isinstance(sums_kernel, triton.JITFunction)
"""whether kernels run on the CPU, where Triton's interpreter multiplies no bf16"""


def write_codes_behind(tokens: QuantizedTokens, down: Tensor, factor: Tensor, gain: Tensor) -> None:
    """Write t in the room behind the features of tokens [B, L, K + room], then zeros. A token may be scaled down.

    down: [R, K]; factor, gain: fp32 [R].
    """
    (B, L, width), (R, K), down = tokens.codes.shape, down.shape, dense_rows(down)
    room, ranks = width - K, triton.next_power_of_2(max(R, 16))
    rows, block = MANY_ROWS if MANY_RANKS <= ranks < MOST_RANKS else ROWS, max(32, min(256, TILE // ranks))
    number = max(1, min(cdiv(K, FEATURES), SUMS // ranks))
    part = cdiv(cdiv(K, number), block) * block
    number = cdiv(K, part)
    sums = torch.empty((number, B, L, ranks), dtype=torch.float32, device=down.device)
    strides, warps = tokens.codes.stride()[:2], WARPS if ranks < 256 else 2 * WARPS
    wrap_triton(sums_kernel)[(cdiv(L, rows), number, B)](
        tokens.codes, down, sums, *strides, down.stride(0), L, R,
        K=K, PART=part, ROWS=rows, RANKS=ranks, BLOCK=block, EXACT=INTERPRETED, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    wrap_triton(behind_kernel)[(cdiv(L, ROWS), B)](
        *tokens, sums, factor, gain, *strides, L, R, K=K, PARTS=number, COLUMNS=parts(R, room), ROOM=room,
        BLOCK_ROOM=triton.next_power_of_2(room), ROWS=ROWS, RANKS=ranks, BLOCK=256, LARGEST=LARGEST, num_warps=warps,
    )  # fmt: skip
