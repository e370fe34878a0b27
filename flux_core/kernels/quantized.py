"""The fused ops for layers that take quantized tokens: their inputs are written as e4m3 tokens with scales.

Quantizing a token needs the largest of its features first, so alone it is a second pass over what another kernel just
had in registers. Here that kernel does both: a program holds a whole token, finds its largest number in fp32,
and writes half the bytes that bf16 would take.

quantize   all other tokens (attention's, a hook's results): one read where the plain function takes two
modulate   LayerNorm and modulation -> the input of qkv, of an MLP, of `linear1`
mlp        GELU between the two Linears of an MLP
linear2    [attn | gelu(hidden)] -> the input of `linear2`

Each checks whether its consumer takes such tokens now (`linears/contract.py`), so a model may mix formats, and wrapped
layers get tensors. Where it does not, or a gradient is needed, the functions of `fused` and `products` are used.
All but `quantize` skip a rounding to bf16, and so are closer to fp32 than the plain functions.

Behind the codes for a layer with low-rank branches there is room for the codes of its thin product (`Widened`), and all
codes of the token stay below LARGEST by a margin, so that those have a range of their own (`linears/branch.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..linears.contract import Branches, QuantizedTokens, Widened, needs_grad, takes_tokens, widening
from ..linears.fp8 import E4M3, LARGEST, MARGIN
from . import fused, products
from .fused import normed
from .launch import dense_rows, operator, wrap_triton
from .products import Activated, is_mlp
from .thin import write_codes_behind

NARROW_WARPS, WIDE_WARPS = 2, 8
WIDE = 8192
"""features above which a token is wide"""


def warps(width: int) -> int:
    return WIDE_WARPS if width > WIDE else NARROW_WARPS


def empty_tokens(x: Tensor, width: int) -> QuantizedTokens:
    B, L = x.shape[:2]
    return QuantizedTokens(
        torch.empty((B, L, width), dtype=E4M3, device=x.device),
        torch.empty((B, L, 1), dtype=torch.float32, device=x.device),
    )


@triton.jit
def scale_of(largest, LARGEST: tl.constexpr):
    """LARGEST: of the codes."""
    return tl.maximum(largest, 1e-12) * (1.0 / LARGEST)


def largest(room: int) -> float:
    """The largest code of tokens with that room behind them."""
    return LARGEST / MARGIN if room else LARGEST


def behind(rows: QuantizedTokens, down: Tensor, factor: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with the codes of their thin product written behind them."""
    write_codes_behind(rows, down, factor, gain)
    return rows.codes, rows.scale


def wanted(consumer: nn.Module) -> Branches | None:
    """The branches of a layer that takes tokens with their thin product behind them, or None."""
    found = widening(consumer)
    return None if found is None or found.gain is None else found


def takes_rows(consumer: nn.Module) -> bool:
    """Whether it takes tokens, with room behind them or without."""
    return takes_tokens(consumer) or wanted(consumer) is not None


@triton.jit
def code(y, scale, codes):
    """y / scale, by the reciprocal: an exact division of each number would take longer than reading it."""
    return (y * (1.0 / scale)).to(codes.dtype.element_ty)


@triton.jit
def quantize_kernel(
    x, codes, scales, x_batch, x_row, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr
):
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, col = batch * tl.num_programs(0) + row, tl.arange(0, BLOCK)
    y = tl.load(x + batch * x_batch + row * x_row + col, mask=col < K, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(y), axis=0), LARGEST)
    exact = tl.div_rn(y, scale + tl.zeros_like(y))  # as `quantize_rows` does
    tl.store(codes + at * WIDTH + col, exact.to(codes.dtype.element_ty), mask=col < K)
    tl.store(scales + at, scale)


def quantized(x: Tensor, room: int) -> QuantizedTokens:
    """Tokens of K + room codes, of which the last are not written."""
    (B, L, K), x = x.shape, dense_rows(x)
    rows = empty_tokens(x, K + room)
    wrap_triton(quantize_kernel)[(L, B)](
        x, *rows, *x.stride()[:2],
        K=K, WIDTH=K + room, BLOCK=triton.next_power_of_2(K), LARGEST=largest(room), num_warps=warps(K),
    )  # fmt: skip
    return rows


@operator("quantize_rows")
def quantize_tokens_op(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = quantized(x, 0)
    return rows.codes, rows.scale


@operator("quantize_rows_wide")
def quantize_wide_op(x: Tensor, down: Tensor, factor: Tensor, gain: Tensor, room: int) -> tuple[Tensor, Tensor]:
    return behind(quantized(x, room), down, factor, gain)


def quantize(x: Tensor) -> QuantizedTokens:
    """`linears.fp8.quantize_rows` of tokens [B, L, K], to the bit, without a gradient."""
    return QuantizedTokens(*quantize_tokens_op(x))


def quantize_wide(x: Tensor, found: Branches) -> Widened:
    """Tokens of x [B, L, K] with the thin product of these branches behind them."""
    return Widened(QuantizedTokens(*quantize_wide_op(x, *thin_parts(found))))


def thin_parts(found: Branches) -> tuple[Tensor, Tensor, Tensor, int]:
    """down, factor, gain and room."""
    assert found.gain is not None
    return found.down, found.factor, found.gain, found.room


@triton.jit
def modulate_rows_kernel(
    x, shift, scale, codes, scales, x_batch, x_row, shift_batch, scale_batch,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, col = batch * tl.num_programs(0) + row, tl.arange(0, BLOCK)
    b = tl.load(shift + batch * shift_batch + col, mask=col < D, other=0.0).to(tl.float32)
    g = tl.load(scale + batch * scale_batch + col, mask=col < D, other=-1.0).to(tl.float32)
    y = (1.0 + g) * normed(x + batch * x_batch + row * x_row, col, D) + b
    found = scale_of(tl.max(tl.abs(y), axis=0), LARGEST)
    tl.store(codes + at * WIDTH + col, code(y, found, codes), mask=col < D)
    tl.store(scales + at, found)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, room: int) -> QuantizedTokens:
    """Tokens of D + room codes, of which the last are not written."""
    B, L, D = x.shape
    x, shift, scale = dense_rows(x), dense_rows(shift), dense_rows(scale)
    rows = empty_tokens(x, D + room)
    wrap_triton(modulate_rows_kernel)[(L, B)](
        x, shift, scale, *rows, *x.stride()[:2], shift.stride(0), scale.stride(0),
        D=D, WIDTH=D + room, BLOCK=triton.next_power_of_2(D), LARGEST=largest(room), num_warps=warps(D),
    )  # fmt: skip
    return rows


@operator("modulate_rows")
def modulate_op(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = modulated(x, shift, scale, 0)
    return rows.codes, rows.scale


@operator("modulate_rows_wide")
def modulate_wide_op(
    x: Tensor, shift: Tensor, scale: Tensor, down: Tensor, factor: Tensor, gain: Tensor, room: int
) -> tuple[Tensor, Tensor]:
    return behind(modulated(x, shift, scale, room), down, factor, gain)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, consumer: nn.Module | None = None
) -> Tensor | QuantizedTokens | Widened:
    """`ops.modulate`, quantized where the consumer takes tokens. x: [B, L, D]; shift, scale: [B, 1, D]."""
    if consumer is None or needs_grad(x, shift, scale):
        return fused.modulate(x, shift, scale, consumer)
    if takes_tokens(consumer):
        return QuantizedTokens(*modulate_op(x, shift, scale))
    if found := wanted(consumer):
        return Widened(QuantizedTokens(*modulate_wide_op(x, shift, scale, *thin_parts(found))))
    return fused.modulate(x, shift, scale, consumer)


@triton.jit
def gelu_tanh(x):
    """x/2 (1 + tanh u) is x / (1 + exp(-2u)), with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def join_gelu_rows_kernel(
    attn, hidden, codes, scales, attn_batch, attn_row, hidden_batch, hidden_row,
    D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at, col = batch * tl.num_programs(0) + row, tl.arange(0, BLOCK_M)
    y = tl.load(hidden + batch * hidden_batch + row * hidden_row + col, mask=col < M, other=0.0).to(tl.float32)
    y = gelu_tanh(y)
    largest = tl.max(tl.abs(y), axis=0)
    if D > 0:
        own = tl.arange(0, BLOCK_D)
        x = tl.load(attn + batch * attn_batch + row * attn_row + own, mask=own < D, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
        scale = scale_of(largest, LARGEST)
        tl.store(codes + at * WIDTH + own, code(x, scale, codes), mask=own < D)
    else:
        scale = scale_of(largest, LARGEST)
    tl.store(codes + at * WIDTH + D + col, code(y, scale, codes), mask=col < M)
    tl.store(scales + at, scale)


def joined_gelu(attn: Tensor, hidden: Tensor, room: int) -> QuantizedTokens:
    """Tokens of [attn | gelu(hidden) | room], of which the last codes are not written; attn may have no features."""
    D, M = attn.shape[2], hidden.shape[2]
    attn, hidden = dense_rows(attn), dense_rows(hidden)
    rows = empty_tokens(hidden, D + M + room)
    wrap_triton(join_gelu_rows_kernel)[(hidden.shape[1], hidden.shape[0])](
        attn, hidden, *rows, *attn.stride()[:2], *hidden.stride()[:2], D=D, M=M, WIDTH=D + M + room,
        BLOCK_D=triton.next_power_of_2(max(D, 1)), BLOCK_M=triton.next_power_of_2(M), LARGEST=largest(room),
        num_warps=warps(D + M),
    )  # fmt: skip
    return rows


@operator("join_gelu_rows")
def join_gelu_op(attn: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    rows = joined_gelu(attn, hidden, 0)
    return rows.codes, rows.scale


@operator("join_gelu_rows_wide")
def join_gelu_wide_op(
    attn: Tensor, hidden: Tensor, down: Tensor, factor: Tensor, gain: Tensor, room: int
) -> tuple[Tensor, Tensor]:
    return behind(joined_gelu(attn, hidden, room), down, factor, gain)


def join_gelu(attn: Tensor, hidden: Tensor, consumer: nn.Module) -> QuantizedTokens | Widened:
    """[attn | gelu(hidden)], quantized for a layer that takes tokens. [B, L, D], [B, L, M] -> [B, L, D + M]"""
    if found := wanted(consumer):
        return Widened(QuantizedTokens(*join_gelu_wide_op(attn, hidden, *thin_parts(found))))
    return QuantizedTokens(*join_gelu_op(attn, hidden))


def mlp(layers: nn.Sequential, x: Tensor | QuantizedTokens | Widened) -> Tensor:
    """`ops.mlp`, its hidden features activated and quantized in one pass where its second Linear takes tokens."""
    if not (is_mlp(layers) and takes_rows(layers[2])):
        return products.mlp(layers, x)
    first, gelu, last = layers
    hidden = first(x)
    return last(gelu(hidden) if needs_grad(hidden) else join_gelu(hidden[..., :0], hidden, last))


def linear2(linear: nn.Module, attn: Tensor, hidden: Tensor | Activated) -> Tensor:
    """`ops.linear2`, its input joined, activated and quantized in one pass where it takes tokens."""
    if isinstance(hidden, Activated) or needs_grad(attn, hidden) or not takes_rows(linear):
        return products.linear2(linear, attn, hidden)
    return linear(join_gelu(attn, hidden, linear))
