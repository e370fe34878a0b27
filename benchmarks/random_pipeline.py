"""FLUX.1-dev as a pipeline with random weights, made on the device, for measurements of speed."""

from collections.abc import Callable

import torch
from latency import MODELS
from random_parts import random_autoencoder, random_encoders, tiny_variant
from torch import Tensor

from flux_core.pipeline import Components, Pipeline
from flux_core.pipeline.components import install_kernels
from flux_core.variants import VARIANTS


def random_pipeline(dtype: str, device: str, tiny: bool = False, encoders: bool = False) -> Pipeline:
    """In bf16 or a format of `in_format.py`, with all kernels. encoders: T5 and CLIP run, of a fixed prompt; else
    random numbers stand for what they say. tiny: a few blocks of 64 features."""
    variant = tiny_variant(VARIANTS["flux-dev"]) if tiny else VARIANTS["flux-dev"]
    params, place = variant.params, torch.device(device)

    def random(*shape: int) -> Callable[[list[str]], Tensor]:
        return lambda prompts: torch.randn(len(prompts), *shape, device=place, dtype=torch.bfloat16)

    t5, clip = random(variant.max_text, params.context_in_dim), random(params.vec_in_dim)
    if encoders:
        t5, clip = ((lambda prompts, encode=encode: encode()) for encode in random_encoders(variant, device))
    parts = Components(t5, clip, MODELS[dtype](params, device), random_autoencoder(variant, device))
    return Pipeline(variant, install_kernels(parts, place), place, torch.bfloat16)
