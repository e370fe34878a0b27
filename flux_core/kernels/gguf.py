"""`linears.gguf.unpack` as Triton kernels: ggml's blocks to dense rows, codes read once and values written once.

It is bound by memory: a weight of [12288, 3072] in Q4_K is 21 MB to read and 75 MB to write in bf16, 20 µs of an
H200's traffic, where the plain function writes it in fp32 first, and some tensors of bytes before. A program holds
some hundred runs of 16 or 32 bytes of codes. Lanes side by side read bytes side by side, in loads as wide as the
block's size allows (2 bytes in 34, 16 in 144), and each run is written as whole sectors: the low halves of its bytes
here, the high halves there. Scales are read once for each run, from a view of the same bytes as 16-bit words.

Results are those of the plain function to the bit: the same order of operations, without fused multiply-adds. For a
compiler they are one operator. Types without a kernel (IQ4_NL, IQ4_XS, Q2_K, Q3_K) are widened by the plain function.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linears import gguf as plain
from ..linears.gguf_types import TYPES
from .launch import cdiv, opaque

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL, LARGE, WARPS = 128, 16, 4
"""blocks of 32 and of 256 in a program"""


@triton.jit
def half(words, at, inside):
    """The fp16 number in that word, as fp32."""
    return tl.load(words + at, mask=inside, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def byte(codes, at, inside):
    return tl.load(codes + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def put(out, at, y, inside):
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def small_kernel(
    codes, words, out, n, SIZE: tl.constexpr, BITS: tl.constexpr, MINIMUM: tl.constexpr, BLOCKS: tl.constexpr
):
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: d, m if MINIMUM, the fifth bits, 16 bytes of codes (32 for 8 bits)."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    codes, words, out = codes + first * SIZE, words + first * (SIZE // 2), out + first * 32
    row = tl.arange(0, BLOCKS)[:, None]
    inside = row < n - first
    d = half(words, row * (SIZE // 2), inside)
    if BITS == 8:
        col = tl.arange(0, 32)[None, :]
        q = tl.load(codes + row * SIZE + 2 + col, mask=inside, other=0).to(tl.int8, bitcast=True)
        put(out, row * 32 + col, d * q.to(tl.float32), inside)
    else:
        col = tl.arange(0, 16)[None, :]
        q = byte(codes, row * SIZE + (SIZE - 16) + col, inside)
        low, high = q & 15, q >> 4
        if BITS == 5:
            fifth = row * (SIZE // 2) + (SIZE - 20) // 2
            low |= ((tl.load(words + fifth, mask=inside, other=0).to(tl.int32) >> col) & 1) << 4
            high |= ((tl.load(words + fifth + 1, mask=inside, other=0).to(tl.int32) >> col) & 1) << 4
        if MINIMUM:
            m = half(words, row * (SIZE // 2) + 1, inside)
            put(out, row * 32 + col, d * low.to(tl.float32) + m, inside)
            put(out, row * 32 + 16 + col, d * high.to(tl.float32) + m, inside)
        else:
            OFFSET: tl.constexpr = 2 ** (BITS - 1)
            put(out, row * 32 + col, d * (low - OFFSET).to(tl.float32), inside)
            put(out, row * 32 + 16 + col, d * (high - OFFSET).to(tl.float32), inside)


@triton.jit
def scale_and_minimum(codes, at, d, dmin, j, inside):
    """Of sub-block j of a super-block whose 12 bytes of scales begin at `at`."""
    first, second = byte(codes, at + j % 4, inside), byte(codes, at + 4 + j % 4, inside)
    last = byte(codes, at + 8 + j % 4, inside)
    scale = tl.where(j < 4, first & 63, (last & 15) | ((first >> 6) << 4))
    low = tl.where(j < 4, second & 63, (last >> 4) | ((second >> 6) << 4))
    return d * scale.to(tl.float32), dmin * low.to(tl.float32)


@triton.jit
def with_minimum_kernel(codes, words, out, n, SIZE: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Q4_K, Q5_K: a row here is 32 bytes of codes, which hold two sub-blocks."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    codes, words, out = codes + first * SIZE, words + first * (SIZE // 2), out + first * 256
    row, col = tl.arange(0, BLOCKS * 4)[:, None], tl.arange(0, 32)[None, :]
    block, pair = row // 4, row % 4
    inside, start = block < n - first, block * SIZE
    d, dmin = half(words, start // 2, inside), half(words, start // 2 + 1, inside)
    q = byte(codes, start + (SIZE - 128) + pair * 32 + col, inside)
    low, high = q & 15, q >> 4
    if BITS == 5:
        fifth = byte(codes, start + 16 + col, inside) >> (2 * pair)
        low |= (fifth & 1) << 4
        high |= ((fifth >> 1) & 1) << 4
    scale, m = scale_and_minimum(codes, start + 4, d, dmin, 2 * pair, inside)
    put(out, row * 64 + col, scale * low.to(tl.float32) - m, inside)
    scale, m = scale_and_minimum(codes, start + 4, d, dmin, 2 * pair + 1, inside)
    put(out, row * 64 + 32 + col, scale * high.to(tl.float32) - m, inside)


@triton.jit
def six_bit_kernel(codes, words, out, n, BLOCKS: tl.constexpr):
    """Q6_K: a row here is 16 bytes of codes, which hold two sub-blocks, 64 values apart."""
    SIZE: tl.constexpr = 210
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    codes, words, out = codes + first * SIZE, words + first * (SIZE // 2), out + first * 256
    row, col = tl.arange(0, BLOCKS * 8)[:, None], tl.arange(0, 16)[None, :]
    block, side, run = row // 8, row // 4 % 2, row % 4
    inside, start = block < n - first, block * SIZE
    d = half(words, start // 2 + 104, inside)
    q = byte(codes, start + side * 64 + run * 16 + col, inside)
    upper = byte(codes, start + 128 + side * 32 + run % 2 * 16 + col, inside) >> (run // 2 * 2)
    low, high = (q & 15) | ((upper & 3) << 4), (q >> 4) | (((upper >> 4) & 3) << 4)
    of_low = tl.load(codes + start + 192 + side * 8 + run, mask=inside, other=0).to(tl.int8, bitcast=True)
    of_high = tl.load(codes + start + 196 + side * 8 + run, mask=inside, other=0).to(tl.int8, bitcast=True)
    at = block * 256 + side * 128 + run * 16 + col
    put(out, at, (d * of_low.to(tl.float32)) * (low - 32).to(tl.float32), inside)
    put(out, at + 64, (d * of_high.to(tl.float32)) * (high - 32).to(tl.float32), inside)


SMALL_TYPES = {"Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (5, False), "Q5_1": (5, True), "Q8_0": (8, False)}
"""bits, and whether there is a minimum"""
LARGE_TYPES = {"Q4_K": 4, "Q5_K": 5}
KERNELS = (*SMALL_TYPES, *LARGE_TYPES, "Q6_K")


def _like(codes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    _, block, size = TYPES[kind]
    return torch.empty(codes.numel() // size * block, dtype=dtype, device=codes.device)


@opaque("gguf_unpack", _like)
def unpack_op(codes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    _, block, size = TYPES[kind]
    codes, out, n = codes.contiguous(), _like(codes, kind, dtype), codes.numel() // size
    count = SMALL if block == 32 else LARGE
    grid, args = (cdiv(n, count),), (codes, codes.view(torch.int16), out, n)
    options = {"BLOCKS": count, "num_warps": WARPS, "enable_fp_fusion": False}
    if not n:
        return out
    if kind in SMALL_TYPES:
        bits, minimum = SMALL_TYPES[kind]
        small_kernel[grid](*args, SIZE=size, BITS=bits, MINIMUM=minimum, **options)
    elif kind in LARGE_TYPES:
        with_minimum_kernel[grid](*args, SIZE=size, BITS=LARGE_TYPES[kind], **options)
    else:
        six_bit_kernel[grid](*args, **options)
    return out


def unpack(codes: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """`linears.gguf.unpack`, to the bit: the numbers [n] that whole blocks of a type stand for. codes: uint8."""
    if kind in KERNELS and dtype in DTYPES:
        return unpack_op(codes, kind, dtype)
    return plain.unpack(codes, kind, dtype)
