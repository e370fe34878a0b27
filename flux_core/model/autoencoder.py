"""The FLUX.1 autoencoder: a convolutional encoder and decoder, 8x down at full size, 16 latent channels.

The architecture is that of latent diffusion (arXiv 2112.10752); names and order follow the official safetensors (244
tensors). A latent is normalized as `scale_factor * (mean - shift_factor)`. `encode` returns the mean, as the official
code does since 2025; `sample_z=True` draws from the Gaussian around it, as the code did before.

The functions around the convolutions are in `ae_ops.py`; a device may have faster ones.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..params import AutoEncoderParams
from .ae_ops import PLAIN, AeOps


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6, affine=True)


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ops: AeOps = PLAIN
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ops.norm(self.norm, x)
        h = self.ops.attend(self.q(h), self.k(h), self.v(h))
        return self.ops.conv_add(self.proj_out, h, x)


class ResnetBlock(nn.Module):
    """Residual block: norm, SiLU and 3x3 convolution, twice, plus a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.ops: AeOps = PLAIN
        self.norm1 = norm(in_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.ops.norm_silu(self.norm1, x)
        h = self.ops.conv_norm_silu(self.conv1, self.norm2, h)
        return self.ops.conv_add(self.conv2, h, x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halves the size by a strided convolution, padded at the bottom and right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ops: AeOps = PLAIN
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.upsample_conv(self.conv, x)


class Level(nn.Module):
    """The residual blocks of one resolution, then its down- or upsampling, if it has any."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """The coarsest level: a residual block on either side of attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> mean and log-variance [B, 2*z, H/8, W/8]."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        self.ops: AeOps = PLAIN
        widths = [params.ch * m for m in params.ch_mult]
        self.conv_in = conv3(params.in_channels, params.ch)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([params.ch, *widths], widths, strict=False)):
            level = Level(before, width, params.num_res_blocks)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = conv3(widths[-1], 2 * params.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.ops.norm_silu(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """Latent [B, z, H/8, W/8] -> image [B, 3, H, W]. `up` is indexed by level, so its last level runs first."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        self.ops: AeOps = PLAIN
        widths = [params.ch * m for m in params.ch_mult]
        self.conv_in = conv3(params.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = Level(before, width, params.num_res_blocks + 1)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = conv3(widths[0], params.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(self.ops.norm_silu(self.norm_out, h))


class AutoEncoder(nn.Module):
    """Pixels in [-1, 1] to normalized latents and back."""

    def __init__(self, params: AutoEncoderParams, sample_z: bool = False) -> None:
        super().__init__()
        self.params = params
        self.sample_z = sample_z
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)
        self.scale_factor = params.scale_factor
        self.shift_factor = params.shift_factor

    def encode(self, x: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> latent [B, z, H/8, W/8]."""
        mean, logvar = torch.chunk(self.encoder(x), 2, dim=1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if self.sample_z else mean
        return self.scale_factor * (z - self.shift_factor)

    def decode(self, z: Tensor) -> Tensor:
        """Latent [B, z, H/8, W/8] -> image [B, 3, H, W], about [-1, 1]."""
        return self.decoder(z / self.scale_factor + self.shift_factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
