"""Attention maps: probabilities computed from captured q and k, for chosen queries and keys, in chunks.

All probabilities of one layer of FLUX.1-dev at 1024x1024 take 1 GB for one picture in bf16, and the fused attention
never computes them. So they are computed separately, after the block, over all keys (so that they sum to 1), and cut
to the chosen keys.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator

from ..params import FluxParams
from .capture import Collector
from .intervention import Patterns, parse_steps
from .seam import At, Placed
from .sites import match_blocks

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 256
"""queries computed at once"""


def _tokens(value: object) -> object:
    return value if value in ("img", "txt", "all") else parse_steps(value)


Tokens = Annotated[Literal["img", "txt", "all"] | tuple[int, ...], BeforeValidator(_tokens)]


class AttentionMaps(Collector):
    """`{"kind": "attention_maps", "blocks": ["layer.15-18"], "queries": "img", "keys": [3], "to": "maps.safetensors"}`

    Stored as `step.block.attention_map`: [B, queries, keys], or [B, H, queries, keys] with `heads: "each"`.
    """

    kind: Literal["attention_maps"] = "attention_maps"
    blocks: Patterns
    queries: Tokens = "img"
    """image or text tokens, all, or indices into the joined sequence (text first)"""
    keys: Tokens = "txt"
    heads: Literal["mean", "each"] = "mean"

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        def compute(at: At, q: "Tensor", k: "Tensor") -> "tuple[str, Tensor]":
            queries, keys = (token_indices(tokens, at.txt_len, q.shape[2]) for tokens in (self.queries, self.keys))
            block = at.name.rpartition(".")[0]
            return f"{block}.attention_map", attention_map(q, k, queries, keys, self.heads == "mean")

        return self.collect([(f"{name}.q", f"{name}.k") for name in match_blocks(self.blocks, params)], compute)


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
