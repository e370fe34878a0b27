"""A Python function applied at a site, around a block, or in place of a block's attention."""

from collections.abc import Callable
from typing import Any, Literal

from ..params import FluxParams
from .intervention import Intervention, Patterns
from .seam import ATTEND, Around, Placed, Read, Write
from .sites import OF_BLOCK, match_blocks, match_sites


class Custom(Intervention):
    """`Custom(sites="double_blocks.*.img.out", fn=lambda x, at: 0.9 * x)`; it has no JSON form.

    sites: sites, blocks, or a block's `attend`. The arguments of fn depend on which of these it is: see
    `hooks/seam.py`. With `reads`, fn is called with (at, x) and changes nothing.
    """

    kind: Literal["custom"] = "custom"
    sites: Patterns
    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    """tensors passed to a function marked @traceable after its own"""
    reads: bool = False

    @property
    def portable(self) -> bool:
        return False

    @property
    def changes_pixels(self) -> bool:
        return not self.reads

    @property
    def label(self) -> str:
        return f"{getattr(self.fn, '__name__', type(self.fn).__name__)} at {', '.join(self.sites)}"

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        return [placed for pattern in self.sites for placed in self._place(pattern, params)]

    def _place(self, pattern: str, params: FluxParams) -> list[Placed]:
        traceable = getattr(self.fn, "traceable", False)
        if pattern.endswith(f".{ATTEND}"):
            blocks = match_blocks((pattern.removesuffix(f".{ATTEND}"),), params)
            return [Write(f"{block}.{ATTEND}", self.fn, self.args, traceable) for block in blocks]
        if _names_blocks(pattern):
            return [Around(block, self.fn) for block in match_blocks((pattern,), params)]
        sites = match_sites((pattern,), params)
        return [Read((site,), self.fn) if self.reads else Write(site, self.fn, self.args, traceable) for site in sites]


def _names_blocks(pattern: str) -> bool:
    """Whether a pattern names blocks, without a site: `double_blocks.3`, `layer.*`."""
    kind, _, rest = pattern.partition(".")
    return kind in (*OF_BLOCK, "layer") and "." not in rest
