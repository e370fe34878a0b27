"""Attention in eight bits as Triton kernels: what `eight_bits` says, a head's block of queries in one program.

A step of 4608 tokens spends a quarter of its time in attention, whose products take half as long in eight bits. Four
kernels:

statistics  one read of k and v: sums of keys and the largest values, in pieces that the next kernels add up
quantize    one read of q and k, and their codes written, with heads outside tokens
values      the same of v, transposed, since units that multiply e4m3 on Hopper take the second operand with the summed
            index, tokens, innermost
attend      flash attention (arXiv 2205.14135): for each block of keys s = q k^T, p = 2^(s - m) with the largest s so
            far as m, and o = sum p v / sum p, with p in e4m3 from 0 to 256, or in the dtype of v

Where values are not in eight bits, `attend` reads them in place. The first two may norm q and k and turn them by their
positions, too (`norm_quantize`), so that neither is written in bf16.

Codes are padded to whole blocks of tokens with zeros, so that only sums of the last block are masked, and the copy
engine (TMA) may bring tiles.

*The order of values' tokens.* The sum over keys has no order. An accumulator gives a thread the columns 2t, 2t + 1, and
8 + 2t, 8 + 2t + 1 of each 16; as the first operand in eight bits it wants 4t to 4t + 3. So p stays where it is and its
columns are renamed, and `quantize` writes the values of tokens in the renamed order: no exchange between threads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..model.ops import Heads, Scales
from .eight_bits import BLOCK, E4M3, E4M3_LARGEST, FORMS, LARGEST, SMALLEST, Eight, Form, form_of
from .fused import batch_stride, dense_pe, same_strides
from .int8 import hadamard64, rounded
from .launch import cdiv, dense_rows, opaque

PIECE = 4
"""blocks that one program of `statistics` reads"""
EVERY = 8
"""of keys that are normed and turned for their mean alone this is one: any vector near the mean will do"""
PLAIN_WARPS, NORM_WARPS = 8, 16
"""of a program without norms, and with them"""


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
def statistics_kernel(
    txt_k, img_k, txt_v, img_v, txt_scale, img_scale, pe, sums, largest,
    txt_batch, txt_head, txt_row, k_batch, k_head, k_row, v_batch, v_head, v_row, pe_batch, pe_row, T, L,
    D: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, EVERY: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, JOINED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """EVERY: of keys this is one. NORMED: keys are normed and rotated by their positions first."""
    piece, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    col = tl.arange(0, D)
    at = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + piece) * D + col
    txt, start = batch * txt_batch + head * txt_head, piece * PIECE * BLOCK
    if KEYS:
        total = tl.zeros((D,), tl.float32)
        img = img_k + batch * k_batch + head * k_head
        for i in range(0, PIECE * BLOCK, EVERY * BLOCK // 2):
            row = start + i + EVERY * tl.arange(0, BLOCK // 2)
            inside = (row < L)[:, None]
            x = tl.load(tokens_at(txt_k + txt, img, row, T, txt_row, k_row, col, JOINED), mask=inside, other=0.0)
            if NORMED:
                x = norm_turned(
                    x, row, inside, T, txt_scale, img_scale, pe + batch * pe_batch, pe_row, col,
                    JOINED, BLOCK // 2, D, img_k.dtype.element_ty,
                )  # fmt: skip
            total += tl.sum(x.to(tl.float32), axis=0)
        tl.store(sums + at, total)
    if VALUES:
        most = tl.zeros((D,), tl.float32)
        img = img_v + batch * v_batch + head * v_head
        for i in range(0, PIECE * BLOCK, BLOCK):
            row = start + i + tl.arange(0, BLOCK)
            inside = (row < L)[:, None]
            y = tl.load(tokens_at(txt_v + txt, img, row, T, txt_row, v_row, col, JOINED), mask=inside, other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(y.to(tl.float32)), axis=0))
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


def quantize(q: Tensor, k: Tensor, v: Tensor, form: Form, rows: bool = False) -> Eight:
    """`eight_bits.quantize` of q, k, v [B, H, L, D], values in the units' order of tokens.

    rows: values are [B, H, P, D], with one scale.
    """
    img = dense_rows(q), dense_rows(k), dense_rows(v)
    return _quantized(img, img, 0, None, form, rows)


def norm_quantize(txt: Heads, img: Heads, norm: Norm, form: Form) -> Eight:
    """`quantize` of `ops.norm_rope_join`, in one pass over q, k and v; keys less the mean of every eighth."""
    joined = v_joined(txt, img) if not form.values else None
    txt, img, pe = aligned(*same_strides(*txt)), aligned(*same_strides(*img)), dense_pe(norm.pe)
    eight = _quantized(txt, img, txt[0].shape[2], norm._replace(pe=pe), form, False)
    return eight if joined is None else eight._replace(v=joined)


def v_joined(txt: Heads, img: Heads) -> Tensor:
    return torch.cat((txt[2], img[2]), dim=2)


def aligned(q: Tensor, k: Tensor, v: Tensor) -> Heads:
    """q, k, v of equal strides whose tokens begin at multiples of 16 bytes, as those of products do."""
    steps = (*(x.data_ptr() for x in (q, k, v)), *(q.itemsize * stride for stride in q.stride()[:3]))
    return (q, k, v) if all(step % 16 == 0 for step in steps) else (q.clone(), k.clone(), v.clone())


def _quantized(txt: Heads, img: Heads, T: int, norm: Norm | None, form: Form, rows: bool) -> Eight:
    """T: of the text's tokens that are before the picture's; 0: all are in img."""
    (B, H, L, D), device = img[0].shape, img[0].device
    L += T
    blocks = cdiv(L, BLOCK)
    pieces, padded, kind = cdiv(blocks, PIECE), blocks * BLOCK, torch.int8 if form.int8 else E4M3

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((B, H, *shape), dtype=dtype, device=device)

    sums, largest = empty(pieces, D), empty(pieces, D)
    eight = Eight(
        q=empty(padded, D, dtype=kind),
        k=empty(padded, D, dtype=kind),
        v=empty(*((padded, D) if rows else (D, padded)), dtype=E4M3) if form.values else img[2],
        q_scale=empty(padded if form.int8 else 0),
        k_scale=empty(blocks if form.int8 else 0),
        v_scale=empty(D if form.values else 0),
    )
    (txt_q, txt_k, txt_v), (q, k, v) = txt, img
    every, pe = (1, sums) if norm is None else (EVERY, norm.pe)
    scales = (sums, sums, sums, sums) if norm is None else (*norm.txt, *norm.img)
    turns = (0, 0) if norm is None else (batch_stride(pe), pe.stride(2))
    txt_strides, k_strides, v_strides = txt_k.stride()[:3], k.stride()[:3], v.stride()[:3]
    shape: dict[str, Any] = {"D": D, "BLOCK": BLOCK, "JOINED": T > 0}
    warps = PLAIN_WARPS if norm is None else NORM_WARPS
    statistics_kernel[(pieces, H, B)](
        txt_k, k, txt_v, v, scales[1], scales[3], pe, sums, largest,
        *txt_strides, *k_strides, *v_strides, *turns, T, L,
        **shape, PIECE=PIECE, EVERY=every, KEYS=True, VALUES=form.values, NORMED=norm is not None, num_warps=warps,
    )  # fmt: skip
    shape["PIECES"] = triton.next_power_of_2(pieces)
    quantize_kernel[(H, blocks, B)](
        txt_q, txt_k, q, k, *scales, pe, sums, eight.q, eight.k, eight.q_scale, eight.k_scale,
        *txt_strides, *q.stride()[:3], *k_strides, *turns, T, L, pieces,
        **shape, EVERY=every, INT8=form.int8, NORMED=norm is not None,
        UNITS=tl.bfloat16 if q.is_cuda and q.dtype == torch.bfloat16 else tl.float32,
        LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=warps,
    )  # fmt: skip
    if rows:
        eight = eight._replace(v_scale=(largest.amax() / E4M3_LARGEST).clamp(min=SMALLEST).reshape(1))
    if form.values:
        values_kernel[(blocks, H, B)](
            txt_v, v, largest, eight.v, eight.v_scale, *txt_strides, *v_strides, T, L, pieces,
            **shape, ROWS=rows, SMALLEST=SMALLEST, num_warps=PLAIN_WARPS,
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
