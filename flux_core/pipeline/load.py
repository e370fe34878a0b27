"""Loading a pipeline: which device, which precision, whose files, and what to do when memory does not suffice."""

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
    """The autoencoder of a model by itself, for decoding and encoding pictures. Errors as in `load_flux`."""
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
    """Load a model by name; by itself on the best device there is, in bfloat16 on CUDA, else in float32.

    offload: load it to the CPU, from where each part comes to the device for its turn only. vae_tiling: the autoencoder
    strip by strip, for large pictures. Where memory runs out, both come by themselves. compile: the blocks are compiled
    at their first step, one graph for each kind. files: your own instead of the model's, as `checkpoint.with_files`
    takes them: `model`, `ae`, `clip_l`, `t5xxl`.
    """
    variant = name if isinstance(name, Variant) else with_files(name, **files)
    place = pick_device(device)
    with memory_errors(f"trying {place}", place):
        kind = pick_dtype(dtype, place)
    check_files(variant)  # a wrong file is told before a text encoder is loaded for it
    if (
        "torch._dynamo" in sys.modules
    ):  # a compiled block is in a cycle: a model that was here may still hold its memory
        gc.collect()
    empty_device_cache(place)
    fallback = OomFallback(place, offload)

    def load() -> Components:
        home = CPU if fallback.offload else place
        return install_kernels(load_components(variant, home, kind, wants_fp8(dtype)), place)

    components = fallback.run(f"loading {variant.name}", load, "offload")
    return Pipeline(variant, components, place, kind, weights_hashes(variant), fallback.offload, vae_tiling, compile)
