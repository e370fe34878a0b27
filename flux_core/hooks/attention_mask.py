"""A mask or a bias of attention, as data: masked methods keep PyTorch's fused attention, and one compiled graph.

    out = softmax(q k / sqrt(P) + bias) v,    or over the keys that a mask allows

PyTorch has a fused path for masks on CUDA (memory-efficient attention) and on the CPU; the faster kernels take none.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from ..errors import UsageError
from ..params import FluxParams
from .change import read, tensor_or_stored
from .intervention import Intervention, Patterns
from .seam import Placed, Write, traceable
from .sites import ATTEND, match_blocks

if TYPE_CHECKING:
    from torch import Tensor


class AttentionMask(Intervention):
    """`{"kind": "attention_mask", "blocks": "layer.*", "value": {"file": "regions.safetensors", "tensor": "mask"}}`"""

    kind: Literal["attention_mask"] = "attention_mask"
    blocks: Patterns
    value: Any
    """a tensor, or a Stored one, that broadcasts to [B, H, T+L, T+L], text first: bool (True: the query of that row
    sees the key of that column), or numbers that are added to the logits"""

    @field_validator("value", mode="before")
    @classmethod
    def _tensor(cls, value: Any) -> Any:
        return tensor_or_stored(value, "tensor")

    @property
    def portable(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"a mask of attention in {', '.join(self.blocks)}"

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        import torch

        value = read(self.value)
        if not (value.is_floating_point() or value.dtype == torch.bool):
            raise UsageError(f"attention_mask: {value.dtype} is neither bool nor a bias. Next: mask.bool()")
        blocks = match_blocks(self.blocks, params)
        return [Write(f"{block}.{ATTEND}", masked, (value,), traceable=True) for block in blocks]


@traceable
def masked(attend: Any, q: "Tensor", k: "Tensor", v: "Tensor", mask: "Tensor") -> "Tensor":
    """Attention with a mask or a bias. q, k, v: [B, H, L, P] -> [B, L, H*P]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
