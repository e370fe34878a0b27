"""What can be asked: the table of fields, and `GenerationRequest`, the one description of a picture.

Names are looked up when first used, so that the table costs no pydantic.
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
