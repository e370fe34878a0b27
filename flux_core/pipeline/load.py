"""Load a pipeline: choose device, precision and files, and fall back when memory runs out."""

import gc
import sys
from pathlib import Path

import torch

from ..checkpoint import check_files, load_autoencoder, weights_hashes, with_files
from ..device.choice import empty_device_cache, memory_errors, pick_device, pick_dtype, wants_fp8
from ..device.oom import CPU, OomFallback
from ..kernels import install_decode
from ..variants import Variant
from .codec import Codec
from .components import Components, install_kernels, load_components
from .pipeline import Pipeline
from .placement import Placement


def load_codec(variant: Variant, device: torch.device, dtype: torch.dtype, vae_tiling: bool = False) -> Codec:
    """A model's autoencoder alone, to encode and decode pictures. Errors as in `load_flux`."""
    ae, nothing = load_autoencoder(variant, device, dtype), torch.nn.Identity()
    install_decode(ae, device)
    components = Components(nothing, nothing, nothing, ae)  # type: ignore[arg-type]
    return Codec(Placement(components, OomFallback(device, vae_tiling=vae_tiling)), dtype)


def load_pipeline(
    name: str | Variant | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    **files: str | Path | None,
) -> Pipeline:
    """A pipeline by its model's name; by default on the best device there is, in bfloat16 on CUDA, else in float32.

    offload: load it to the CPU, and move each part to the device only while it is used. vae_tiling: the autoencoder
    in strips, for large pictures. Where memory runs out, both are switched on. compile: the blocks are compiled at
    their first step, one graph for each kind. files: your own instead of the model's, as in `checkpoint.with_files`:
    `model`, `ae`, `clip_l`, `t5xxl`.
    """
    variant = name if isinstance(name, Variant) else with_files(name, **files)
    place = pick_device(device)
    with memory_errors(f"trying {place}", place):
        kind = pick_dtype(dtype, place)
    check_files(variant)  # a wrong file is an error before a text encoder is loaded
    if "torch._dynamo" in sys.modules:  # compiled blocks are in cycles: an earlier model may still hold memory
        gc.collect()
    empty_device_cache(place)
    fallback = OomFallback(place, offload)

    def load() -> Components:
        home = CPU if fallback.offload else place
        return install_kernels(load_components(variant, home, kind, wants_fp8(dtype)), place)

    components = fallback.run(f"loading {variant.name}", load, "offload")
    return Pipeline(variant, components, place, kind, weights_hashes(variant), fallback.offload, vae_tiling, compile)
