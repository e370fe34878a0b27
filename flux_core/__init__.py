"""FLUX.1 in pure PyTorch: `load_pipeline("flux-mini").generate("a red apple", seed=0)` returns pictures.

Names are imported when they are first used, so that `import flux_core` does not import torch.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .pipeline import Pipeline, load_pipeline
    from .request.generation import GenerationRequest

__all__ = ["GenerationRequest", "Pipeline", "__version__", "load_pipeline"]

_MODULES = {"GenerationRequest": "request", "Pipeline": "pipeline", "load_pipeline": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
