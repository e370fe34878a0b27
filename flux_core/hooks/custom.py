"""A Python function applied at a site, around a block, or in place of a block's attention."""

from typing import Any, Literal

from pydantic import Field

from ..params import FluxParams
from .intervention import Patterns
from .python import OfPython
from .seam import Around, Placed, Read, Write
from .sites import ATTEND, OF_BLOCK, match_blocks, match_sites


class Custom(OfPython):
    """`Custom(sites="vec", fn=lambda x, at: 0.9 * x)`, `{"kind": "custom", "fn": "my.py:brighter", "sites": ["vec"]}`

    sites: sites, blocks, or a block's `attend`; what several patterns match gets the function once. The arguments of fn
    depend on which of these it is: see `hooks/seam.py`. With `reads`, fn is called with (at, x) and changes nothing: x
    is a site's value, what a block returned, or what attention returned, [B, T+L, D].
    """

    kind: Literal["custom"] = "custom"
    sites: Patterns
    args: tuple[Any, ...] = Field(default=(), exclude=True)
    """Python only: tensors passed to a function marked @traceable after its own"""
    reads: bool = False

    @property
    def changes_pixels(self) -> bool:
        return not self.reads

    @property
    def label(self) -> str:
        return f"{self.called} at {', '.join(self.sites)}"

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        attention = tuple(x.removesuffix(f".{ATTEND}") for x in self.sites if x.endswith(f".{ATTEND}"))
        blocks = tuple(x for x in self.sites if _names_blocks(x))
        values = tuple(x for x in self.sites if not (x.endswith(f".{ATTEND}") or _names_blocks(x)))
        inside = [f"{block}.{ATTEND}" for block in match_blocks(attention, params)] + match_sites(values, params)
        fn = self.function
        if self.reads:
            return [Read((name,), fn) for name in (*match_blocks(blocks, params), *inside)]
        traceable = getattr(fn, "traceable", False)
        around = [Around(block, fn) for block in match_blocks(blocks, params)]
        return [*around, *(Write(name, fn, self.args, traceable) for name in inside)]


def _names_blocks(pattern: str) -> bool:
    """Whether a pattern names blocks, without a site: `double_blocks.3`, `layer.*`."""
    kind, _, rest = pattern.partition(".")
    return kind in (*OF_BLOCK, "layer") and "." not in rest
