"""Text encoders and autoencoder with random weights, made on the device, for measurements of speed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from parity_diffusers import tiny
from torch import Tensor

from flux_core.checkpoint.shapes import clip_params, t5_params
from flux_core.model import AutoEncoder, ClipText, T5Encoder
from flux_core.text.encoders import CLIP_TOKENS
from flux_core.variants import Variant

Encoder = Callable[[], Tensor]


def random_encoders(variant: Variant, device: str) -> tuple[Encoder, Encoder]:
    """T5 and CLIP in bf16, each as a call that encodes a prompt of full length as `flux_core.text` does."""

    def encoder(kind: type[T5Encoder | ClipText], params: Any, length: int) -> Encoder:
        with torch.device(device):
            model = kind(params).to(torch.bfloat16).eval().requires_grad_(False)
            ids = torch.randint(params.vocab_size, (1, length))
        return lambda: model(ids)

    return (
        encoder(T5Encoder, t5_params(variant.t5_config), variant.max_text),
        encoder(ClipText, clip_params(variant.clip_config), CLIP_TOKENS),
    )


def random_autoencoder(variant: Variant, device: str) -> AutoEncoder:
    """The autoencoder in bf16, as in the pipeline on CUDA."""
    with torch.device(device):
        return AutoEncoder(variant.ae_params).to(torch.bfloat16).eval().requires_grad_(False)


def tiny_variant(variant: Variant) -> Variant:
    """The variant with all networks small enough for any machine."""
    t5 = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
    t5 |= {"feed_forward_proj": "gated-gelu"}
    clip = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ae = replace(variant.ae_params, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    return replace(variant, params=tiny(variant.params), ae_params=ae, max_text=8, t5_config=t5, clip_config=clip)
