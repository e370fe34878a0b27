"""The functions around a block's Linears as Triton kernels, with one pass over memory each.

All of it is bound by memory: a tensor of [4608, 3072] in bf16 is 28 MB, 7 µs of an H200's traffic to read, and what
counts is how often it is read and written. So each kernel reads the output of the Linear before it in place, and writes
the input of the next:

modulate        (1 + scale) * (x - mean) / sqrt(var + eps) + shift; one program holds a row, so x is read once
gated_sum       x + gate * y, three passes where the plain function takes five
norm_rope       R (x / rms(x) * scale) for q and k, read from the qkv product as `split_heads` sees it; a program has
                some heads of one token. Written with the tokens outside, [B, L, H, D] in memory, seen as [B, H, L, D]:
                attention gives its output the layout of q, so its heads are then contiguous and nothing is permuted
norm_rope_join  the same for both streams of a double block, written into the joined sequence together with v

Rounding: everything between a load and a store is fp32, so a result rounds once. The plain functions round after each
operation in bf16 (and `rms_norm` before its scale); compiled, they round about as seldom as these. In bf16 the two
differ by at most some units in the last place of the terms of a sum, and the kernels are closer to fp32.

For a compiler the kernels are `triton_op`s: it does not trace into them, and inductor launches the kernels directly,
without dispatch. There is no backward; where a gradient is needed, the plain function is used. No autotuning: it
would cost every first image seconds; the sizes below were the fastest of a few on an H200, for [4608, 3072].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..linears.contract import Widened, needs_grad, widening
from ..model import ops
from ..model.ops import Heads, Scales
from .launch import cdiv, dense_rows, opaque, operator, wrap_triton

MODULATE_WARPS = 4
SUM_ROWS, SUM_FEATURES, SUM_WARPS = 2, 1024, 4
ROPE_HEADS, ROPE_WARPS = 8, 2
JOINED_HEADS, JOINED_WARPS = 8, 1


# LayerNorm and modulation ------------------------------------------------------------------------------


@triton.jit
def normed(row, col, D: tl.constexpr):
    """A row of D features normalized to mean 0 and variance 1; fp32, zero from D on."""
    v = tl.load(row + col, mask=col < D, other=0.0).to(tl.float32)
    centred = tl.where(col < D, v - tl.sum(v, axis=0) / D, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / D + 1e-6)


@triton.jit
def modulate_kernel(
    x, shift, scale, out, x_batch, x_row, shift_batch, scale_batch,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out: rows of WIDTH, of which it writes D."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    inside = col < D
    b = tl.load(shift + batch * shift_batch + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(scale + batch * scale_batch + col, mask=inside, other=0.0).to(tl.float32)
    y = (1.0 + g) * normed(x + batch * x_batch + row * x_row, col, D) + b
    tl.store(out + (batch * rows + row) * WIDTH + col, y.to(out.dtype.element_ty), mask=inside)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, room: int) -> Tensor:
    """[B, L, D + room], of which the last columns are not written."""
    B, L, D = x.shape
    x, shift, scale = dense_rows(x), dense_rows(shift), dense_rows(scale)
    out = torch.empty((B, L, D + room), dtype=x.dtype, device=x.device)
    wrap_triton(modulate_kernel)[(L, B)](
        x, shift, scale, out, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0),
        D=D, WIDTH=D + room, BLOCK=triton.next_power_of_2(D), num_warps=MODULATE_WARPS,
    )  # fmt: skip
    return out


@operator("modulate")
def modulate_op(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return modulated(x, shift, scale, 0)


def wide_without_values(x: Tensor, shift: Tensor, scale: Tensor, scaled: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], x.shape[2] + len(scaled))


@opaque("modulate_wide", wide_without_values)
def modulate_wide_op(x: Tensor, shift: Tensor, scale: Tensor, scaled: Tensor) -> Tensor:
    """[x | x @ scaled.T] of the modulated x."""
    out = modulated(x, shift, scale, len(scaled))
    rows, features = out.flatten(0, 1), x.shape[2]
    torch.mm(rows[:, :features], scaled.t(), out=rows[:, features:])
    return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor, consumer: nn.Module | None = None) -> Tensor | Widened:
    """`ops.modulate` in one pass, with its consumer's branches behind it. x: [B, L, D]; shift, scale: [B, 1, D]."""
    if needs_grad(x, shift, scale):
        return ops.modulate(x, shift, scale, consumer)
    found = widening(consumer)
    if found is None or found.gain is not None:
        return modulate_op(x, shift, scale)
    return Widened(modulate_wide_op(x, shift, scale, found.scaled))


# The residual -----------------------------------------------------------------------------------------


@triton.jit
def gated_sum_kernel(
    x, gate, y, out, x_batch, x_row, gate_batch, y_batch, y_row, L,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.program_id(2).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, row = (row < L) & (col < D), row.to(tl.int64)
    g = tl.load(gate + batch * gate_batch + col, mask=col < D, other=0.0).to(tl.float32)
    a = tl.load(x + batch * x_batch + row * x_row + col, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(y + batch * y_batch + row * y_row + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (batch * L + row) * D + col, (a + g * b).to(out.dtype.element_ty), mask=inside)


@operator("gated_sum")
def gated_sum_op(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    B, L, D = x.shape
    x, gate, y = dense_rows(x), dense_rows(gate), dense_rows(y)
    out = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(D), SUM_FEATURES)
    wrap_triton(gated_sum_kernel)[(cdiv(L, SUM_ROWS), cdiv(D, block), B)](
        x, gate, y, out, x.stride(0), x.stride(1), gate.stride(0), y.stride(0), y.stride(1), L,
        D=D, ROWS=SUM_ROWS, BLOCK=block, num_warps=SUM_WARPS,
    )  # fmt: skip
    return out


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`ops.gated_sum` in one pass. x, y: [B, L, D]; gate: [B, 1, D]."""
    if needs_grad(x, gate, y):
        return ops.gated_sum(x, gate, y)
    return gated_sum_op(x, gate, y)


# Norm of q and k, and their rotation -------------------------------------------------------------------


@triton.jit
def matrix_of(pe, D: tl.constexpr, BLOCK: tl.constexpr):
    """The four entries of each feature pair's rotation matrix, [1, BLOCK / 2] each, from the 2 D numbers of one token.

    Loaded in one piece and split in registers: four loads of every fourth number would cost as much as q and k.
    """
    entry = tl.arange(0, 2 * BLOCK)
    first, second = tl.split(tl.reshape(tl.load(pe + entry, mask=entry < 2 * D, other=0.0), (BLOCK // 2, 2, 2)))
    a, c = tl.split(first)
    b, d = tl.split(second)
    return a[None, :], b[None, :], c[None, :], d[None, :]


@triton.jit
def norm_rotate(x, scale, a, b, c, d, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """x normalized, scaled and rotated, (even, odd) -> (a even + b odd, c even + d odd). x: fp32, zero from D on."""
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + 1e-6)[:, None] * scale[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * even + b * odd, c * even + d * odd), (HEADS, BLOCK))


@triton.jit
def norm_rope_kernel(
    q, k, q_scale, k_scale, pe, q_out, k_out,
    q_batch, q_head, q_row, k_batch, k_head, k_row, pe_batch, pe_row, L,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (H + HEADS - 1) // HEADS
    row, batch = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) % groups) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK)
    inside = (head < H) & (col < D)[None, :]
    x = tl.load(q + batch * q_batch + row * q_row + head * q_head + col[None, :], mask=inside, other=0.0)
    y = tl.load(k + batch * k_batch + row * k_row + head * k_head + col[None, :], mask=inside, other=0.0)
    x_scale = tl.load(q_scale + col, mask=col < D, other=0.0).to(tl.float32)
    y_scale = tl.load(k_scale + col, mask=col < D, other=0.0).to(tl.float32)
    a, b, c, d = matrix_of(pe + batch * pe_batch + row * pe_row, D, BLOCK)
    x = norm_rotate(x.to(tl.float32), x_scale, a, b, c, d, D, HEADS, BLOCK)
    y = norm_rotate(y.to(tl.float32), y_scale, a, b, c, d, D, HEADS, BLOCK)
    place = ((batch * L + row) * H + head) * D + col[None, :]
    tl.store(q_out + place, x.to(q_out.dtype.element_ty), mask=inside)
    tl.store(k_out + place, y.to(k_out.dtype.element_ty), mask=inside)


@operator("norm_rope")
def norm_rope_op(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    B, H, L, D = q.shape
    q, k, pe = dense_rows(q), dense_rows(k), dense_pe(pe)
    q_out = torch.empty((B, L, H, D), dtype=q.dtype, device=q.device)
    k_out = torch.empty((B, L, H, D), dtype=k.dtype, device=k.device)
    wrap_triton(norm_rope_kernel)[(L * cdiv(H, ROPE_HEADS), B)](
        q, k, q_scale, k_scale, pe, q_out, k_out,
        *q.stride()[:3], *k.stride()[:3], batch_stride(pe), pe.stride(2), L,
        H=H, D=D, HEADS=ROPE_HEADS, BLOCK=triton.next_power_of_2(D), num_warps=ROPE_WARPS,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def dense_pe(pe: Tensor) -> Tensor:
    """pe with each token's matrices contiguous, as in the output of `embed_nd` and its slices of tokens."""
    return pe if pe[0, 0, 0].is_contiguous() else pe.contiguous()


def batch_stride(pe: Tensor) -> int:
    """The stride of pe over the batch: 0 for one row that all share."""
    return pe.stride(0) if pe.shape[0] > 1 else 0


def norm_rope(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.norm_rope` in one pass. q, k: [B, H, L, D], also out as such, with tokens outside heads in memory."""
    if needs_grad(q, k, q_scale, k_scale):
        return ops.norm_rope(q, k, q_scale, k_scale, pe)
    return norm_rope_op(q, k, q_scale, k_scale, pe)


@triton.jit
def norm_rope_join_kernel(
    txt_q, txt_k, txt_v, img_q, img_k, img_v, txt_q_scale, txt_k_scale, img_q_scale, img_k_scale, pe,
    q_out, k_out, v_out,
    txt_batch, txt_head, txt_row, img_batch, img_head, img_row, pe_batch, pe_row, T, L,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (H + HEADS - 1) // HEADS
    row, batch = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) % groups) * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, BLOCK)
    inside = (head < H) & (col < D)[None, :]
    if row < T:
        at = batch * txt_batch + row * txt_row + head * txt_head + col[None, :]
        x = tl.load(txt_q + at, mask=inside, other=0.0)
        y = tl.load(txt_k + at, mask=inside, other=0.0)
        z = tl.load(txt_v + at, mask=inside, other=0.0)
        x_scale = tl.load(txt_q_scale + col, mask=col < D, other=0.0)
        y_scale = tl.load(txt_k_scale + col, mask=col < D, other=0.0)
    else:
        at = batch * img_batch + (row - T) * img_row + head * img_head + col[None, :]
        x = tl.load(img_q + at, mask=inside, other=0.0)
        y = tl.load(img_k + at, mask=inside, other=0.0)
        z = tl.load(img_v + at, mask=inside, other=0.0)
        x_scale = tl.load(img_q_scale + col, mask=col < D, other=0.0)
        y_scale = tl.load(img_k_scale + col, mask=col < D, other=0.0)
    a, b, c, d = matrix_of(pe + batch * pe_batch + row * pe_row, D, BLOCK)
    x = norm_rotate(x.to(tl.float32), x_scale.to(tl.float32), a, b, c, d, D, HEADS, BLOCK)
    y = norm_rotate(y.to(tl.float32), y_scale.to(tl.float32), a, b, c, d, D, HEADS, BLOCK)
    place = ((batch * L + row) * H + head) * D + col[None, :]
    tl.store(q_out + place, x.to(q_out.dtype.element_ty), mask=inside)
    tl.store(k_out + place, y.to(k_out.dtype.element_ty), mask=inside)
    tl.store(v_out + place, z, mask=inside)


@operator("norm_rope_join")
def norm_rope_join_op(
    txt_q: Tensor, txt_k: Tensor, txt_v: Tensor, img_q: Tensor, img_k: Tensor, img_v: Tensor,
    txt_q_scale: Tensor, txt_k_scale: Tensor, img_q_scale: Tensor, img_k_scale: Tensor, pe: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, T, D = txt_q.shape
    L = T + img_q.shape[2]
    txt_q, txt_k, txt_v = same_strides(txt_q, txt_k, txt_v)
    img_q, img_k, img_v = same_strides(img_q, img_k, img_v)
    pe = dense_pe(pe)
    q_out = torch.empty((B, L, H, D), dtype=img_q.dtype, device=img_q.device)
    k_out = torch.empty((B, L, H, D), dtype=img_q.dtype, device=img_q.device)
    v_out = torch.empty((B, L, H, D), dtype=img_q.dtype, device=img_q.device)
    wrap_triton(norm_rope_join_kernel)[(L * cdiv(H, JOINED_HEADS), B)](
        txt_q, txt_k, txt_v, img_q, img_k, img_v, txt_q_scale, txt_k_scale, img_q_scale, img_k_scale, pe,
        q_out, k_out, v_out,
        *txt_q.stride()[:3], *img_q.stride()[:3], batch_stride(pe), pe.stride(2), T, L,
        H=H, D=D, HEADS=JOINED_HEADS, BLOCK=triton.next_power_of_2(D), num_warps=JOINED_WARPS,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2), v_out.transpose(1, 2)


def same_strides(q: Tensor, k: Tensor, v: Tensor) -> Heads:
    """q, k, v with equal strides, as three slices of one product have them."""
    if q.stride(-1) == 1 and q.stride() == k.stride() == v.stride():
        return q, k, v
    return q.contiguous(), k.contiguous(), v.contiguous()


def norm_rope_join(txt: Heads, img: Heads, txt_scales: Scales, img_scales: Scales, pe: Tensor) -> Heads:
    """`ops.norm_rope_join` in one pass: q, k, v [B, H, T + L, D], with tokens outside heads in memory."""
    if needs_grad(*txt, *img, *txt_scales, *img_scales):
        return ops.norm_rope_join(txt, img, txt_scales, img_scales, pe)
    return norm_rope_join_op(*txt, *img, *txt_scales, *img_scales, pe)
