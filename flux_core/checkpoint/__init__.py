"""Read, check and write weights. Names are imported when first used, so that importing this costs no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hub.places import embedded_folder
    from .check import check_files
    from .files import resolve, weights_hashes, with_files
    from .keymaps import from_diffusers, to_diffusers
    from .read import dequantized, load_autoencoder, load_flux, load_into
    from .write import write_safetensors

_MODULES = {
    "check_files": ".check",
    "dequantized": ".read",
    "embedded_folder": "..hub.places",
    "from_diffusers": ".keymaps",
    "load_autoencoder": ".read",
    "load_flux": ".read",
    "load_into": ".read",
    "resolve": ".files",
    "to_diffusers": ".keymaps",
    "weights_hashes": ".files",
    "with_files": ".files",
    "write_safetensors": ".write",
}
__all__ = [
    "check_files",
    "dequantized",
    "embedded_folder",
    "from_diffusers",
    "load_autoencoder",
    "load_flux",
    "load_into",
    "resolve",
    "to_diffusers",
    "weights_hashes",
    "with_files",
    "write_safetensors",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name], __name__), name)
