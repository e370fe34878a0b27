"""The fused ops for layers in int8: their inputs are rotated and written as int8 tokens with scales.

As in `quantized`, a program holds a whole token, and what another kernel just had in registers is quantized there.
Before that it is rotated there, in groups of features, by stages of additions (`linears/int8.py`).

quantize   tokens of attention's or a hook's results: one read
modulate   LayerNorm and modulation -> the input of qkv, of an MLP, of `linear1`
mlp        GELU between the two Linears of an MLP
linear2    [attn | gelu(hidden)] -> the input of `linear2`; both are whole groups, else the layer is called

Each checks whether its consumer is a layer that takes such tokens now, so a model may mix formats; where it is not, the
functions of `quantized` are used, and those of `fused` and `products` by them. The product of such tokens is in
`int8_product`.

A token with a number that is not finite gets a scale that is not: codes could not say it.
"""

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..linears.contract import QuantizedTokens, Widened, first_of, is_leaf, needs_grad
from ..linears.int8 import LARGEST, SMALLEST, Int8Linear
from . import products, quantized
from .fused import normed
from .launch import dense_rows, opaque, operator, wrap_triton
from .products import Activated, is_mlp
from .quantized import gelu_tanh

NARROW_WARPS, WIDE_WARPS, WIDE = 4, 16, 8192
"""of a program for a token, and the features above which it is wide"""
REGISTERS = 168
"""of a thread, so that three programs of 15360 features run at a time"""


def warps(width: int) -> int:
    return WIDE_WARPS if width > WIDE else NARROW_WARPS


def empty_tokens(x: Tensor, width: int) -> QuantizedTokens:
    B, L = x.shape[:2]
    return QuantizedTokens(
        torch.empty((B, L, width), dtype=torch.int8, device=x.device),
        torch.empty((B, L, 1), dtype=torch.float32, device=x.device),
    )


def group_of(consumer: nn.Module) -> int | None:
    """The group that a layer, or the first of a Sequential, takes int8 tokens in; None where it takes none now."""
    layer = first_of(consumer)
    if isinstance(layer, Int8Linear) and is_leaf(layer) and layer.takes_tokens():
        return layer.group
    return None


# In registers ------------------------------------------------------------------------------------------


@triton.jit
def rotated(y, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """`linears.int8.rotate` of fp32 [BLOCK], to the bit. A stage takes a feature's last digit and puts it first."""
    if GROUP > 0:
        FOURTHS: tl.constexpr = GROUP // 4
        STAGES: tl.constexpr = 1 if GROUP == 4 else 2 if GROUP == 16 else 3 if GROUP == 64 else 4
        for _ in tl.static_range(STAGES):
            even, odd = tl.split(tl.reshape(y, (BLOCK // GROUP, FOURTHS, 2, 2)))
            a, c = tl.split(even)
            b, d = tl.split(odd)
            both, less = a + b, a - b
            evens = tl.join(both + c - d, less + c + d)
            odds = tl.join(both - c + d, c - less + d)
            y = tl.permute(tl.reshape(tl.join(evens, odds), (BLOCK // GROUP, FOURTHS, 4)), (0, 2, 1))
        y = tl.reshape(y, (BLOCK,)) * (1.0 / 2**STAGES)
    return y


@triton.jit
def largest_of(y):
    """The bits of max |y|; those of a NaN, if there is one, as they are above all others."""
    return tl.max(tl.abs(y).to(tl.int32, bitcast=True), axis=0)


@triton.jit
def scale_of(largest, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """largest: its bits."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full((), LARGEST, tl.float32))
    return tl.where(scale < SMALLEST, SMALLEST, scale)


@triton.jit
def rounded(y):
    """To the nearest whole number, ties to even, of |y| < 2^22: 3 * 2^22 has no bits for a fraction."""
    return ((y + 12582912.0) - 12582912.0).to(tl.int8)


# Tokens ------------------------------------------------------------------------------------------------


@triton.jit
def quantize_kernel(
    x, codes, scales, x_batch, x_row,
    K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, col = batch * tl.num_programs(0) + row, tl.arange(0, BLOCK)
    y = tl.load(x + batch * x_batch + row * x_row + col, mask=col < K, other=0.0).to(tl.float32)
    y = rotated(y, BLOCK, GROUP)
    scale = scale_of(largest_of(y), LARGEST, SMALLEST)
    exact = tl.div_rn(y, scale + tl.zeros_like(y))  # as `quantize_rows` does
    tl.store(codes + at * K + col, rounded(exact), mask=col < K)
    tl.store(scales + at, scale)


@operator("quantize_int8")
def quantize_op(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    (B, L, K), x = x.shape, dense_rows(x)
    rows = empty_tokens(x, K)
    wrap_triton(quantize_kernel)[(L, B)](
        x, *rows, *x.stride()[:2],
        K=K, BLOCK=block(K), GROUP=group, LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=warps(K),
    )  # fmt: skip
    return rows.codes, rows.scale


def quantize(x: Tensor, group: int) -> QuantizedTokens:
    """`linears.int8.quantize_rows` of tokens [..., K], to the bit, without a gradient."""
    if x.ndim == 3:
        return QuantizedTokens(*quantize_op(x, group))
    codes, scale = quantize_op(x.reshape(1, -1, x.shape[-1]), group)
    return QuantizedTokens(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1))


def block(width: int) -> int:
    """Features of a program, in whole groups: those behind a token are zeros, and stay so."""
    return max(256, triton.next_power_of_2(width))


@triton.jit
def modulate_kernel(
    x, shift, scale, codes, scales, x_batch, x_row, shift_batch, scale_batch,
    D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, col = batch * tl.num_programs(0) + row, tl.arange(0, BLOCK)
    b = tl.load(shift + batch * shift_batch + col, mask=col < D, other=0.0).to(tl.float32)
    g = tl.load(scale + batch * scale_batch + col, mask=col < D, other=-1.0).to(tl.float32)
    y = (1.0 + g) * normed(x + batch * x_batch + row * x_row, col, D) + b
    y = rotated(y, BLOCK, GROUP)
    found = scale_of(largest_of(y), LARGEST, SMALLEST)
    tl.store(codes + at * D + col, rounded(y * (1.0 / found)), mask=col < D)
    tl.store(scales + at, found)


@operator("modulate_int8")
def modulate_op(x: Tensor, shift: Tensor, scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    D = x.shape[2]
    x, shift, scale = dense_rows(x), dense_rows(shift), dense_rows(scale)
    rows = empty_tokens(x, D)
    wrap_triton(modulate_kernel)[(x.shape[1], x.shape[0])](
        x, shift, scale, *rows, *x.stride()[:2], shift.stride(0), scale.stride(0),
        D=D, BLOCK=block(D), GROUP=group, LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=warps(D),
    )  # fmt: skip
    return rows.codes, rows.scale


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, consumer: nn.Module | None = None
) -> Tensor | QuantizedTokens | Widened:
    """`ops.modulate`, rotated and quantized where the consumer takes int8 tokens. x: [B, L, D]; shift, scale:
    [B, 1, D]."""
    group = None if consumer is None or needs_grad(x, shift, scale) else group_of(consumer)
    if group is None:
        return quantized.modulate(x, shift, scale, consumer)
    return QuantizedTokens(*modulate_op(x, shift, scale, group))


@triton.jit
def join_gelu_kernel(
    attn, hidden, codes, scales, attn_batch, attn_row, hidden_batch, hidden_row,
    D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, col = batch * tl.num_programs(0) + row, tl.arange(0, BLOCK_M)
    y = tl.load(hidden + batch * hidden_batch + row * hidden_row + col, mask=col < M, other=0.0).to(tl.float32)
    y = rotated(gelu_tanh(y).to(hidden.dtype.element_ty).to(tl.float32), BLOCK_M, GROUP)
    largest = largest_of(y)
    if D > 0:
        own = tl.arange(0, BLOCK_D)
        x = tl.load(attn + batch * attn_batch + row * attn_row + own, mask=own < D, other=0.0).to(tl.float32)
        x = rotated(x, BLOCK_D, GROUP)
        scale = scale_of(tl.maximum(largest, largest_of(x)), LARGEST, SMALLEST)
        tl.store(codes + at * (D + M) + own, rounded(x * (1.0 / scale)), mask=own < D)
    else:
        scale = scale_of(largest, LARGEST, SMALLEST)
    tl.store(codes + at * (D + M) + D + col, rounded(y * (1.0 / scale)), mask=col < M)
    tl.store(scales + at, scale)


@triton.jit
def hadamard64(dtype: tl.constexpr):
    """The rotation of 64 features: a number of it is negative where an odd number of digits in base 4 add up to 3."""
    i = tl.arange(0, 64)
    x = i[:, None] ^ i[None, :]
    odd = ((x & 3) == 3) ^ ((x >> 2 & 3) == 3) ^ (x >> 4 == 3)
    return tl.where(odd, -0.125, 0.125).to(dtype)


@triton.jit
def rotated64(x, own, h, ALL: tl.constexpr):
    """x [N, 64], activated where it is not attention's own, and rotated. Rounded between, as without this kernel."""
    y = gelu_tanh(x.to(tl.float32))
    y = y if ALL else tl.where(own, x.to(tl.float32), y)
    return tl.dot(y.to(x.dtype).to(h.dtype), h, input_precision="ieee")


@triton.jit
def bits(y):
    return tl.abs(y).to(tl.int32, bitcast=True)


@triton.jit
def join_gelu_256_kernel(
    attn, hidden, codes, scales, attn_batch, attn_row, hidden_batch, hidden_row,
    D: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """`join_gelu_kernel` in groups of 256, each four times 64: products rotate 64, and the last stage adds up the four,
    which lie in the registers of one thread. Numbers are twice those of the rotation."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, col = tl.arange(0, GROUPS)[:, None] * 256, tl.arange(0, 64)[None, :]
    own, there = n < D, n < D + M
    x = hidden + batch * hidden_batch + row * hidden_row + n - D + col
    if D > 0:  # a choice of pointers hides that they are contiguous
        x = tl.where(own, attn + batch * attn_batch + row * attn_row + n + col, x)
        x = tl.multiple_of(tl.max_contiguous(x, (1, 64)), (1, 16))
    a, b = tl.load(x, mask=there, other=0.0), tl.load(x + 64, mask=there, other=0.0)  # all, before a product waits
    c, d = tl.load(x + 128, mask=there, other=0.0), tl.load(x + 192, mask=there, other=0.0)
    h = hadamard64(UNITS)
    a, b = rotated64(a, own, h, D == 0), rotated64(b, own, h, D == 0)
    c, d = rotated64(c, own, h, D == 0), rotated64(d, own, h, D == 0)
    both, less = a + b, a - b
    a, b, c, d = both + c - d, both - c + d, less + c + d, c - less + d
    largest = tl.maximum(tl.maximum(bits(a), bits(b)), tl.maximum(bits(c), bits(d)))
    scale = scale_of(tl.max(tl.max(largest, axis=1), axis=0), 2 * LARGEST, SMALLEST)
    at, inverse = batch * tl.num_programs(0) + row, 0.5 / scale
    to = codes + at * (D + M) + n + col
    tl.store(to, rounded(a * inverse), mask=there)
    tl.store(to + 64, rounded(b * inverse), mask=there)
    tl.store(to + 128, rounded(c * inverse), mask=there)
    tl.store(to + 192, rounded(d * inverse), mask=there)
    tl.store(scales + at, scale)


def _joined(attn: Tensor, hidden: Tensor, group: int) -> tuple[Tensor, Tensor]:
    rows = empty_tokens(hidden, attn.shape[2] + hidden.shape[2])
    return rows.codes, rows.scale


@opaque("join_gelu_int8", _joined)
def join_gelu_op(attn: Tensor, hidden: Tensor, group: int) -> tuple[Tensor, Tensor]:
    D, M = attn.shape[2], hidden.shape[2]
    attn, hidden = dense_rows(attn), dense_rows(hidden)
    rows = empty_tokens(hidden, D + M)
    grid, strides = (hidden.shape[1], hidden.shape[0]), (*attn.stride()[:2], *hidden.stride()[:2])
    if group == 256:
        units = tl.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else tl.float32
        join_gelu_256_kernel[grid](
            attn, hidden, *rows, *strides, D=D, M=M, GROUPS=max(16, triton.next_power_of_2((D + M) // 256)),
            UNITS=units, LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    else:
        join_gelu_kernel[grid](
            attn, hidden, *rows, *strides, D=D, M=M, BLOCK_D=block(D), BLOCK_M=block(M), GROUP=group,
            LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=warps(D + M),
        )  # fmt: skip
    return rows.codes, rows.scale


def join_gelu(attn: Tensor, hidden: Tensor, group: int) -> QuantizedTokens:
    """[attn | gelu(hidden)], in their dtype, rotated and quantized. [B, L, D], [B, L, M], both whole groups ->
    [B, L, D + M]"""
    return QuantizedTokens(*join_gelu_op(attn, hidden, group))


def mlp(layers: nn.Sequential, x: Tensor | QuantizedTokens | Widened) -> Tensor:
    """`ops.mlp`, its hidden features activated, rotated and quantized in one pass where its second Linear takes so."""
    group = group_of(layers[2]) if is_mlp(layers) else None
    if group is None:
        return quantized.mlp(layers, x)
    first, gelu, last = layers
    hidden = first(x)
    return last(gelu(hidden) if needs_grad(hidden) else join_gelu(hidden[..., :0], hidden, group))


def linear2(linear: nn.Module, attn: Tensor, hidden: Tensor | Activated) -> Tensor:
    """`ops.linear2`, its input joined, activated, rotated and quantized in one pass where it takes that."""
    group = None if isinstance(hidden, Activated) or needs_grad(attn, hidden) else group_of(linear)
    if group is None:
        return quantized.linear2(linear, attn, hidden)
    if group and attn.shape[2] % group:
        return products.linear2(linear, attn, hidden)  # a group would be of both
    return linear(join_gelu(attn, cast(Tensor, hidden), group))
