"""A plain Python function at a site, around a block, or as the attention."""

from collections.abc import Callable
from typing import Any, Literal

from ..params import FluxParams
from .intervention import Intervention, Patterns
from .seam import ATTEND, Around, Placed, Read, Write
from .sites import OF_BLOCK, match_blocks, match_sites


class Custom(Intervention):
    """`Custom(sites="double_blocks.*.img.out", fn=lambda x, at: 0.9 * x)`; it has no JSON form.

    sites: sites, blocks, or a block's `attend`. What fn takes depends on where it stands: `hooks/seam.py` says it. With
    `reads`, fn is called with (at, x) and changes nothing.
    """

    kind: Literal["custom"] = "custom"
    sites: Patterns
    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    """tensors that a function marked @traceable takes behind its own"""
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
        fast = getattr(self.fn, "traceable", False)
        if pattern.endswith(f".{ATTEND}"):
            blocks = match_blocks((pattern.removesuffix(f".{ATTEND}"),), params)
            return [Write(f"{block}.{ATTEND}", self.fn, self.args, fast) for block in blocks]
        if _means_blocks(pattern):
            return [Around(block, self.fn) for block in match_blocks((pattern,), params)]
        sites = match_sites((pattern,), params)
        return [Read((site,), self.fn) if self.reads else Write(site, self.fn, self.args, fast) for site in sites]


def _means_blocks(pattern: str) -> bool:
    """Whether a pattern has no site behind its block: `double_blocks.3`, `layer.*`."""
    kind, _, rest = pattern.partition(".")
    return kind in (*OF_BLOCK, "layer") and "." not in rest
