"""Attention in eight bits as Triton kernels: what `eight_bits` says, a head's block of queries in one program.

A step of 4608 tokens spends a quarter of its time in attention, whose products take half as long in eight bits. Three
kernels:

statistics  one read of k and v: sums of keys and the largest values, in pieces that the next kernel adds up
quantize    one read of q, k and v, and codes written: queries and keys with heads outside tokens, values transposed,
            since units that multiply e4m3 on Hopper take the second operand with the summed index, tokens, innermost
attend      flash attention (arXiv 2205.14135): for each block of keys s = q k^T, p = 2^(s - m) with the largest s so
            far as m, and o = sum p v / sum p, with p in e4m3 from 0 to 256, or in the dtype of v

Where values are not in eight bits, the first two do not read them, and the last does in place.

Codes are padded to whole blocks of tokens with zeros, so that only sums of the last block are masked, and the copy
engine (TMA) may bring tiles.

*The order of values' tokens.* The sum over keys has no order. An accumulator gives a thread the columns 2t, 2t + 1, and
8 + 2t, 8 + 2t + 1 of each 16; as the first operand in eight bits it wants 4t to 4t + 3. So p stays where it is and its
columns are renamed, and `quantize` writes the values of tokens in the renamed order: no exchange between threads.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .eight_bits import BLOCK, E4M3, E4M3_LARGEST, FORMS, LARGEST, SMALLEST, Eight, Form, form_of
from .int8 import hadamard64, rounded
from .launch import cdiv, dense_rows, opaque

PIECE = 4
"""blocks that one program of `statistics` reads"""
QUANTIZE_WARPS = 4


class Tiles(NamedTuple):
    """What a program attends: queries, and keys at a time."""

    m: int
    n: int
    warps: int
    stages: int
    described: bool = False
    """whether the copy engine brings tiles"""
    split: bool = False
    """whether each block's sums of values are added in fp32: Hopper's units add e4m3 with 14 bits"""


TILES = {"int8": Tiles(128, 64, 4, 3), "int8-qk": Tiles(128, 128, 8, 3), "fp8": Tiles(128, 64, 4, 3)}
"""by the name of a form"""


# Quantizing -------------------------------------------------------------------------------------------


@triton.jit
def statistics_kernel(
    k, v, sums, largest, k_batch, k_head, k_row, v_batch, v_head, v_row, L,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    piece, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    col = tl.arange(0, D)
    total, most = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for i in range(PIECE):
        row = (piece * PIECE + i) * BLOCK + tl.arange(0, BLOCK)
        inside, row = (row < L)[:, None], row.to(tl.int64)[:, None]
        x = tl.load(k + batch * k_batch + head * k_head + row * k_row + col[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
        if VALUES:
            y = tl.load(v + batch * v_batch + head * v_head + row * v_row + col[None, :], mask=inside, other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(y.to(tl.float32)), axis=0))
    at = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + piece) * D + col
    tl.store(sums + at, total)
    if VALUES:
        tl.store(largest + at, most)


@triton.jit
def turned(x, UNITS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """x [ROWS, D] rotated in groups of 64 features."""
    x = tl.reshape(x, (ROWS * D // 64, 64))
    return tl.reshape(tl.dot(x.to(UNITS), hadamard64(UNITS), input_precision="ieee"), (ROWS, D))


@triton.jit
def e4m3(y):
    return tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def quantize_kernel(
    q, k, v, sums, largest, q_codes, k_codes, v_codes, q_scale, k_scale, v_scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, L, pieces,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, INT8: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """ROWS: values stay in rows, by the one scale that is there."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    one, padded = batch * tl.num_programs(1) + head, tl.num_programs(0) * BLOCK
    row, col, piece = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, PIECES)
    found = (one * pieces + piece[:, None]) * D + col[None, :]
    there = (piece < pieces)[:, None]
    centre = tl.sum(tl.load(sums + found, mask=there, other=0.0), axis=0) / L

    inside, far = (row < L)[:, None], row.to(tl.int64)[:, None]
    x = tl.load(q + batch * q_batch + head * q_head + far * q_row + col[None, :], mask=inside, other=0.0)
    y = tl.load(k + batch * k_batch + head * k_head + far * k_row + col[None, :], mask=inside, other=0.0)
    y = tl.where(inside, y.to(tl.float32) - centre[None, :], 0.0)
    x, y = turned(x, UNITS, BLOCK, D), turned(y, UNITS, BLOCK, D)
    place = (one * padded + far) * D + col[None, :]
    if INT8:
        x_scale = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST, SMALLEST)
        y_scale = tl.maximum(tl.max(tl.max(tl.abs(y), axis=1), axis=0) / LARGEST, SMALLEST)
        tl.store(q_codes + place, rounded(x * (1.0 / x_scale)[:, None]))
        tl.store(k_codes + place, rounded(y * (1.0 / y_scale)))
        tl.store(q_scale + one * padded + row, x_scale)
        tl.store(k_scale + one * tl.num_programs(0) + block, y_scale)
    else:
        tl.store(q_codes + place, e4m3(x))
        tl.store(k_codes + place, e4m3(y))
    if VALUES:
        z = tl.load(v + batch * v_batch + head * v_head + far * v_row + col[None, :], mask=inside, other=0.0)
    if VALUES and ROWS:
        tl.store(v_codes + place, e4m3(z.to(tl.float32) * (1.0 / tl.load(v_scale))))
    elif VALUES:
        z_scale = tl.max(tl.load(largest + found, mask=there, other=0.0), axis=0)
        z_scale = tl.maximum(z_scale / 448.0, SMALLEST)
        z = tl.trans(e4m3(z.to(tl.float32) * (1.0 / z_scale)[None, :]))
        z = tl.permute(tl.reshape(z, (D, BLOCK // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
        z = tl.reshape(z, (D, BLOCK))
        at = (one * D + col.to(tl.int64)[:, None]) * padded + block * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(v_codes + at, z)
        if block == 0:
            tl.store(v_scale + one * D + col, z_scale)


def quantize(q: Tensor, k: Tensor, v: Tensor, form: Form, rows: bool = False) -> Eight:
    """`eight_bits.quantize` of q, k, v [B, H, L, D], values in the units' order of tokens.

    rows: values are [B, H, P, D], with one scale.
    """
    (B, H, L, D), blocks = q.shape, cdiv(q.shape[2], BLOCK)
    q, k, v, pieces, padded = dense_rows(q), dense_rows(k), dense_rows(v), cdiv(blocks, PIECE), blocks * BLOCK
    kind = torch.int8 if form.int8 else E4M3

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((B, H, *shape), dtype=dtype, device=q.device)

    sums, largest = empty(pieces, D), empty(pieces, D)
    eight = Eight(
        q=empty(padded, D, dtype=kind),
        k=empty(padded, D, dtype=kind),
        v=empty(*((padded, D) if rows else (D, padded)), dtype=E4M3) if form.values else v,
        q_scale=empty(padded if form.int8 else 0),
        k_scale=empty(blocks if form.int8 else 0),
        v_scale=empty(D if form.values else 0),
    )
    k_strides, v_strides = k.stride()[:3], v.stride()[:3]
    statistics_kernel[(pieces, H, B)](
        k, v, sums, largest, *k_strides, *v_strides, L,
        D=D, BLOCK=BLOCK, PIECE=PIECE, VALUES=form.values, num_warps=4,
    )  # fmt: skip
    if rows:
        eight = eight._replace(v_scale=(largest.amax() / E4M3_LARGEST).clamp(min=SMALLEST).reshape(1))
    quantize_kernel[(blocks, H, B)](
        q, k, v, sums, largest, *eight, *q.stride()[:3], *k_strides, *v_strides, L, pieces,
        D=D, BLOCK=BLOCK, PIECES=triton.next_power_of_2(pieces), INT8=form.int8, VALUES=form.values,
        ROWS=rows, UNITS=tl.bfloat16 if q.is_cuda and q.dtype == torch.bfloat16 else tl.float32,
        LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=QUANTIZE_WARPS,
    )  # fmt: skip
    return eight


# Attention --------------------------------------------------------------------------------------------


@triton.jit
def attend_kernel(
    q, k, v, q_scale, k_scale, v_scale, out, v_batch, v_head, v_row, L, padded, H, factor,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr, INT8: tl.constexpr,
    VALUES: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """factor: log2(e) / sqrt(D). KEYS: that share a scale. EVEN: whether L is a multiple of BLOCK_N. DESCRIBED: q, k
    and v are descriptors of tiles, else pointers."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    one = batch * H + head
    row, key, col = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    if DESCRIBED:
        x = q.load([one * padded + block * BLOCK_M, 0])
    else:
        x = tl.load(q + (one.to(tl.int64) * padded + row)[:, None] * D + col[None, :])
        k += (one.to(tl.int64) * padded + key)[:, None] * D + col[None, :]
        if VALUES:
            v += (one.to(tl.int64) * D + col)[:, None] * padded + key[None, :]
    if not VALUES:
        v += batch.to(tl.int64) * v_batch + head * v_head + key.to(tl.int64)[:, None] * v_row + col[None, :]
    if INT8:
        scale = tl.load(q_scale + one.to(tl.int64) * padded + row) * factor
        k_scale += one.to(tl.int64) * (padded // KEYS)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, L, BLOCK_N):
        y = k.load([one * padded + start, 0]) if DESCRIBED else tl.load(k + start * D)
        if INT8:
            s = tl.dot(x, tl.trans(y), out_dtype=tl.int32).to(tl.float32)
            by = scale * tl.load(k_scale + start // KEYS)
        else:
            s = tl.dot(x, tl.trans(y))
            by = tl.full((BLOCK_M,), factor, tl.float32)
        if not EVEN:
            s = tl.where((start + key < L)[None, :], s, -float("inf"))
        now = tl.maximum(most, by * tl.max(s, axis=1))
        p = tl.exp2(s * by[:, None] - (now - 8.0)[:, None])  # to 256, in the middle of what e4m3 has
        fade = tl.exp2(most - now)
        total = total * fade + tl.sum(p, axis=1)
        sums *= fade[:, None]
        if VALUES:
            z = v.load([one * D, start]) if DESCRIBED else tl.load(v + start)
            p = tl.permute(tl.reshape(p.to(tl.float8e4nv), (BLOCK_M, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
            p = tl.reshape(p, (BLOCK_M, BLOCK_N))
            if SPLIT:
                sums = tl.dot(p, tl.trans(z), sums, max_num_imprecise_acc=BLOCK_N)
            else:
                sums = tl.dot(p, tl.trans(z), sums)
        else:
            z = tl.load(v) if EVEN else tl.load(v, mask=(start + key < L)[:, None], other=0.0)
            sums = tl.dot(p.to(z.dtype), z, sums, input_precision="ieee")
            v += BLOCK_N * v_row
        most = now
    y = sums * (1.0 / total)[:, None]
    if VALUES:
        y *= tl.load(v_scale + one.to(tl.int64) * D + col)[None, :]
    place = out + ((batch.to(tl.int64) * L + row)[:, None] * H + head) * D + col[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=(row < L)[:, None])


def attend_codes(eight: Eight, tokens: int, dtype: torch.dtype, tiles: Tiles) -> Tensor:
    """Attention of codes by `quantize`: [B, tokens, H*D] in that dtype."""
    (B, H, padded, D), (q, k, v, *scales), form = eight.q.shape, eight, form_of(eight)
    if tiles.described:
        q, k = described(q, tiles.m, D), described(k, tiles.n, D)
        v = described(v, D, tiles.n) if form.values else v
    out = torch.empty((B, tokens, H * D), dtype=dtype, device=eight.q.device)
    attend_kernel[(cdiv(tokens, tiles.m), H, B)](
        q, k, v, *scales, out, *eight.v.stride()[:3], tokens, padded, H, 1.4426950408889634 * D**-0.5,
        D=D, BLOCK_M=tiles.m, BLOCK_N=tiles.n, KEYS=BLOCK, INT8=form.int8, VALUES=form.values,
        EVEN=tokens % tiles.n == 0, DESCRIBED=tiles.described, SPLIT=tiles.split,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def described(x: Tensor, *tile: int) -> TensorDescriptor:
    """Codes [B, H, M, N] as rows, for the copy engine."""
    rows = x.flatten(0, 2)
    return TensorDescriptor(rows, rows.shape, rows.stride(), list(tile))


def _attended(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


@opaque("attend_eight_bits", _attended)
def attend_op(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return attend_codes(quantize(q, k, v, FORMS[name]), q.shape[2], q.dtype, TILES[name])


def int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attend` with queries and keys in int8 and values in e4m3, without a gradient."""
    return attend_op(q, k, v, "int8")


def int8_qk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attend` with queries and keys in int8, without a gradient."""
    return attend_op(q, k, v, "int8-qk")


ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"int8": int8, "int8-qk": int8_qk}
"""[B, H, L, D] each -> [B, L, H*D], by the name of a form"""
