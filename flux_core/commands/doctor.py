"""`doctor`: print what this machine has and which models fit, also for bug reports.

No network, no secrets, no errors.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files import own_path
from ..checkpoint.identify import Part
from ..device.memory import ram, shares
from ..device.threads import set_threads
from ..errors import FluxError, UsageError
from ..files import user_path
from ..hub import client as hub
from ..hub.places import embedded_folder, shipped_folder
from ..request.generation import GenerationRequest
from ..terminal import tell
from ..variants import AE_VARIABLES, VARIANTS, Variant, plain
from ..version import __version__

if TYPE_CHECKING:
    import torch

PLANNED = ("bfloat16", "fp8", "int8", "nf4")
"""precisions that a plan compares"""
PACKAGES = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors")


def doctor() -> Iterator[str]:
    """The report's lines: versions, devices, what fits, the token's origin, endpoint, cache, each model's files.

    Models that take pictures (docs/family.md) are of the sizes of others, and left out but for those that a command
    makes.
    """
    for title, section in (
        ("versions", _versions),
        ("devices", _devices),
        ("fits", _fits),
        ("token", _token),
        ("endpoint", _endpoint),
        ("cache", _cache),
    ):
        yield from _guarded(title, section)
    for variant in (x for x in VARIANTS.values() if not x.takes or (x.adapter and x.adapter.made_by)):
        yield from _guarded(variant.name, lambda variant=variant: _files(variant))  # type: ignore[misc]


def _guarded(title: str, section: Callable[[], list[str]]) -> list[str]:
    """The lines of a section beside its title; the error, where it fails."""
    try:
        lines = section()
    except Exception as error:  # the other sections may still help
        lines = [f"unknown: {type(error).__name__}: {error}"]
    return [f"{title if i == 0 else '':<13} {line}" for i, line in enumerate(lines)]


def _versions() -> list[str]:
    lines = [f"flux_core {__version__}", f"python {platform.python_version()}, {sys.platform} {platform.machine()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return lines


def _devices() -> list[str]:
    import torch

    from ..device.choice import available_devices, dtype_name, pick_dtype

    set_threads(None)
    lines = []
    for name in available_devices():
        device = torch.device(name)
        dtypes = [dtype_name(torch.float32)]
        try:
            dtypes.insert(0, dtype_name(pick_dtype("bfloat16", device)))
        except Exception:  # the device has no bfloat16
            dtypes.append("no bfloat16")
        line = f"{name}: {', '.join(dtypes)} (default {dtype_name(pick_dtype(None, device))})"
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            line += f", {torch.cuda.get_device_name(device)}, {_gb(free)} of {_gb(total)} free"
        elif device.type == "cpu":
            line += f", {torch.get_num_threads()} threads{_memory()}"
        lines.append(line)
    return lines


def _memory() -> str:
    memory = ram()
    return f", {_gb(memory)} memory" if memory else ""


def _fits() -> list[str]:
    """For each official model the sizes of its parts, and whether it fits on each device, with which flags."""
    import torch

    from ..device.choice import available_devices
    from ..device.verdict import verdict

    devices, here = [torch.device(name) for name in available_devices()], ram()
    lines = ["text encoders + transformer + autoencoder in bf16; a picture of a megapixel:"]
    for variant in (variant for variant in plain() if not variant.embedded):
        parts = shares(variant)
        verdicts = [
            f"{device} {verdict(variant, device.type, _size(device, here), _dtypes(device))}" for device in devices
        ]
        sizes = " + ".join(f"{part.weights / 1e9:.1f}" for part in parts)
        total = sum(part.weights for part in parts)
        lines.append(f"{variant.name:<13} {sizes} = {_gb(total)}: {', '.join(verdicts)}")
    return lines


def _dtypes(device: "torch.device") -> dict[str, str]:
    """The dtypes that a device computes in, its default first, and the flag for each of the others."""
    import torch

    from ..device.choice import pick_dtype

    if pick_dtype(None, device) == torch.bfloat16:
        has_fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
        return {"bfloat16": ""} | {x: f"--dtype {x}" for x in ("fp8" if has_fp8 else "int8", "nf4")}
    # on a CPU few bits save memory only
    return {"float32": ""} if device.type == "cuda" else {"float32": "", "bfloat16": "--dtype bfloat16"}


def _size(device: "torch.device", memory: int) -> int:
    """Bytes of a device's memory; 0 if unknown."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return memory


def _token() -> list[str]:
    token = hub.find_token()
    return [f"from {token.origin}" if token else f"none (looked for {', '.join(hub.TOKENS)}, .env, a login)"]


def _endpoint() -> list[str]:
    origin = ", from .env" if hub.endpoint_of_env_file() else ""
    return [hub.endpoint() + origin + (", not used: HF_HUB_OFFLINE is set" if hub.offline() else "")]


def _cache() -> list[str]:
    folder = hub.cache_folder()
    size = sum(path.stat().st_size for path in folder.glob("*--*/blobs/*"))
    return [f"{folder}: {_gb(size)}, {_gb(hub.free_bytes(folder))} free"]


def _files(variant: Variant) -> list[str]:
    """Where each part of the model would come from."""
    if variant.adapter and variant.adapter.made_by:
        found = _named(variant.adapter.variables) or "not named by " + " or ".join(variant.adapter.variables)
        return [f"{variant.base} with {variant.adapter.file}: {found}; made by `{variant.adapter.made_by}`"]
    if variant.repo is None:
        adapter = [f"with the LoRA in {shipped_folder(variant.name)}"] if variant.base else []
        return [f"ships with the package: {embedded_folder(variant)}", *adapter]
    if (lora := variant.adapter) is not None:
        there = _named(lora.variables) or _cached(hub.cached(lora.repo, lora.file))
        return [f"{variant.base} with {lora.repo}/{lora.file}: {there}"]
    t5 = hub.cached(variant.repo, "text_encoder_2/*.safetensors") or hub.cached(variant.t5, "*.safetensors")
    clip = hub.cached(variant.clip, "*.safetensors")
    flow, ae = (hub.cached(variant.repo, file) for file in (variant.flow_file, variant.ae_file))
    return [
        f"transformer {_origin(variant, 'transformer', variant.variables, flow)}",
        f"autoencoder {_origin(variant, 'autoencoder', AE_VARIABLES, ae)}",
        f"T5 {_origin(variant, 't5', (), t5)}, CLIP {_origin(variant, 'clip', (), clip)}",
    ]


def _origin(variant: Variant, part: Part, variables: tuple[str, ...], in_cache: list[Path]) -> str:
    """Where a part would come from: a file that a variable names, the user's own, the cache, or nowhere."""
    if named := _named(variables):
        return named
    try:
        own = own_path(variant, part)  # a folder in FLUX_MODEL may hold the other parts too
    except FluxError:  # FLUX_MODEL names a file that does not exist: the transformer's line says so
        own = None
    return str(own) if own else _cached(in_cache)


def _named(variables: tuple[str, ...]) -> str:
    """The file that the first of these variables names, if any is set."""
    for name in variables:
        if value := os.environ.get(name):
            missing = "" if user_path(value).exists() else ", which does not exist"
            return f"{name}={value}{missing}"
    return ""


def _cached(found: list[Path]) -> str:
    return "in the cache" if found else "not on this disk"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def print_report(name: str | None = None, memory: str | None = None, **fields: Any) -> None:
    """Print the lines of `doctor`, or of a model's plan, each as soon as it is known.

    name, memory: the model to plan for, and bytes of a card or of a CPU, as in "12GB"; fields: device, vae_tiling, and
    those of the request. UsageError.
    """
    for line in _plan(name or "flux-dev", memory, **fields) if name or memory or fields else doctor():
        tell(line)


def _plan(
    name: str, memory: str | None, device: str = "auto", vae_tiling: bool = False, **fields: Any
) -> Iterator[str]:
    """How a model would lie in a memory."""
    request = GenerationRequest(name=name, prompt="a", **fields)
    variant, (width, height) = request.variant, request.padded_size

    from ..device.budget import available, bytes_of
    from ..device.choice import pick_device
    from ..device.file_plan import describe as describe_files
    from ..device.file_plan import make_file_plan
    from ..device.memory import Picture, gb
    from ..device.plan import describe, make_plan
    from ..device.rates import measured

    own, memory = device == "auto", None if memory == "auto" else memory
    place = pick_device(None if own else device)
    if memory is None and own and place.type != "cuda":
        raise UsageError("there is no card here. Next: say for how much memory to plan, as in --memory 12GB")
    given = bytes_of(memory, "--memory") if memory else None
    picture = Picture(width, height, tiled=vae_tiling, steps=request.num_steps).with_reference(variant)
    how = request.t5_dtype, picture
    if place.type == "mps" and not own:
        raise UsageError(f"there are no plans for {place}. Next: --device cpu, or leave --device out, for a card")
    if not own and place.type == "cpu":
        dtype = request.dtype or "float32"
        files = make_file_plan(variant, given or available(place), dtype, *how)
        yield f"{name} in {gb(files.budget)} of a CPU's memory, {width}x{height} pixels, {dtype}"
        tera = make_plan(variant, 0, "bfloat16", *how).tera
        yield from describe_files(files, request.num_steps, tera, measured(place))
        return
    dtype, budget = request.dtype or "bfloat16", given or available(place)
    plans = {x: make_plan(variant, budget, x, *how) for x in dict.fromkeys([dtype, *PLANNED])}
    yield f"{name} in {gb(budget)}, {width}x{height} pixels, {dtype}"
    yield from describe(plans.pop(dtype), request.num_steps, measured(place) if place.type == "cuda" else None, plans)
