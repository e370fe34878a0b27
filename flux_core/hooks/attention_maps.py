"""Attention maps: probabilities computed from captured q and k, for chosen queries and keys, in chunks.

All probabilities of one layer of FLUX.1-dev at 1024x1024 take 1 GB for one picture in bf16, and the fused attention
never computes them. So they are computed separately, after the block, over all keys (so that they sum to 1), and cut
to the chosen keys.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from ..params import FluxParams
from .capture import Collector
from .intervention import Patterns, Tokens
from .seam import At, Placed
from .sites import HEAD, head_of, match_blocks, match_sites, split

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 256
"""queries computed at once"""


class AttentionMaps(Collector):
    """`{"kind": "attention_maps", "blocks": ["layer.15-18"], "queries": "img", "keys": [3], "to": "maps.safetensors"}`

    Stored as `step.block.attention_map`: [B, queries, keys], or [B, H, queries, keys] with `heads: "each"`. A block may
    name one head, `double_blocks.3.head.7`: then as `step.double_blocks.3.head.7.attention_map`, [B, queries, keys].
    """

    kind: Literal["attention_maps"] = "attention_maps"
    blocks: Patterns
    queries: Tokens = "img"
    """image or text tokens, all, or indices into the joined sequence (text first)"""
    keys: Tokens = "txt"
    heads: Literal["mean", "each"] = "mean"

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        of_heads = tuple(pattern for pattern in self.blocks if HEAD in pattern)
        blocks = tuple(pattern for pattern in self.blocks if HEAD not in pattern)
        names = [*match_blocks(blocks, params), *match_sites(of_heads, params)]
        return self.collect([self._of(name) for name in names])

    def _of(self, name: str) -> "tuple[tuple[str, ...], Callable[..., tuple[str, Tensor]]]":
        """Sites and function for a block, or for one of its heads."""
        block, head = split(name)[0], head_of(name)

        def compute(at: At, q: "Tensor", k: "Tensor") -> "tuple[str, Tensor]":
            queries, keys = (token_indices(tokens, at.txt_len, q.shape[2]) for tokens in (self.queries, self.keys))
            if head is not None:
                q, k = q[:, head : head + 1], k[:, head : head + 1]
            found = attention_map(q, k, queries, keys, head is not None or self.heads == "mean")
            return f"{name}.attention_map", found.detach().to("cpu")

        return (f"{block}.q", f"{block}.k"), compute


def token_indices(tokens: str | tuple[int, ...], txt_len: int, length: int) -> list[int]:
    """Indices of the chosen tokens in the joined sequence."""
    ranges = {"txt": range(txt_len), "img": range(txt_len, length), "all": range(length)}
    return list(ranges[tokens] if isinstance(tokens, str) else tokens)


def attention_map(q: "Tensor", k: "Tensor", queries: list[int], keys: list[int], mean: bool) -> "Tensor":
    """softmax(q k / sqrt(P)) in fp32, rows `queries` and columns `keys`. q, k: [B, H, L, P], after norm and RoPE."""
    import torch

    parts = []
    for i in range(0, len(queries), CHUNK):
        rows = q[:, :, queries[i : i + CHUNK]].float()
        probabilities = torch.softmax(rows @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)[..., keys]
        parts.append(probabilities.mean(1) if mean else probabilities)
    return torch.cat(parts, dim=-2)
