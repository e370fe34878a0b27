"""Encode and decode large pictures in strips: the numbers of the whole picture in a third of the memory, no seams.

The plain decoder has up to three full-size feature maps alive at once. Here a feature map is a list of strips of rows,
and every layer processes it strip by strip: its output replaces its input. A 3x3 convolution reads the neighbouring
strips' rows, a GroupNorm takes its statistics over all strips before it changes the first, and the coarsest level with
its attention, small as it is, runs whole. So nothing is estimated or blended: the result is that of the plain path
(`model/autoencoder.py`, the reference) except for the order of sums.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import AutoEncoder, ResnetBlock

ROWS = 8
"""rows of the latent in a strip: 64 of the picture"""

Strips = list[Tensor]
"""a feature map [B, C, H, W] in strips of rows [B, C, h, W], from top to bottom"""


@torch.no_grad()
def decode(ae: AutoEncoder, z: Tensor) -> Tensor:
    """`ae.decode` in strips: latent [B, z, H/8, W/8] -> image [B, 3, H, W]."""
    net = ae.decoder
    x = split_rows(net.mid(net.conv_in(z / ae.scale_factor + ae.shift_factor)), ROWS)
    for level in reversed(net.up):
        x = run_level(level, x)
    return torch.cat(list(conv3(norm_silu(x, net.norm_out), net.conv_out)), dim=2)


@torch.no_grad()
def encode(ae: AutoEncoder, x: Tensor) -> Tensor:
    """`ae.encode` in strips, always of the mean: image [B, 3, H, W] -> latent [B, z, H/8, W/8]."""
    net = ae.encoder
    h = list(conv3(split_rows(x, ROWS * 2 ** (len(net.down) - 1)), net.conv_in))
    for level in net.down:
        h = run_level(level, h)
    out = net.conv_out(F.silu(net.norm_out(net.mid(torch.cat(h, dim=2)))))
    return ae.scale_factor * (out.chunk(2, dim=1)[0] - ae.shift_factor)


def split_rows(x: Tensor, rows: int) -> Strips:
    return list(x.split(rows, dim=2))


def drain(strips: Strips) -> Iterator[Tensor]:
    """Yields the strips and empties the list, so that each is freed as soon as the next layer has read it."""
    while strips:
        yield strips.pop(0)


def run_level(level: Any, x: Strips) -> Strips:
    """`level(x)`; empties x."""
    for block in level.block:
        run_block(block, x)
    if hasattr(level, "downsample"):
        return list(downsample(drain(x), level.downsample.conv))
    if hasattr(level, "upsample"):
        return list(conv3(map(upsample, drain(x)), level.upsample.conv))
    return x


def run_block(block: ResnetBlock, x: Strips) -> None:
    """`block(x)`, in place. Strip i is overwritten after its neighbours have read it: `conv3` reads one strip ahead."""
    h = []
    for i, y in enumerate(conv3(norm_silu(x, block.norm1), block.conv1)):
        h.append(y)
        if block.nin_shortcut is not None:
            x[i] = block.nin_shortcut(x[i])
    for i, y in enumerate(conv3(norm_silu(h, block.norm2), block.conv2)):
        x[i] = y.add_(x[i])


def norm_silu(strips: Strips, norm: nn.GroupNorm) -> Iterator[Tensor]:
    """`silu(norm(x))`. A GroupNorm with known statistics is a BatchNorm in evaluation."""
    B, C = strips[0].shape[:2]
    mean, var = (x.repeat_interleave(C // norm.num_groups, 1).flatten() for x in moments(strips, norm.num_groups))
    weight, bias = (p.float().repeat(B) for p in (norm.weight, norm.bias))
    for strip in strips:
        y = F.batch_norm(strip.flatten(0, 1)[None], mean, var, weight, bias, eps=norm.eps)
        yield F.silu(y, inplace=True)[0].unflatten(0, (B, C))


def moments(strips: Strips, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, groups] over all strips, in fp32: each strip's own, plus the variance of their means."""
    parts = [torch.var_mean(x.float().unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0) for x in strips]
    rows = torch.tensor([x.shape[2] for x in strips], dtype=torch.float32, device=strips[0].device)
    share = rows / rows.sum()
    var, means = (torch.stack(x, dim=-1) for x in zip(*parts, strict=True))
    mean = (share * means).sum(-1)
    return mean, (share * (var + (means - mean[..., None]) ** 2)).sum(-1)


def conv3(strips: Iterable[Tensor], conv: nn.Conv2d) -> Iterator[Tensor]:
    """A 3x3 convolution: each strip with the rows above and below it, zeros at the picture's edges."""
    above = None
    for strip, below in with_next(strips):
        above = zeros_like_row(strip) if above is None else above
        rows = torch.cat((above, strip, below), dim=2)
        above = strip[:, :, -1:].clone()  # a view would keep the whole strip
        yield F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def downsample(strips: Iterable[Tensor], conv: nn.Conv2d) -> Iterator[Tensor]:
    """`Downsample`: pads a column of zeros on the right and a row of the next strip below."""
    for strip, below in with_next(strips):
        yield conv(F.pad(torch.cat((strip, below), dim=2), (0, 1)))


def upsample(strip: Tensor) -> Tensor:
    """`Upsample` without its convolution."""
    return F.interpolate(strip, scale_factor=2.0, mode="nearest")


def with_next(strips: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each strip with the first row of the next strip; zeros after the last."""
    strips = iter(strips)
    strip = next(strips)
    for following in strips:
        yield strip, following[:, :, :1]
        strip = following
    yield strip, zeros_like_row(strip)


def zeros_like_row(strip: Tensor) -> Tensor:
    return torch.zeros_like(strip[:, :, :1])
