"""Text encoders and autoencoder with random weights, made on the device, for measurements of speed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from parity_diffusers import tiny
from torch import Tensor

from flux_core.model import AutoEncoder
from flux_core.text.encoders import CLIP_TOKENS
from flux_core.variants import Variant

Encoder = Callable[[], Tensor]


def random_encoders(variant: Variant, device: str) -> tuple[Encoder, Encoder]:
    """T5 and CLIP in bf16, each as a call that encodes a prompt of full length as `flux_core.text` does."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    def encoder(kind: Any, config: Any, length: int, output: str) -> Encoder:
        with torch.device(device):
            model = kind._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
            ids = torch.randint(config.vocab_size, (1, length))
        return lambda: getattr(model(input_ids=ids, attention_mask=None), output)

    return (
        encoder(T5EncoderModel, T5Config(**variant.t5_config), variant.max_text, "last_hidden_state"),
        encoder(CLIPTextModel, CLIPTextConfig(**variant.clip_config), CLIP_TOKENS, "pooler_output"),
    )


def random_autoencoder(variant: Variant, device: str) -> AutoEncoder:
    """The autoencoder in bf16, as in the pipeline on CUDA."""
    with torch.device(device):
        return AutoEncoder(variant.ae_params).to(torch.bfloat16).eval().requires_grad_(False)


def tiny_variant(variant: Variant) -> Variant:
    """The variant with all networks small enough for any machine."""
    t5 = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 100}
    clip = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ae = replace(variant.ae_params, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    return replace(variant, params=tiny(variant.params), ae_params=ae, max_text=8, t5_config=t5, clip_config=clip)
