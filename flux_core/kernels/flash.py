"""Attention in eight bits as Triton kernels: what `eight_bits` says, a head's block of queries in one program.

A step of 4608 tokens spends a quarter of its time in attention, whose products take half as long in eight bits. Five
kernels:

sums        of every eighth key, for the mean, in pieces that the next kernel adds up
quantize    one read of q and k, and their codes written, with heads outside tokens
largest     one read of v: the largest of each feature, likewise
values      another, and codes written, transposed, since units that multiply e4m3 on Hopper take the second operand
            with the summed index, tokens, innermost
attend      flash attention (arXiv 2205.14135): for each block of keys s = q k^T, p = 2^(s - m) with the largest s so
            far as m, and o = sum p v / sum p, with p in e4m3 from 0 to 256, or in the dtype of v

Where values are not in eight bits, `attend` reads them in place. The first two also norm q and k and turn them by their
positions (`norm_rope`, `norm_rope_join`), so that neither is written in bf16; of a double block they read both streams.

Codes are padded to whole blocks of tokens with zeros, so that only sums of the last block are masked.

*The order of values' tokens.* The sum over keys has no order. An accumulator gives a thread the columns 2t, 2t + 1, and
8 + 2t, 8 + 2t + 1 of each 16; as the first operand in eight bits it wants 4t to 4t + 3. So p stays where it is and its
columns are renamed, and `quantize` writes the values of tokens in the renamed order: no exchange between threads.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linears.contract import needs_grad
from ..model.ops import Heads, Scales
from . import fused
from .eight_bits import BLOCK, E4M3, E4M3_LARGEST, EVERY, FORMS, LARGEST, SMALLEST, Eight, Form, form_of
from .fused import batch_stride, dense_pe, same_strides
from .int8 import hadamard64, rounded
from .launch import cdiv, dense_rows, opaque

PIECE = 4
"""blocks that one program reads for a statistic"""
PLAIN_WARPS, NORM_WARPS = 8, 16
"""of a program without norms, and with them"""


class Tiles(NamedTuple):
    """What a program attends: queries, and keys at a time."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None
    """that a thread may take at most"""


TILES = {"int8": Tiles(64, 64, 4, 3, 168), "int8-qk": Tiles(64, 64, 4, 2, 168), "fp8": Tiles(64, 64, 4, 3, 168)}
"""by the name of a form; with 168 registers a multiprocessor has room for three programs"""

FLOAT, BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
"""1.5 * 2^23 in fp32, and as an integer: whatever is added to its bits, up to 2^22, is added to the number"""


# Quantizing -------------------------------------------------------------------------------------------


@triton.jit
def tokens_at(txt, img, row, T, txt_row, img_row, col, JOINED: tl.constexpr):
    """Pointers to tokens [ROWS, D] of one head, of two streams where JOINED, text first."""
    far = row.to(tl.int64)
    if JOINED:
        first = tl.where(row < T, txt + far * txt_row, img + (far - T) * img_row)
        at = first[:, None] + col[None, :]  # a choice of pointers hides that they are contiguous
        at = tl.multiple_of(tl.max_contiguous(at, (1, 64)), (1, 16))
    else:
        at = (img + far * img_row)[:, None] + col[None, :]
    return at


@triton.jit
def norm_turned(
    x, row, inside, T, txt_scale, img_scale, pe, pe_row, col,
    JOINED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """x [ROWS, D] as `ops.norm_rope` makes it, rounded as its kernel rounds."""
    scale = tl.load(img_scale + col).to(tl.float32)[None, :]
    if JOINED:
        scale = tl.where((row < T)[:, None], tl.load(txt_scale + col).to(tl.float32)[None, :], scale)
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + 1e-6)[:, None] * scale
    entry = tl.arange(0, 2 * D)
    matrix = tl.load(pe + row.to(tl.int64)[:, None] * pe_row + entry[None, :], mask=inside, other=0.0)
    first, second = tl.split(tl.reshape(matrix, (ROWS, D // 2, 2, 2)))
    a, c = tl.split(first)
    b, d = tl.split(second)
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    x = tl.reshape(tl.join(a * even + b * odd, c * even + d * odd), (ROWS, D))
    return x.to(DTYPE)


@triton.jit
def sums_kernel(
    txt_k, img_k, txt_scale, img_scale, pe, sums,
    txt_batch, txt_head, txt_row, img_batch, img_head, img_row, pe_batch, pe_row, T, L,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, EVERY: tl.constexpr, JOINED: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """Sums of one key in EVERY. NORMED: keys are normed and turned by their positions first."""
    ROWS: tl.constexpr = PIECE * BLOCK // EVERY
    piece, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    txt, img = txt_k + batch * txt_batch + head * txt_head, img_k + batch * img_batch + head * img_head
    row, col = piece * PIECE * BLOCK + EVERY * tl.arange(0, ROWS), tl.arange(0, D)
    inside = (row < L)[:, None]
    x = tl.load(tokens_at(txt, img, row, T, txt_row, img_row, col, JOINED), mask=inside, other=0.0)
    if NORMED:
        x = norm_turned(
            x, row, inside, T, txt_scale, img_scale, pe + batch * pe_batch, pe_row, col,
            JOINED, ROWS, D, img_k.dtype.element_ty,
        )  # fmt: skip
    at = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + piece) * D + col
    tl.store(sums + at, tl.sum(x.to(tl.float32), axis=0))


@triton.jit
def largest_kernel(
    txt_v, img_v, largest, txt_batch, txt_head, txt_row, img_batch, img_head, img_row, T, L,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    piece, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    txt, img = txt_v + batch * txt_batch + head * txt_head, img_v + batch * img_batch + head * img_head
    col, most = tl.arange(0, D), tl.zeros((D,), tl.float32)
    for i in range(PIECE):
        row = (piece * PIECE + i) * BLOCK + tl.arange(0, BLOCK)
        at = tokens_at(txt, img, row, T, txt_row, img_row, col, JOINED)
        y = tl.load(at, mask=(row < L)[:, None], other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(y), axis=0))
    at = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + piece) * D + col
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
    txt_q, txt_k, img_q, img_k, txt_q_scale, txt_k_scale, img_q_scale, img_k_scale, pe, sums,
    q_codes, k_codes, q_scale, k_scale,
    txt_batch, txt_head, txt_row, q_batch, q_head, q_row, k_batch, k_head, k_row, pe_batch, pe_row, T, L, pieces,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, EVERY: tl.constexpr, INT8: tl.constexpr,
    JOINED: tl.constexpr, NORMED: tl.constexpr, UNITS: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    head, block, batch = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    one, padded = batch * tl.num_programs(0) + head, tl.num_programs(1) * BLOCK
    row, col, piece = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, PIECES)
    found = (one * pieces + piece[:, None]) * D + col[None, :]
    centre = tl.sum(tl.load(sums + found, mask=(piece < pieces)[:, None], other=0.0), axis=0)
    centre = centre / tl.cdiv(L, EVERY)

    inside, txt = (row < L)[:, None], batch * txt_batch + head * txt_head
    turns, place = pe + batch * pe_batch, (one * padded + row.to(tl.int64)[:, None]) * D + col[None, :]
    at = tokens_at(txt_q + txt, img_q + batch * q_batch + head * q_head, row, T, txt_row, q_row, col, JOINED)
    x = tl.load(at, mask=inside, other=0.0)
    if NORMED:
        x = norm_turned(
            x, row, inside, T, txt_q_scale, img_q_scale, turns, pe_row, col, JOINED, BLOCK, D, img_q.dtype.element_ty
        )
    x = turned(x, UNITS, BLOCK, D)
    if INT8:
        scale = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST, SMALLEST)
        tl.store(q_codes + place, rounded(x * (1.0 / scale)[:, None]))
        tl.store(q_scale + one * padded + row, scale)
    else:
        tl.store(q_codes + place, e4m3(x))

    tl.debug_barrier()  # else both are in registers at a time
    at = tokens_at(txt_k + txt, img_k + batch * k_batch + head * k_head, row, T, txt_row, k_row, col, JOINED)
    x = tl.load(at, mask=inside, other=0.0)
    if NORMED:
        x = norm_turned(
            x, row, inside, T, txt_k_scale, img_k_scale, turns, pe_row, col, JOINED, BLOCK, D, img_k.dtype.element_ty
        )
    x = turned(tl.where(inside, x.to(tl.float32) - centre[None, :], 0.0), UNITS, BLOCK, D)
    if INT8:
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0) / LARGEST, SMALLEST)
        tl.store(k_codes + place, rounded(x * (1.0 / scale)))
        tl.store(k_scale + one * tl.num_programs(1) + block, scale)
    else:
        tl.store(k_codes + place, e4m3(x))


@triton.jit
def values_kernel(
    txt, img, largest, codes, scale, txt_batch, txt_head, txt_row, img_batch, img_head, img_row, T, L, pieces,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, JOINED: tl.constexpr, ROWS: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """ROWS: values stay in rows, by the one scale that is there."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    one, padded = batch * tl.num_programs(1) + head, tl.num_programs(0) * BLOCK
    row, col, piece = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, PIECES)
    txt, img = txt + batch * txt_batch + head * txt_head, img + batch * img_batch + head * img_head
    at = tokens_at(txt, img, row, T, txt_row, img_row, col, JOINED)
    z = tl.load(at, mask=(row < L)[:, None], other=0.0).to(tl.float32)
    if ROWS:
        place = (one * padded + row.to(tl.int64)[:, None]) * D + col[None, :]
        tl.store(codes + place, e4m3(z * (1.0 / tl.load(scale))))
    else:
        found = (one * pieces + piece[:, None]) * D + col[None, :]
        most = tl.max(tl.load(largest + found, mask=(piece < pieces)[:, None], other=0.0), axis=0)
        own = tl.maximum(most / 448.0, SMALLEST)
        z = tl.trans(e4m3(z * (1.0 / own)[None, :]))
        z = tl.permute(tl.reshape(z, (D, BLOCK // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
        place = (one * D + col.to(tl.int64)[:, None]) * padded + block * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(codes + place, tl.reshape(z, (D, BLOCK)))
        if block == 0:
            tl.store(scale + one * D + col, own)


class Norm(NamedTuple):
    """The norms of queries and keys, and what turns them: `ops.norm_rope_join`'s other arguments."""

    txt: Scales
    img: Scales
    pe: Tensor


Pair = tuple[Tensor, Tensor]
"""q and k of one stream, [B, H, L, D] each"""


def quantize(q: Tensor, k: Tensor, v: Tensor, form: Form, rows: bool = False) -> Eight:
    """`eight_bits.quantize` of q, k, v [B, H, L, D], values in the units' order of tokens.

    rows: values are [B, H, P, D], with one scale.
    """
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    tokens = quantize_tokens((q, k), (q, k), 0, None, form.int8)
    values = quantize_values(v, v, 0, rows) if form.values else as_it_was(v)
    return eight_of(tokens, values)


def norm_quantize(txt: Heads, img: Heads, norm: Norm, form: Form) -> Eight:
    """`quantize` of `ops.norm_rope_join`, in one pass over each of q, k and v."""
    txt, img, T = aligned(*same_strides(*txt)), aligned(*same_strides(*img)), txt[0].shape[2]
    tokens = quantize_tokens(txt[:2], img[:2], T, norm, form.int8)
    if form.values:
        return eight_of(tokens, quantize_values(txt[2], img[2], T))
    joined = torch.cat((txt[2], img[2]), dim=2)
    return eight_of(tokens, as_it_was(joined))


def as_it_was(v: Tensor) -> Pair:
    """v in the place of codes, with no scale."""
    return v, v.new_empty((*v.shape[:2], 0), dtype=torch.float32)


def eight_of(tokens: tuple[Tensor, ...], values: Pair) -> Eight:
    """All codes, from those by `quantize_tokens` and `quantize_values`."""
    q, k, q_scale, k_scale = tokens
    return Eight(q, k, values[0], q_scale, k_scale, values[1])


def aligned(q: Tensor, k: Tensor, v: Tensor) -> Heads:
    """q, k, v of equal strides whose tokens begin at multiples of 16 bytes, as those of products do."""
    steps = (*(x.data_ptr() for x in (q, k, v)), *(q.itemsize * stride for stride in q.stride()[:3]))
    return (q, k, v) if all(step % 16 == 0 for step in steps) else (q.clone(), k.clone(), v.clone())


def quantize_tokens(txt: Pair, img: Pair, T: int, norm: Norm | None, int8: bool) -> tuple[Tensor, ...]:
    """Codes of q and k [B, H, P, D], and their scales [B, H, P] and [B, H, P / BLOCK], empty for e4m3.

    T: the text's tokens, which are before the picture's; 0: all are in img.
    """
    (q, k), (B, H, L, D) = img, img[0].shape
    L += T
    blocks = cdiv(L, BLOCK)
    pieces, padded, kind = cdiv(blocks, PIECE), blocks * BLOCK, torch.int8 if int8 else E4M3
    codes = [torch.empty((B, H, padded, D), dtype=kind, device=q.device) for _ in range(2)]
    sums, q_scale, k_scale = (
        torch.empty((B, H, *size), dtype=torch.float32, device=q.device)
        for size in ((pieces, D), (padded if int8 else 0,), (blocks if int8 else 0,))
    )
    scales, pe, turns = (sums,) * 4, sums, (0, 0)
    if norm is not None:
        scales, pe = (*norm.txt, *norm.img), dense_pe(norm.pe)
        turns = batch_stride(pe), pe.stride(2)
    strides = *txt[1].stride()[:3], *k.stride()[:3]
    shape: dict[str, Any] = {"D": D, "BLOCK": BLOCK, "JOINED": T > 0, "EVERY": EVERY, "NORMED": norm is not None}
    shape["num_warps"] = PLAIN_WARPS if norm is None else NORM_WARPS
    sums_kernel[(pieces, H, B)](txt[1], k, scales[1], scales[3], pe, sums, *strides, *turns, T, L, **shape, PIECE=PIECE)
    quantize_kernel[(H, blocks, B)](
        *txt, q, k, *scales, pe, sums, *codes, q_scale, k_scale,
        *strides[:3], *q.stride()[:3], *strides[3:], *turns, T, L, pieces,
        **shape, PIECES=triton.next_power_of_2(pieces), INT8=int8,
        UNITS=tl.bfloat16 if q.is_cuda and q.dtype == torch.bfloat16 else tl.float32,
        LARGEST=LARGEST, SMALLEST=SMALLEST,
    )  # fmt: skip
    return *codes, q_scale, k_scale


def quantize_values(txt: Tensor, img: Tensor, T: int, rows: bool = False) -> Pair:
    """Codes of v [B, H, D, P], and scales [B, H, D]. T: as for `quantize_tokens`. rows: [B, H, P, D], and one scale."""
    B, H, L, D = img.shape
    L += T
    blocks = cdiv(L, BLOCK)
    pieces, padded = cdiv(blocks, PIECE), blocks * BLOCK
    codes = torch.empty((B, H, *((padded, D) if rows else (D, padded))), dtype=E4M3, device=img.device)
    largest, scale = (torch.empty((B, H, *n, D), dtype=torch.float32, device=img.device) for n in ((pieces,), ()))
    strides, shape = (*txt.stride()[:3], *img.stride()[:3]), {"D": D, "BLOCK": BLOCK, "JOINED": T > 0}
    largest_kernel[(pieces, H, B)](txt, img, largest, *strides, T, L, **shape, PIECE=PIECE, num_warps=PLAIN_WARPS)
    if rows:
        scale = (largest.amax() / E4M3_LARGEST).clamp(min=SMALLEST).reshape(1)
    values_kernel[(blocks, H, B)](
        txt, img, largest, codes, scale, *strides, T, L, pieces,
        **shape, PIECES=triton.next_power_of_2(pieces), ROWS=rows, SMALLEST=SMALLEST, num_warps=PLAIN_WARPS,
    )  # fmt: skip
    return codes, scale


# Attention --------------------------------------------------------------------------------------------


@triton.jit
def attend_kernel(
    q, k, v, q_scale, k_scale, v_scale, out, v_batch, v_head, v_row, L, padded, H, factor,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr, INT8: tl.constexpr,
    VALUES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """factor: log2(e) / sqrt(D). KEYS: that share a scale. EVEN: whether L is a multiple of BLOCK_N."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    one = batch * H + head
    row, key, col = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    x = tl.load(q + (one.to(tl.int64) * padded + row)[:, None] * D + col[None, :])
    k += (one.to(tl.int64) * padded + key)[:, None] * D + col[None, :]
    if VALUES:
        v += (one.to(tl.int64) * D + col)[:, None] * padded + key[None, :]
    else:
        v += batch.to(tl.int64) * v_batch + head * v_head + key.to(tl.int64)[:, None] * v_row + col[None, :]
    if INT8:
        scale = tl.load(q_scale + one.to(tl.int64) * padded + row) * factor
        k_scale += one.to(tl.int64) * (padded // KEYS)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, L, BLOCK_N):
        y = tl.load(k + start * D)
        if INT8:
            s = tl.dot(x, tl.trans(y), tl.full((BLOCK_M, BLOCK_N), BITS, tl.int32), out_dtype=tl.int32)
            s, zero = s.to(tl.float32, bitcast=True), FLOAT  # a conversion takes as long as four additions
            by = scale * tl.load(k_scale + start // KEYS)
        else:
            s, zero = tl.dot(x, tl.trans(y)), 0.0
            by = tl.full((BLOCK_M,), factor, tl.float32)
        if not EVEN:
            s = tl.where((start + key < L)[None, :], s, -float("inf"))
        now = tl.maximum(most, by * (tl.max(s, axis=1) - zero))
        p = tl.exp2(s * by[:, None] - (now - 8.0 + by * zero)[:, None])  # to 256, in the middle of what e4m3 has
        fade = tl.exp2(most - now)
        total = total * fade + tl.sum(p, axis=1)
        sums *= fade[:, None]
        if VALUES:
            z = tl.load(v + start)
            p = tl.permute(tl.reshape(p.to(tl.float8e4nv), (BLOCK_M, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
            p = tl.reshape(p, (BLOCK_M, BLOCK_N))
            # Hopper's units add up e4m3 with 14 bits: by all keys' sum 5 % of the result would be gone
            sums = tl.dot(p, tl.trans(z), sums, max_num_imprecise_acc=BLOCK_N)
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
    out = torch.empty((B, tokens, H * D), dtype=dtype, device=eight.q.device)
    attend_kernel[(cdiv(tokens, tiles.m), H, B)](
        q, k, v, *scales, out, *eight.v.stride()[:3], tokens, padded, H, 1.4426950408889634 * D**-0.5,
        D=D, BLOCK_M=tiles.m, BLOCK_N=tiles.n, KEYS=BLOCK, INT8=form.int8, VALUES=form.values,
        EVEN=tokens % tiles.n == 0, num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return out


# What blocks call -------------------------------------------------------------------------------------


class Coded(NamedTuple):
    """Queries, keys or values in eight bits, in the place of a tensor."""

    codes: Tensor
    scale: Tensor
    tokens: int


def _attended(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


@opaque("attend_eight_bits", _attended)
def attend_op(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return attend_codes(quantize(q, k, v, FORMS[name]), q.shape[2], q.dtype, TILES[name])


Codes = tuple[Tensor, Tensor, Tensor, Tensor]


def _empty_codes(q: Tensor, tokens: int) -> Codes:
    (B, H, _, D), blocks = q.shape, cdiv(tokens, BLOCK)
    codes = [q.new_empty((B, H, blocks * BLOCK, D), dtype=torch.int8) for _ in range(2)]
    scales = [q.new_empty((B, H, size), dtype=torch.float32) for size in (blocks * BLOCK, blocks)]
    return codes[0], codes[1], scales[0], scales[1]


@opaque("norm_rope_eight_bits", lambda q, *rest: _empty_codes(q, q.shape[2]))
def norm_rope_op(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor) -> Codes:
    pair, scales = (dense_rows(q), dense_rows(k)), (q_scale, k_scale)
    return quantize_tokens(pair, pair, 0, Norm(scales, scales, pe), int8=True)  # type: ignore[return-value]


def _joined(txt_q: Tensor, txt_k: Tensor, txt_v: Tensor, img_q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    B, H, L, D = img_q.shape
    L += txt_q.shape[2]
    codes = _empty_codes(img_q, L)
    if not rest[-1]:
        return *codes, *as_it_was(img_q.new_empty((B, H, L, D)))
    return *codes, codes[0].new_empty((B, H, D, codes[0].shape[2]), dtype=E4M3), codes[2].new_empty((B, H, D))


@opaque("norm_rope_join_eight_bits", _joined)
def norm_rope_join_op(
    txt_q: Tensor, txt_k: Tensor, txt_v: Tensor, img_q: Tensor, img_k: Tensor, img_v: Tensor,
    txt_q_scale: Tensor, txt_k_scale: Tensor, img_q_scale: Tensor, img_k_scale: Tensor, pe: Tensor, values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    norm = Norm((txt_q_scale, txt_k_scale), (img_q_scale, img_k_scale), pe)
    found = norm_quantize((txt_q, txt_k, txt_v), (img_q, img_k, img_v), norm, Form(True, values))
    return found.q, found.k, found.q_scale, found.k_scale, found.v, found.v_scale


def _of_codes(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, tokens: int,
    dtype: torch.dtype, name: str,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], tokens, q.shape[1] * q.shape[3]), dtype=dtype)


@opaque("attend_codes", _of_codes)
def attend_codes_op(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, tokens: int,
    dtype: torch.dtype, name: str,
) -> Tensor:  # fmt: skip
    """v: codes with their scale, or as it was, with an empty one; which `FORMS[name]` may want as codes."""
    v = dense_rows(v)
    values = quantize_values(v, v, 0) if FORMS[name].values and not v_scale.numel() else (v, v_scale)
    return attend_codes(eight_of((q, k, q_scale, k_scale), values), tokens, dtype, TILES[name])


class Functions(NamedTuple):
    """Those of `ops` around attention in int8."""

    norm_rope: Callable[..., Any]
    norm_rope_join: Callable[..., Any]
    attend: Callable[..., Tensor]


@cache
def functions(name: str, dtype: torch.dtype) -> Functions:
    """Of that form of `FORMS`, with queries and keys in int8; attention in that dtype.

    norm_rope and norm_rope_join return `Coded` where no gradient is needed; attend takes that, and tensors.
    """
    values = FORMS[name].values

    def norm_rope(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor) -> tuple[Any, Any]:
        if needs_grad(q, k, q_scale, k_scale):
            return fused.norm_rope(q, k, q_scale, k_scale, pe)
        codes = norm_rope_op(q, k, q_scale, k_scale, pe)
        return Coded(codes[0], codes[2], q.shape[2]), Coded(codes[1], codes[3], q.shape[2])

    def norm_rope_join(txt: Heads, img: Heads, txt_scales: Scales, img_scales: Scales, pe: Tensor) -> tuple[Any, ...]:
        if needs_grad(*txt, *img, *txt_scales, *img_scales):
            return fused.norm_rope_join(txt, img, txt_scales, img_scales, pe)
        codes = norm_rope_join_op(*txt, *img, *txt_scales, *img_scales, pe, values)
        tokens = txt[0].shape[2] + img[0].shape[2]
        v = Coded(codes[4], codes[5], tokens)
        return Coded(codes[0], codes[2], tokens), Coded(codes[1], codes[3], tokens), v

    def attend(q: Any, k: Any, v: Any) -> Tensor:
        if not isinstance(q, Coded):
            return attend_op(q, k, v, name)
        of_v = v if isinstance(v, Coded) else Coded(*as_it_was(v), q.tokens)
        return attend_codes_op(q.codes, k.codes, q.scale, k.scale, of_v.codes, of_v.scale, q.tokens, dtype, name)

    return Functions(norm_rope, norm_rope_join, attend)
