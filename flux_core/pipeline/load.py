"""Load a pipeline: choose device, precision and files, and fall back when memory runs out."""

import gc
import sys
from pathlib import Path

import torch

from ..checkpoint import check_files, load_autoencoder, weights_hashes, with_files
from ..checkpoint.contents import check_format, find_contents
from ..checkpoint.files import flow_path, own_path
from ..checkpoint.identify import Part
from ..device.choice import OWN, empty_device_cache, format_named, memory_errors, pick_device, pick_dtype
from ..device.oom import CPU, OomFallback
from ..kernels import can_fuse, install_decode
from ..linears.int8 import has_int8_units
from ..terminal import note
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


def own_format(variant: Variant, part: Part) -> str | None:
    """The format that a part's file has weights in, if it is one that a model keeps without being asked.

    fp8 is not: a device with fp8 units would then round inputs, too, which nobody asked for.
    """
    if (path := own_path(variant, part)) is None:
        return None
    contents = find_contents(path, part)
    names = set(contents.names.values())
    formats = [one.format for name, one in contents.storage.of.items() if name in names]
    return next((format for format in formats if format in OWN), None)


def _note_widening(format: str | None, device: torch.device) -> None:
    """A line on stderr where a device has no fast way for a format; `pick_dtype` knows of fp8."""
    fast = has_int8_units(device) if format == "int8" else format in (None, "fp8") or can_fuse(device)
    if not fast:
        note(f"{device} has no kernels for {format}: its weights are widened for each product (less memory, slower)")


def load_pipeline(
    name: str | Variant | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    **files: str | Path | None,
) -> Pipeline:
    """A pipeline by its model's name; by default on the best device there is, in bfloat16 on CUDA, else in float32, and
    what an int8, NF4 or GGUF file has in few bits stays so.

    offload: load it to the CPU, and move each part to the device only while it is used. vae_tiling: the autoencoder
    in strips, for large pictures. Where memory runs out, both are switched on. compile: the blocks are compiled at
    their first step, one graph for each kind. dtype: a precision, or a format for most of the transformer's Linears
    (`request.fields.FORMATS`). files: your own instead of the model's, as in `checkpoint.with_files`: `model`, `ae`,
    `clip_l`, `t5xxl`.
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

    format, t5_format = format_named(dtype), own_format(variant, "t5")
    if dtype in (None, "auto"):
        format = own_format(variant, "transformer")
    elif format:
        check_format(find_contents(flow_path(variant), "transformer"), format)

    _note_widening(format, place)

    def load() -> Components:
        home = CPU if fallback.offload else place
        return install_kernels(load_components(variant, home, kind, format, t5_format), place)

    components = fallback.run(f"loading {variant.name}", load, "offload")
    return Pipeline(variant, components, place, kind, weights_hashes(variant), fallback.offload, vae_tiling, compile)
