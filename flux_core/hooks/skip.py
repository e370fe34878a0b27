"""Skip blocks: a skipped block returns its input unchanged. Skipping compiles nothing and costs nothing."""

from typing import Literal

from ..params import FluxParams
from .intervention import Intervention, Patterns
from .seam import Around, Placed
from .sites import match_blocks


class Skip(Intervention):
    """`{"kind": "skip", "blocks": ["single_blocks.9"], "steps": ["0-14"]}`"""

    kind: Literal["skip"] = "skip"
    blocks: Patterns

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        return [Around(name, lambda call, x, at: x) for name in match_blocks(self.blocks, params)]
