"""Codes of four bits to a dense weight in one pass: half a byte is read and a number written for each weight.

The plain function goes over the weight four times. Here a program takes a few blocks: a thread four bytes, so that 32
threads read one line of memory and each writes its eight numbers next to each other. Both codebooks are a few lines of
the cache. A block's absmax is found once for all numbers of it that a thread has, from its own codes where it is
quantized, too.

It is bound by memory, and equal to `linears.nf4.unpack` to the bit, so it rounds where that does: absmax is a product
and a sum, which a compiler would fuse. `tl.fma` with 0 keeps the product's rounding.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linears.nf4 import Nested
from .launch import cdiv, operator, wrap_triton

BYTES = 1024
"""of codes for each program: four for each of 256 threads"""
WARPS = 8


@triton.jit
def absmax_of(
    block, blocks, absmax, nested_absmax, nested_map, offset, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr
):
    """absmax of these blocks in fp32."""
    found = tl.load(absmax + block, mask=block < blocks, other=0)
    if NESTED:
        values = tl.load(nested_map + found.to(tl.int32))
        largest = tl.load(nested_absmax + block // NESTED_BLOCK, mask=block < blocks, other=0.0)
        found = tl.fma(values, largest, tl.zeros_like(values)) + tl.load(offset)
    return found


@triton.jit
def unpack_kernel(
    codes, quant_map, absmax, nested_absmax, nested_map, offset, out, size, count, blocks,
    BLOCKS: tl.constexpr, EACH: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """size: bytes of codes, of which a program has BLOCKS blocks of EACH; count: of weights."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * EACH + tl.arange(0, EACH)[None, :]
    pair = tl.load(codes + at, mask=at < size, other=0).to(tl.int32)
    both = tl.interleave(tl.load(quant_map + (pair >> 4)), tl.load(quant_map + (pair & 15)))
    factor = absmax_of(block, blocks, absmax, nested_absmax, nested_map, offset, NESTED, NESTED_BLOCK)
    to = block[:, None] * (2 * EACH) + tl.arange(0, 2 * EACH)[None, :]
    tl.store(out + to, (both * factor[:, None]).to(out.dtype.element_ty), mask=to < count)


@operator("nf4_unpack")
def unpack_op(
    codes: Tensor, quant_map: Tensor, absmax: Tensor, nested_absmax: Tensor, nested_map: Tensor, offset: Tensor,
    shape: Sequence[int], blocksize: int, nested_blocksize: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    size, count, each = len(codes), math.prod(shape), blocksize // 2
    wrap_triton(unpack_kernel)[(cdiv(size, max(BYTES, each)),)](
        codes, quant_map, absmax, nested_absmax, nested_map, offset, out, size, count, len(absmax),
        BLOCKS=max(1, BYTES // each), EACH=each, NESTED=nested_blocksize > 0, NESTED_BLOCK=max(1, nested_blocksize),
        num_warps=WARPS,
    )  # fmt: skip
    return out


def unpack(
    codes: Tensor,
    quant_map: Tensor,
    absmax: Tensor,
    nested: Nested | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """`linears.nf4.unpack`, to the bit, without a gradient."""
    of = (absmax, absmax, absmax, 0) if nested is None else nested
    return unpack_op(codes, quant_map, absmax, of[0], of[1], of[2], shape, blocksize, of[3], dtype)
