"""Sizes of the networks, as plain data that needs no torch, with the official field names."""

from collections.abc import Sequence
from dataclasses import dataclass

TIME_DIM = 256
"""features of the sinusoidal embedding that `time_in` and `guidance_in` take"""


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a transformer (official `flux.model.FluxParams`)."""

    in_channels: int
    """features of an image token: 16 latent channels x 2 x 2 pixels"""
    out_channels: int
    """features of an output token"""
    vec_in_dim: int
    """width of the pooled CLIP vector"""
    context_in_dim: int
    """width of the T5 tokens"""
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    """double-stream blocks"""
    depth_single_blocks: int
    axes_dim: Sequence[int]
    """RoPE features of a head for each axis of the position ids (t, h, w)"""
    theta: int
    qkv_bias: bool
    guidance_embed: bool
    """whether the distilled guidance strength is an input of the modulation vector (dev) or not (schnell)"""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True)
class AutoEncoderParams:
    """Sizes of an autoencoder (official `flux.modules.autoencoder.AutoEncoderParams`)."""

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    z_channels: int
    scale_factor: float
    shift_factor: float

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.ch_mult) - 1)
