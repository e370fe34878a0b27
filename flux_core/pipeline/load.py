"""Load a pipeline: choose device, precision and files, and fall back when memory runs out."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint import check_files, load_autoencoder, weights_hashes, with_files
from ..checkpoint.contents import check_format, find_contents
from ..checkpoint.files import adapter_path, flow_path, own_path, text_files
from ..checkpoint.identify import Part
from ..device.budget import Budget, bytes_for, outside
from ..device.choice import (
    OWN,
    dtype_name,
    empty_device_cache,
    format_named,
    memory_errors,
    pick_device,
    pick_dtype,
)
from ..device.file_plan import make_file_plan
from ..device.memory import Picture, gb
from ..device.oom import CPU, OomFallback
from ..device.plan import is_whole, make_plan
from ..errors import UsageError
from ..kernels import accelerate, can_fuse, install_decode, pick_attention
from ..linears.int8 import has_int8_units
from ..lora.file import check_own
from ..request.fields import ATTENTION, T5_DEVICE
from ..request.generation import PATCH
from ..terminal import note
from ..text import T5Choice
from ..variants import Variant
from .codec import Codec
from .components import Components, install_kernels, load_components
from .kept_embeddings import embeddings_folder, find_kept
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


def _t5_choice(
    variant: Variant,
    fallback: OomFallback,
    kind: torch.dtype,
    dtype: str | torch.dtype | None,
    device: str | None,
    later: bool,
) -> T5Choice:
    """How T5 is loaded: by itself in the model's precision, and what an int8, NF4 or GGUF file has stays so.

    dtype, device: as asked for, `--t5-dtype` and `--t5-device`. later: as in `T5Choice`. UsageError if it cannot run.
    """
    home = CPU if device == "cpu" and fallback.device.type != "cpu" else None
    place, own = home or fallback.device, own_format(variant, "t5")
    format = own if dtype in (None, "auto") else format_named(dtype)
    check_format(find_contents(text_files(variant).t5, "t5"), format, ("--t5-dtype", "--t5xxl"))
    if dtype not in (None, "auto", *OWN):
        with memory_errors(f"trying {place}", place):
            kind = pick_dtype(dtype, place, "--t5-dtype")
    return T5Choice(
        dtype=kind,
        format=format,
        device=lambda: CPU if home or fallback.offload else place,
        home=home,
        later=later,
        prepare=lambda model: accelerate(model, place),
    )


def _budget(
    variant: Variant,
    device: torch.device,
    memory: str | None,
    reserve: str | None,
    dtype: str,
    t5: T5Choice,
    kind: torch.dtype,
) -> Budget | None:
    """What a model may take: on a card what is free, if nobody says; elsewhere only then None. UsageError.

    dtype: the transformer's, as requests name it; kind: as in `make_plan`.
    """
    if reserve is not None and memory != "auto" and (memory is not None or device.type != "cuda"):
        raise UsageError("--reserve goes with --memory auto")
    if device.type == "cuda":

        def smallest(picture: Picture) -> int:
            return make_plan(variant, 0, dtype, t5.precision, picture, kind).smallest

        return Budget(bytes_for(memory, reserve, device), memory or "", smallest, outside(device))
    if memory is None:
        return None
    size = bytes_for(memory, reserve, device)
    stored = _has(variant, "transformer", dtype), _has(variant, "t5", t5.format)

    def needed(picture: Picture) -> int:
        return make_file_plan(variant, size, dtype, t5.precision, picture, stored).needed

    return Budget(size, memory, needed)


def _has(variant: Variant, part: Part, format: str | None) -> bool:
    """Whether a part's file has weights in a format."""
    contents = find_contents(flow_path(variant) if part == "transformer" else text_files(variant).t5, part)
    return format in {one.format for one in contents.storage.of.values()}


def _maps(variant: Variant, budget: Budget, dtype: str, t5: T5Choice) -> bool:
    """Whether a CPU's budget is too small for weights that are loaded whole; a line says so. MemoryShortage."""
    side = variant.min_side
    if not budget.admits(Picture(PATCH, PATCH)):  # nor any other
        budget.admit(Picture(side, side))
    plan = make_file_plan(variant, budget.size, dtype, t5.precision, Picture(side, side))
    if not plan.whole:
        note(
            f"weights would take {gb(plan.all)}: those of Linears stay in their files, mapped, and each product widens "
            "its own"
        )
    return not plan.whole


def load_pipeline(
    name: str | Variant | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    t5_dtype: str | torch.dtype | None = None,
    t5_device: str | None = None,
    keep_embeddings: str | Path | bool | None = None,
    memory: str | None = None,
    reserve: str | None = None,
    attention: str | None = None,
    **files: str | Path | None,
) -> Pipeline:
    """A pipeline by its model's name; by default on the best device there is, in bfloat16 on CUDA, else in float32, and
    what an int8, NF4 or GGUF file has in few bits stays so.

    offload: load it to the CPU, and move each part to the device only while it is used. vae_tiling: the autoencoder
    in strips, for large pictures. Where memory runs out, both are switched on. compile: the blocks are compiled at
    their first step, one graph for each kind. dtype: a precision, or a format for most of the transformer's Linears
    (`request.fields.FORMATS`). t5_dtype: likewise for T5's; by itself that of the model. t5_device: "cpu", and T5 never
    visits the device. keep_embeddings: a folder for encoded prompts, True for the one beside the hub's cache; T5 is
    loaded when a prompt is not there. memory: bytes of the device, as in "8GB", or "auto": what is free less `reserve`;
    where not all fit, parts take turns, and blocks that find no room come when they compute (`streamed.py`).
    attention: "exact", or in eight bits (`request.fields.ATTENTION`); by itself what `kernels.attention.AUTO` says.
    files: your own instead of the model's, as in `checkpoint.with_files`: `model`, `ae`, `clip_l`, `t5xxl`.
    """
    T5_DEVICE.parse(t5_device)
    ATTENTION.parse(attention)
    variant = name if isinstance(name, Variant) else with_files(name, **files)
    place, folder = pick_device(device), embeddings_folder(keep_embeddings)
    with memory_errors(f"trying {place}", place):
        kind = pick_dtype(dtype, place)
    check_files(variant)  # a wrong file is an error before a text encoder is loaded
    if (adapter := adapter_path(variant)) is not None and not variant.takes.words:
        check_own(adapter, variant)
    if "torch._dynamo" in sys.modules:  # compiled blocks are in cycles: an earlier model may still hold memory
        gc.collect()
    empty_device_cache(place)
    fallback = OomFallback(place, offload)

    format = format_named(dtype)
    if dtype in (None, "auto"):
        format = own_format(variant, "transformer")
    elif format:
        check_format(find_contents(flow_path(variant), "transformer"), format)
    t5 = _t5_choice(variant, fallback, kind, t5_dtype, t5_device, later=folder is not None)
    precision = format or dtype_name(kind)
    way = pick_attention(attention, precision, place, kind, variant.params.head_dim)
    budget, mapped = _budget(variant, place, memory, reserve, precision, t5, kind), False
    if budget is not None and place == CPU:
        mapped = _maps(variant, budget, precision, t5)
        t5 = replace(t5, mapped=mapped)
        if mapped and compile:
            raise UsageError(
                "--compile needs weights that are loaded whole. Next: leave --compile out, or a larger --memory"
            )
    elif budget is not None and not offload:
        free, comes = budget.size - torch.cuda.memory_allocated(place), t5.home is None and not t5.later
        fallback.offload = not is_whole(variant, free, precision, t5.precision, comes, kind)
    for one in dict.fromkeys([(format, place), (t5.format, t5.home or place)]):
        _note_widening(*one)
    kept = find_kept(folder, variant, t5, place, kind) if folder else None

    def load() -> Components:
        home = CPU if fallback.offload else place
        return install_kernels(load_components(variant, home, kind, format, t5, mapped), place, way)

    with ThreadPoolExecutor(1) as beside:  # hashing an autoencoder's file takes as long as T5's weights to a card
        hashing = beside.submit(weights_hashes, variant)
        components = fallback.run(f"loading {variant.name}", load, "offload")
    hashes = hashing.result()
    pipeline = Pipeline(variant, components, place, kind, hashes, fallback.offload, vae_tiling, compile, kept, budget)
    if adapter is not None and variant.adapter is not None:
        if variant.takes.words:
            from ..vision.redux import load_redux

            home = CPU if fallback.offload else place
            pipeline.denoiser.redux = load_redux(variant, adapter, variant.takes.words, home, kind)
        else:
            pipeline.loras.become(adapter, variant.adapter.scale)
    return pipeline
