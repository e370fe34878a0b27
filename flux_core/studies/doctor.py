"""`doctor`: what this machine has, for a bug report or for oneself. No network, no secrets, and nothing raises."""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import hub
from ..places import embedded_folder
from ..variants import AE_VARIABLES, VARIANTS, Variant
from ..version import __version__

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors")


def doctor() -> Iterator[str]:
    """Lines to print, one after the other: versions, devices, token's origin, endpoint, cache, models."""
    for title, rows in (
        ("versions", _versions),
        ("devices", _devices),
        ("token", _token),
        ("endpoint", _endpoint),
        ("cache", _cache),
    ):
        yield from _guarded(title, rows)
    for variant in VARIANTS.values():
        yield from _guarded(variant.name, lambda variant=variant: _files(variant))  # type: ignore[misc]


def _guarded(title: str, rows: Callable[[], list[str]]) -> list[str]:
    try:
        found = rows()
    except Exception as error:  # a doctor that falls ill helps nobody
        found = [f"could not be found out: {type(error).__name__}: {error}"]
    return [f"{title if i == 0 else '':<14}{row}" for i, row in enumerate(found)]


def _versions() -> list[str]:
    rows = [f"flux_core {__version__}", f"python {platform.python_version()}, {sys.platform} {platform.machine()}"]
    for package in PACKAGES:
        try:
            rows.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            rows.append(f"{package} is not installed")
    return rows


def _devices() -> list[str]:
    import torch

    from ..device import available_devices, dtype_name, pick_dtype

    rows = []
    for name in available_devices():
        device = torch.device(name)
        dtypes = [dtype_name(torch.float32)]
        try:
            dtypes.insert(0, dtype_name(pick_dtype("bfloat16", device)))
        except Exception:  # this device has none
            dtypes.append("no bfloat16")
        row = f"{name}: {', '.join(dtypes)} (by itself {dtype_name(pick_dtype(None, device))})"
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            row += f", {torch.cuda.get_device_name(device)}, {_gb(free)} of {_gb(total)} free"
        elif device.type == "cpu":
            row += f", {torch.get_num_threads()} threads{_memory()}"
        rows.append(row)
    return rows


def _memory() -> str:
    try:
        return f", {_gb(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} memory"
    except (AttributeError, ValueError, OSError):  # Windows
        return ""


def _token() -> list[str]:
    token = hub.find_token()
    return [f"from {token.origin}" if token else f"none (looked for {', '.join(hub.TOKENS)}, .env, a login)"]


def _endpoint() -> list[str]:
    return [hub.endpoint() + (", and HF_HUB_OFFLINE forbids to ask it" if hub.offline() else "")]


def _cache() -> list[str]:
    folder = hub.cache_folder()
    size = sum(path.stat().st_size for path in folder.glob("*--*/blobs/*"))
    return [f"{folder}: {_gb(size)}, {_gb(hub.free_bytes(folder))} free"]


def _files(variant: Variant) -> list[str]:
    """Where each part of the model would come from."""
    if variant.repo is None:
        return [f"ships with the package: {embedded_folder(variant)}"]
    t5 = hub.cached(variant.repo, "text_encoder_2/*.safetensors") or hub.cached(variant.t5, "*.safetensors")
    clip = hub.cached(variant.clip, "*.safetensors")
    return [
        f"transformer {_origin(variant.variables, hub.cached(variant.repo, variant.flow_file))}",
        f"autoencoder {_origin(AE_VARIABLES, hub.cached(variant.repo, variant.ae_file))}",
        f"T5 {_origin((), t5)}, CLIP {_origin((), clip)}",
    ]


def _origin(variables: tuple[str, ...], in_cache: list[Path]) -> str:
    for name in variables:
        if value := os.environ.get(name):
            there = "" if Path(value).expanduser().exists() else ", which does not exist"
            return f"{name}={value}{there}"
    return "in the cache" if in_cache else "not on this disk"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
