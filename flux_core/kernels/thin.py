"""The thin product of low-rank branches, t = factor * (A x), as a Triton kernel; its other half is a layer's product.

Nearly all of its time goes to reading x, so a program takes few rows (4608 then fill a card), and all ranks of them.
Sums are in fp32, in a fixed order. Where x leaves room behind its rows (`Widened`), t is written there, so that no
product copies either. Ranks are read from memory in blocks of a power of two, from 16; the factor in every call.

Tokens are read in their codes. If a token's t would not fit into the range of codes, the program scales the codes of
the token down by a power of two: exact but for the smallest, and rare, since tokens leave a margin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ..linears.contract import parts
from ..linears.fp8 import LARGEST
from .launch import dense_rows, operator

ROWS = 16
"""of x in a program; `MANY_ROWS` where each has so many ranks that A, too, takes time to read"""
MANY_RANKS, MANY_ROWS = 64, 32
TILE = 16384
"""numbers of A that a program holds at a time"""
WARPS, STAGES = 4, 3
MOST_RANKS = 512
"""of a program; more are several programs' for tensors, and do not fit behind tokens"""


@triton.jit
def multiplied(
    x, down, total, inside, ranks, x_row, down_row,
    K: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """total + x @ down.T. x: pointers to rows [ROWS]; down: to rows [RANKS]; inside, ranks: which of them are there."""
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a = tl.load(x + x_row[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(down + down_row[:, None] + k[None, :], mask=ranks[:, None] & (k < K)[None, :], other=0.0)
        a = a.to(down.dtype.element_ty)
        if EXACT:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


@triton.jit
def thin_kernel(
    x, y, down, factor, gain, scales, out, x_batch, x_row, y_batch, y_row, down_row, out_batch, out_row, L, R,
    K: tl.constexpr, M: tl.constexpr, ROOM: tl.constexpr, BLOCK_ROOM: tl.constexpr, ROWS: tl.constexpr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """factor * ([x | y] @ down.T) into `out`; without one behind the features of x, and zeros behind it up to ROOM.

    y: None with M = 0. With gain it is of tokens: x are codes, and `scales` theirs; a rank has PARTS columns.
    """
    batch, row = tl.program_id(2).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    inside, ranks, row = row < L, rank < R, row.to(tl.int64)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    total = multiplied(x + batch * x_batch, down, total, inside, ranks, row * x_row, rank * down_row, K, BLOCK, EXACT)
    if M > 0:
        total = multiplied(
            y + batch * y_batch, down + K, total, inside, ranks, row * y_row, rank * down_row, M, BLOCK, EXACT
        )
    f = tl.load(factor + rank, mask=ranks, other=0.0)
    if out is None:  # noqa: SIM108 - and not x a second time, which a compiler would take for another tensor
        place = x + batch * x_batch + row * x_row + K
    else:
        place = out + batch * out_batch + row * out_row
    if gain is not None:
        t = total * (f * tl.load(gain + rank, mask=ranks, other=0.0))[None, :]
        most = tl.max(tl.abs(t), axis=1)
        shrink = tl.where(most > LARGEST, tl.exp2(tl.ceil(tl.log2(most / LARGEST))), 1.0)
        t = t / shrink[:, None]
        if tl.max(shrink, axis=0) > 1.0:
            fitted = x + batch * x_batch + row * x_row
            for start in range(0, K, BLOCK):
                k = start + tl.arange(0, BLOCK)
                there = inside[:, None] & (k < K)[None, :]
                codes = tl.load(fitted[:, None] + k[None, :], mask=there, other=0.0).to(tl.float32)
                tl.store(fitted[:, None] + k[None, :], (codes / shrink[:, None]).to(x.dtype.element_ty), mask=there)
            one = scales + batch * L + row
            tl.store(one, tl.load(one, mask=inside, other=0.0) * shrink, mask=inside)
    else:
        t = total * f[None, :]
    some, place = inside[:, None] & ranks[None, :], place[:, None]
    rounded = t.to(x.dtype.element_ty)
    tl.store(place + rank[None, :], rounded, mask=some)
    if PARTS > 1:
        left_over = t - rounded.to(tl.float32)
        tl.store(place + R + rank[None, :], left_over.to(x.dtype.element_ty), mask=some)
    if PARTS > 2:
        tl.store(place + 2 * R + rank[None, :], rounded, mask=some)
    if ROOM > 0:
        rest = tl.arange(0, BLOCK_ROOM)[None, :]
        zeros = tl.zeros((ROWS, BLOCK_ROOM), tl.float32).to(x.dtype.element_ty)
        tl.store(place + rest, zeros, mask=inside[:, None] & (rest >= PARTS * R) & (rest < ROOM))


INTERPRETED = not isinstance(thin_kernel, triton.JITFunction)
"""whether kernels run on the CPU, where Triton's interpreter multiplies no bf16"""


def launch(
    x: Tensor, y: Tensor | None, down: Tensor, factor: Tensor, out: Tensor | None,
    gain: Tensor | None = None, scales: Tensor | None = None,
) -> None:  # fmt: skip
    """The kernel on x [B, L, K] and y [B, L, M] or None, into `out` [B, L, R]; without it into x [B, L, K + room].

    Of tokens with `gain`; `scales` are theirs.
    """
    (B, L), R, M = x.shape[:2], len(down), 0 if y is None else y.shape[2]
    room, many = 0 if out is not None else x.shape[2] - down.shape[1], triton.next_power_of_2(max(R, 16))
    number = 1 if gain is None else parts(R, room)
    ranks, rows = min(many, MOST_RANKS), MANY_ROWS if MANY_RANKS <= many < MOST_RANKS else ROWS
    wrap_triton(thin_kernel)[(triton.cdiv(L, rows), triton.cdiv(R, ranks), B)](
        x, y, down, factor, gain, scales, out, *x.stride()[:2], *((0, 0) if y is None else y.stride()[:2]),
        down.stride(0), *((0, 0) if out is None else out.stride()[:2]), L, R,
        K=down.shape[1] - M, M=M, PARTS=number, ROOM=room if room > number * R else 0,
        BLOCK_ROOM=triton.next_power_of_2(max(room, 1)), ROWS=rows, RANKS=ranks,
        BLOCK=max(32, min(256, TILE // ranks)), EXACT=INTERPRETED, LARGEST=LARGEST,
        num_warps=WARPS if ranks < 256 else 2 * WARPS, num_stages=STAGES,
    )  # fmt: skip


def write_behind(both: Tensor, down: Tensor, factor: Tensor) -> None:
    """Write factor * (x @ down.T), then zeros, behind x in the rows [x | room]."""
    launch(both, None, dense_rows(down), factor, None)


def write_codes_behind(codes: Tensor, scales: Tensor, down: Tensor, factor: Tensor, gain: Tensor) -> None:
    """`write_behind` in tokens: gain * factor * (codes @ down.T). A token that needs it is scaled down."""
    launch(codes, None, dense_rows(down), factor, None, gain, scales)


@operator("thin")
def thin_op(x: Tensor, down: Tensor, factor: Tensor) -> Tensor:
    x, down = dense_rows(x), dense_rows(down)
    out = torch.empty((*x.shape[:2], len(down)), dtype=x.dtype, device=x.device)
    launch(x, None, down, factor, out)
    return out


@operator("thin_of_two")
def thin_of_two_op(x: Tensor, y: Tensor, down: Tensor, factor: Tensor) -> Tensor:
    x, y, down = dense_rows(x), dense_rows(y), dense_rows(down)
    out = torch.empty((*x.shape[:2], len(down)), dtype=x.dtype, device=x.device)
    launch(x, y, down, factor, out)
    return out


def thin(x: Tensor, y: Tensor | None, down: Tensor, factor: Tensor) -> Tensor:
    """factor * ([x | y] @ down.T), rounded once. x: [..., K]; y: [..., M] or None -> [..., R]"""
    shape = x.shape[:-1]
    x = x.reshape(1, -1, x.shape[-1]) if x.ndim != 3 else x
    if y is None:
        return thin_op(x, down, factor).view(*shape, -1)
    return thin_of_two_op(x, y.reshape(*x.shape[:2], -1), down, factor).view(*shape, -1)
