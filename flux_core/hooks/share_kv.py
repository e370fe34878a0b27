"""Replace keys and values of batch rows by another row's: the attention injection of Stable Flow (arXiv 2411.14430).

It is an index over the batch's rows, `k = k[source]`, before norm and RoPE. A row whose index is its own keeps its
keys and values. So any layers, steps and branches share one compiled graph for each kind of block.
"""

from typing import TYPE_CHECKING, Literal

from ..errors import UsageError, nearest
from ..params import FluxParams
from .intervention import Intervention, Patterns
from .seam import Placed, Write, traceable
from .sites import match_blocks

if TYPE_CHECKING:
    from torch import Tensor


class ShareKV(Intervention):
    """`{"kind": "share_kv", "blocks": ["layer.0-1"], "source": "source", "targets": ["edit"]}`"""

    kind: Literal["share_kv"] = "share_kv"
    blocks: Patterns
    source: str = "source"
    """the branch whose keys and values are read"""
    targets: Patterns | None = None
    """the branches that read them; None: all others"""
    tokens: Literal["img", "txt", "all"] = "img"
    what: Literal["k", "v", "kv"] = "kv"

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        import torch

        targets = self.targets or tuple(name for name in branches if name != self.source)
        for name in (self.source, *targets):
            if name not in branches:
                known = ", ".join(branches)
                raise UsageError(f"share_kv: no branch {name!r}; there are {known}.{nearest(name, list(branches))}")
        if not targets:
            raise UsageError("share_kv: there is only one branch, so nothing can be shared")
        source = branches.index(self.source)
        index = torch.tensor(
            [source if name in targets else i for i, name in enumerate(branches)], dtype=torch.int64, device="cpu"
        )
        streams = ("img", "txt") if self.tokens == "all" else (self.tokens,)
        sites = [
            f"{block}.{stream}.{x}"
            for block in match_blocks(self.blocks, params)
            for stream in streams
            for x in self.what
        ]
        return [Write(site, read_from, (index,), traceable=True) for site in sites]


@traceable
def read_from(x: "Tensor", branch: "Tensor") -> "Tensor":
    """x [B, H, S, P], rows image x branch, with branch i's value taken from `branch[i]`. branch: [branches]."""
    rows = x.unflatten(0, (-1, branch.shape[0]))
    return rows.index_select(1, branch).flatten(0, 1)
