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
class ControlNetParams(FluxParams):
    """Sizes of a ControlNet: those of a transformer with few blocks and no last layer, and of what it adds."""

    cond_channels: int = 64
    """features of a token of the condition"""
    takes_pixels: bool = False
    """whether its condition is a picture's pixels (XLabs) or the tokens of its latent (InstantX, Shakker)"""
    modes: int = 0
    """kinds of conditions of a union, each with an embedding; 0: there is one kind"""
    blocks: tuple[int, int] = (19, 38)
    """double and single blocks of the transformer that the residuals are for"""

    @property
    def hint_channels(self) -> tuple[int, ...]:
        """Channels before and behind each convolution over pixels; the last are in tokens of 2 x 2."""
        return (3, *[16] * 7, self.cond_channels // 4) if self.takes_pixels else ()


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


@dataclass(frozen=True)
class T5Params:
    """Sizes of T5's encoder, as a config.json of transformers names them."""

    vocab_size: int
    d_model: int
    d_kv: int
    """features of a head"""
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float = 1e-6


@dataclass(frozen=True)
class ClipParams:
    """Sizes of CLIP's text encoder, as a config.json of transformers names them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49_407
