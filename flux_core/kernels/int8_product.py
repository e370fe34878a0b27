"""The product of int8 tokens: int8 by int8 into int32, with tokens' and rows' scales and the bias in its last step.

No autotuning: `tiles` has the sizes. On an H200 two programs of four warps at a time, one of which stores while the
other multiplies, were the fastest of nineteen ways (`docs/performance.md`).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..linears.contract import QuantizedTokens
from .launch import cdiv, dense_rows, opaque


class Tiles(NamedTuple):
    """What a program multiplies: rows of tokens by rows of the weight, and features at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


BAND = 8
"""rows of tiles that neighbouring programs stay in, so that what they read is in the L2 cache"""
LARGE, MIDDLE, SMALL = Tiles(128, 128, 128, 4, 3), Tiles(128, 128, 64, 8, 4), Tiles(64, 64, 128, 4, 4)
LOW = Tiles(64, 128, 128, 4, 4)
FEW_TOKENS, TEXT_TOKENS = 64, 1024
"""up to which SMALL, and LOW, have more programs for a card's units"""
ROOMY = (9, 10)
"""major versions of cards with the shared memory for two programs of LARGE or LOW (96 KiB each)"""
COPIES_TILES = 9
"""the first major version whose copy engine (TMA) brings tiles into shared memory, without registers for addresses"""
ALIGNED = 16
"""bytes at whose multiples the rows that it copies begin"""


def tiles(M: int, capability: tuple[int, int]) -> Tiles:
    """Sizes for M tokens on a card of that compute capability."""
    if M <= FEW_TOKENS:
        return SMALL
    if capability[0] in ROOMY and M <= TEXT_TOKENS:
        return LOW
    return LARGE if capability[0] in ROOMY else MIDDLE


@triton.jit
def product_kernel(
    codes, scales, weight, weight_scales, bias, out, M, N, weight_row,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BAND: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """DESCRIBED: codes, weight and out are descriptors of tiles, else pointers."""
    program, across, down = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = program // (BAND * across) * BAND
    high = tl.minimum(down - first, BAND)
    inside = program % (BAND * across)
    row, col = (first + inside % high) * BLOCK_M, (inside // high) * BLOCK_N
    m, n, k = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if not DESCRIBED:  # rows beyond the last read others, whose sums are not stored
        a = codes + (m % M).to(tl.int64)[:, None] * K + k[None, :]
        b = weight + (n % N).to(tl.int64)[:, None] * weight_row + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        if DESCRIBED:
            x, w = codes.load([row, start]), weight.load([col, start])
        else:
            if K % BLOCK_K == 0:
                x, w = tl.load(a), tl.load(b)
            else:
                there = (start + k < K)[None, :]
                x, w = tl.load(a, mask=there, other=0), tl.load(b, mask=there, other=0)
            a += BLOCK_K
            b += BLOCK_K
        total = tl.dot(x, tl.trans(w), total, out_dtype=tl.int32)
    y = total.to(tl.float32) * tl.load(scales + m, mask=m < M, other=0.0)[:, None]
    y *= tl.load(weight_scales + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if DESCRIBED:
        out.store([row, col], y.to(out.dtype))
    else:
        place = out + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(place, y.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _like(codes: Tensor, scale: Tensor, weight: Tensor, *rest: Tensor | torch.dtype | None) -> Tensor:
    return codes.new_empty((len(codes), len(weight)), dtype=rest[-1])  # type: ignore[arg-type]


@opaque("product_int8", _like)  # compilers do not know descriptors
def product_op(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    weight = dense_rows(weight)
    out = torch.empty((len(codes), len(weight)), dtype=dtype, device=codes.device)
    capability = torch.cuda.get_device_capability(codes.device) if codes.is_cuda else (0, 0)
    described = capability[0] >= COPIES_TILES and all(map(is_aligned, (codes, weight, out)))
    product_of_tiles(codes, scale, weight, weight_scale, bias, out, tiles(len(codes), capability), described)
    return out


def product_of_tiles(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    size: Tiles,
    described: bool,
) -> None:
    """Write the product into `out` [M, N]. described: the copy engine brings tiles."""
    (M, K), N = codes.shape, len(weight)
    x, w, y = codes, weight, out
    if described:
        x, w, y = (
            TensorDescriptor(one, one.shape, one.stride(), list(shape))
            for one, shape in ((x, (size.m, size.k)), (w, (size.n, size.k)), (y, (size.m, size.n)))
        )
    product_kernel[(cdiv(M, size.m) * cdiv(N, size.n),)](
        x, scale, w, weight_scale, weight_scale if bias is None else bias, y, M, N, weight.stride(0),
        K=K, HAS_BIAS=bias is not None, BLOCK_M=size.m, BLOCK_N=size.n, BLOCK_K=size.k, BAND=BAND,
        DESCRIBED=described, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip


def is_aligned(x: Tensor) -> bool:
    """Whether the copy engine takes the rows of x [M, K]."""
    return x.data_ptr() % ALIGNED == 0 and x.stride(0) * x.itemsize % ALIGNED == 0


def product(
    x: QuantizedTokens, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linears.int8.product_of_tokens`: [..., K] by [N, K] -> [..., N]"""
    codes = x.codes.reshape(-1, weight.shape[1])
    y = product_op(codes.contiguous(), x.scale.contiguous(), weight, weight_scale, bias, dtype)
    return y.reshape(*x.codes.shape[:-1], len(weight))
