"""LoRA files: read in every dialect, attached beside a model's Linears, converted, merged, extracted.

`attach(model, "style.safetensors", scale=0.8)` gives a handle: `handle.scale = 0.5`, `handle.remove()`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .file import LoraFile, read_lora
    from .handle import Handle, attach, attach_file, attached, summary

_MODULES = {
    "Handle": ".handle",
    "LoraFile": ".file",
    "attach": ".handle",
    "attach_file": ".handle",
    "attached": ".handle",
    "read_lora": ".file",
    "summary": ".handle",
}
__all__ = ["Handle", "LoraFile", "attach", "attach_file", "attached", "read_lora", "summary"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that reading a header costs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name], __name__), name)
