"""The functions between the autoencoder's convolutions (`model/ae_ops`) as Triton kernels, on channels_last maps.

cuDNN's convolutions want a pixel's channels contiguous in memory (`channels_last`), and would permute every map there
and back; here maps stay so, and as few passes as possible are made over a map between two convolutions:

group norm   one pass for the moments, one to normalize and activate. Moments are a channel's mean and summed squared
             deviation over a chunk of pixels, from sums of differences to the chunk's first pixel, so that nothing is
             lost far from zero; merged for a group in a fixed order (Chan, Golub, LeVeque 1983), so deterministic
bias         PyTorch adds a convolution's bias in a pass of its own. Here the norm after a convolution, or the residual
             sum, adds it
upsampling   a 3x3 convolution of a map with every pixel repeated four times sees 2x2 different ones: it is four 2x2
             convolutions of the small map, one for each pixel of four, with weights added up. 4/9 of the work
attention    one head of 512 features is more than flash kernels support: plain products, a few thousand rows at a
             time, with fp32 scores between

Between a load and a store everything is fp32. There is no backward: where a gradient is needed, or a layer has to be
called (`is_bare`), the plain function is used, as for channels and groups that are no powers of two (FLUX's all are).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..linears.contract import is_bare, needs_grad
from ..model import ae_ops
from ..model.ae_ops import AeOps
from .launch import cdiv, operator, wrap_triton

ELEMENTS, WARPS = 4096, 4
"""of a map that a program holds at once"""
CHUNKS = 1024
"""of pixels at most, each with moments of its own"""
MERGE_WARPS = 8
QUERIES = 4096
"""rows of attention's scores at a time: 0.4 GB with 16384 keys, less than a feature map of the finest level"""
SOFTMAX_WARPS = 16


def dense(x: Tensor) -> Tensor:
    """x in channels_last."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_dense(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def pixels_of(channels: int) -> int:
    """Pixels that a program holds at once."""
    return max(1, ELEMENTS // channels)


def product(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without its bias, in new memory that may be written to."""
    return dense(conv._conv_forward(x, conv.weight, None))


# GroupNorm ------------------------------------------------------------------------------------------------


@triton.jit
def moments_kernel(x, means, squares, HW, chunk, T, C: tl.constexpr, PIXELS: tl.constexpr):
    t, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C)
    begin = t * chunk
    end = tl.minimum(begin + chunk, HW)
    first = tl.load(x + (batch * HW + begin) * C + channel).to(tl.float32)
    total = tl.zeros((PIXELS, C), tl.float32)
    square = tl.zeros((PIXELS, C), tl.float32)
    pixel = begin + tl.arange(0, PIXELS)
    while begin < end:
        inside = (pixel < end)[:, None]
        v = tl.load(x + (batch * HW + pixel)[:, None] * C + channel[None, :], mask=inside, other=0.0)
        d = tl.where(inside, v.to(tl.float32) - first[None, :], 0.0)
        total += d
        square += d * d
        pixel += PIXELS
        begin += PIXELS
    n = (end - t * chunk).to(tl.float32)
    s = tl.sum(total, axis=0)
    place = (batch * T + t) * C + channel
    tl.store(means + place, first + s / n)
    tl.store(squares + place, tl.maximum(tl.sum(square, axis=0) - s * s / n, 0.0))


@triton.jit
def merge_kernel(
    means, squares, bias, weight, centre, scale, HW, chunk, T, eps,
    C: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """For each channel, the centre to subtract and the scale to multiply by. bias: the convolution's, or None."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    t = tl.arange(0, CHUNKS)
    inside = (t < T)[:, None]
    place = (batch * T + t)[:, None] * C + channel[None, :]
    b = tl.zeros((GROUP,), tl.float32)
    if bias is not None:
        b += tl.load(bias + channel).to(tl.float32)
    m = tl.where(inside, tl.load(means + place, mask=inside, other=0.0) + b[None, :], 0.0)
    n = tl.where(t < T, tl.minimum(HW - t * chunk, chunk), 0).to(tl.float32)[:, None]
    count = HW * GROUP * 1.0
    mean = tl.sum(tl.sum(m * (n / count), axis=1), axis=0)
    d = tl.where(inside, m - mean, 0.0)
    spread = tl.load(squares + place, mask=inside, other=0.0) + n * d * d
    inverse = tl.rsqrt(tl.sum(tl.sum(spread, axis=1), axis=0) / count + eps)
    tl.store(centre + batch * C + channel, mean - b)
    tl.store(scale + batch * C + channel, tl.load(weight + channel).to(tl.float32) * inverse)


@triton.jit
def normalize_kernel(x, centre, scale, shift, out, HW, C: tl.constexpr, PIXELS: tl.constexpr, SILU: tl.constexpr):
    """`out` may be x."""
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = (pixel < HW)[:, None]
    m = tl.load(centre + batch * C + channel)[None, :]
    g = tl.load(scale + batch * C + channel)[None, :]
    b = tl.load(shift + channel).to(tl.float32)[None, :]
    place = (batch * HW + pixel)[:, None] * C + channel[None, :]
    y = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - m) * g + b
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def launch_norm(
    x: Tensor, out: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> None:
    """out = GroupNorm(x + before); x and out in channels_last; they may be the same."""
    B, C, H, W = x.shape
    chunk = max(32, cdiv(H * W, CHUNKS))
    T, PIXELS = cdiv(H * W, chunk), pixels_of(C)
    means, squares = torch.empty((2, B, T, C), dtype=torch.float32, device=x.device)
    centre, scale = torch.empty((2, B, C), dtype=torch.float32, device=x.device)
    wrap_triton(moments_kernel)[(T, B)](x, means, squares, H * W, chunk, T, C=C, PIXELS=PIXELS, num_warps=WARPS)
    wrap_triton(merge_kernel)[(groups, B)](
        means, squares, before, weight, centre, scale, H * W, chunk, T, eps,
        C=C, GROUP=C // groups, CHUNKS=CHUNKS, num_warps=MERGE_WARPS,
    )  # fmt: skip
    wrap_triton(normalize_kernel)[(cdiv(H * W, PIXELS), B)](
        x, centre, scale, bias, out, H * W, C=C, PIXELS=PIXELS, SILU=silu, num_warps=WARPS
    )


@operator("group_norm")
def group_norm_op(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    x = dense(x)
    out = empty_dense(x, x.shape)
    launch_norm(x, out, None, weight, bias, groups, eps, silu)
    return out


@operator("group_norm_", changes=("x",))
def group_norm_op_(
    x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> None:
    """In place, of x + before; x in channels_last."""
    launch_norm(x, x, before, weight, bias, groups, eps, silu)


def fits(norm: nn.GroupNorm, x: Tensor) -> bool:
    powers = all(n & (n - 1) == 0 for n in (norm.num_channels, norm.num_groups))
    return powers and norm.affine and is_bare(norm, nn.GroupNorm, x)


def norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not fits(norm, x):
        return ae_ops.norm(norm, x)
    return group_norm_op(x, norm.weight, norm.bias, norm.num_groups, norm.eps, False)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not fits(norm, x):
        return ae_ops.norm_silu(norm, x)
    return group_norm_op(x, norm.weight, norm.bias, norm.num_groups, norm.eps, True)


def conv_norm_silu(conv: nn.Conv2d, norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not (is_bare(conv, nn.Conv2d, x) and fits(norm, x)):
        return ae_ops.conv_norm_silu(conv, norm, x)
    y = product(conv, x)
    group_norm_op_(y, conv.bias, norm.weight, norm.bias, norm.num_groups, norm.eps, True)
    return y


# Sums -------------------------------------------------------------------------------------------------------


@triton.jit
def add_kernel(x, residual, bias, N, C: tl.constexpr, PIXELS: tl.constexpr):
    channel = tl.arange(0, C)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = (pixel < N)[:, None]
    place = pixel[:, None] * C + channel[None, :]
    y = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias + channel).to(tl.float32)[None, :]
    tl.store(x + place, y.to(x.dtype.element_ty), mask=inside)


@operator("add_", changes=("x",))
def add_op_(x: Tensor, residual: Tensor, bias: Tensor) -> None:
    """x += residual + bias; x in channels_last."""
    B, C, H, W = x.shape
    PIXELS = pixels_of(C)
    wrap_triton(add_kernel)[(cdiv(B * H * W, PIXELS),)](
        x, dense(residual), bias, B * H * W, C=C, PIXELS=PIXELS, num_warps=WARPS
    )


def conv_add(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    if not takes_bias(conv, x) or needs_grad(residual):
        return ae_ops.conv_add(conv, x, residual)
    y = product(conv, x)
    add_op_(y, residual, conv.bias)
    return y


def takes_bias(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a kernel may add the bias of this convolution."""
    power = conv.out_channels & (conv.out_channels - 1) == 0
    return power and conv.bias is not None and is_bare(conv, nn.Conv2d, x)


# Upsampling and its convolution -------------------------------------------------------------------------


def quarter_weights(weight: Tensor) -> Tensor:
    """A 3x3 convolution's weights [O, I, 3, 3] as those of four 2x2 convolutions, [4 * O, I, 2, 2].

    Of two repeated pixels, the even sees its left neighbour once and itself twice, the odd itself twice and its right
    neighbour once; rows likewise. Parities (row, column) are outermost.
    """
    w = weight.float()
    for dim in (2, 4):  # each becomes two: parity and tap
        before, here, behind = w.unbind(dim)
        even, odd = torch.stack((before, here + behind), dim), torch.stack((before + here, behind), dim)
        w = torch.stack((even, odd), dim)
    w = w.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).to(weight.dtype)
    return dense(w)


@triton.jit
def weave_kernel(x, bias, out, H, W, C: tl.constexpr, PIXELS: tl.constexpr):
    """x: [B, H + 1, W + 1, 2, 2, C] in memory -> [B, 2H, 2W, C]; a program has some pixels of one row."""
    row, batch = tl.program_id(0).to(tl.int64) % (2 * H), tl.program_id(0).to(tl.int64) // (2 * H)
    column = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, C)
    inside = (column < 2 * W)[:, None]
    place = (batch * (H + 1) + (row + 1) // 2) * (W + 1) + (column + 1) // 2
    source = (place * 4 + row % 2 * 2 + column % 2)[:, None] * C + channel[None, :]
    y = tl.load(x + source, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + channel).to(tl.float32)[None, :]
    target = (tl.program_id(0).to(tl.int64) * 2 * W + column)[:, None] * C + channel[None, :]
    tl.store(out + target, y.to(out.dtype.element_ty), mask=inside)


@operator("weave")
def weave_op(x: Tensor, bias: Tensor) -> Tensor:
    """[B, 4 * C, H + 1, W + 1], parities outermost -> [B, C, 2H, 2W], with the bias."""
    B, C, H, W = x.shape[0], x.shape[1] // 4, x.shape[2] - 1, x.shape[3] - 1
    out, PIXELS = empty_dense(x, (B, C, 2 * H, 2 * W)), pixels_of(C)
    wrap_triton(weave_kernel)[(2 * B * H, cdiv(2 * W, PIXELS))](
        dense(x), bias, out, H, W, C=C, PIXELS=PIXELS, num_warps=WARPS
    )
    return out


def upsample_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not takes_bias(conv, x):
        return ae_ops.upsample_conv(conv, x)
    return weave_op(nn.functional.conv2d(x, quarter_weights(conv.weight), padding=1), conv.bias)


# Attention --------------------------------------------------------------------------------------------------


@triton.jit
def softmax_kernel(scores, out, L, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * L
    col = tl.arange(0, BLOCK)
    s = tl.load(scores + row + col, mask=col < L, other=float("-inf"))
    p = tl.exp((s - tl.max(s, axis=0)) * scale)
    tl.store(out + row + col, (p / tl.sum(p, axis=0)).to(out.dtype.element_ty), mask=col < L)


@operator("softmax")
def softmax_op(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Softmax over the last axis of scale * scores (fp32, contiguous), rounded to that dtype."""
    out = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    L = scores.shape[-1]
    wrap_triton(softmax_kernel)[(scores.numel() // L,)](
        scores, out, L, scale, BLOCK=triton.next_power_of_2(L), num_warps=SOFTMAX_WARPS
    )
    return out


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """q @ k.T in fp32, [B, L, L']: scores rounded to bf16 would be off by up to 1/256 of themselves, in an exponent."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(q.float(), k.float().mT)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if needs_grad(q, k, v):
        return ae_ops.attend(q, k, v)
    _, C, H, W = q.shape
    q, k, v = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (q, k, v))
    rows = [torch.bmm(softmax_op(scores_of(part, k), C**-0.5, v.dtype), v) for part in q.split(QUERIES, dim=1)]
    return torch.cat(rows, dim=1).unflatten(1, (H, W)).permute(0, 3, 1, 2)


OPS = AeOps(norm, norm_silu, conv_norm_silu, conv_add, attend, upsample_conv)
