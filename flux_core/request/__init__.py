"""Requests: the table of fields, `GenerationRequest`, and the files and lines that requests are read from.

Names are imported when first used, so that the table does not import pydantic.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generation import GenerationRequest, InitImage

__all__ = ["GenerationRequest", "InitImage"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import generation

    return getattr(generation, name)
