"""How a file keeps one quantized weight: what the readers of formats find in headers. No torch."""

from typing import Any, NamedTuple


class Stored(NamedTuple):
    """One weight of a file that is codes, and other tensors that say what they stand for."""

    format: str
    """the module of `linears/` that knows it, as "nf4" """
    shape: tuple[int, ...]
    """of the dense weight"""
    parts: dict[str, str]
    """a tensor's role -> its name in the file; the codes, "weight", are the first"""
    details: dict[str, Any]
    """what else the format has to know: numbers and words"""
