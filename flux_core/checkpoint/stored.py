"""How a file holds weights in few bits: which of its tensors are one weight, and what that weight is. No torch."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Stored(NamedTuple):
    """A weight that several tensors of a file stand for, or codes that are not its numbers."""

    format: str
    """a key of `linears.formats.FORMATS`"""
    shape: tuple[int, ...]
    """of the weight"""
    parts: dict[str, str]
    """role -> the tensor's name in the file; "weight", the codes, first"""
    details: dict[str, Any]
    """what else the format needs to know"""
    keeps: bool = True
    """whether a layer of that format can have these codes; if not, it would round what they stand for once more"""


class Storage(NamedTuple):
    """All weights of a file in few bits."""

    of: Mapping[str, Stored]
    """by the name of the weight, which is that of its codes, in the file"""
    names: frozenset[str]
    """of all other tensors that belong to weights: scales, tables, and what is not used"""

    def among(self, names: Iterable[str]) -> list[str]:
        """Those names, each followed by the other parts of its weight: the order in which they are read."""
        return [part for name in names for part in (self.of[name].parts.values() if name in self.of else (name,))]


NOTHING = Storage({}, frozenset())
