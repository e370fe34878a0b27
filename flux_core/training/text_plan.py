"""What text encoders that learn add to a run's plan: they stay on the card, and read every text again at each step."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint.files import embedded_folder, encoder_config
from ..checkpoint.shapes import clip_params, t5_params
from ..device.alive import torch_dtype
from ..device.memory import gb, shares
from ..lora.dialects import Network
from ..model import ClipText, T5Encoder
from ..text.encoders import CLIP_TOKENS
from ..text.trained import embedding_of
from ..variants import Variant
from .plan import STATES, KeptAttention, Plan, saved_by
from .text_encoders import beside

WORDS: dict[Network, str] = {"clip": "CLIP", "t5": "T5"}


class TextCost(NamedTuple):
    """Of text encoders at each step; bytes, and 10^12 floating point operations."""

    weights: int
    """of the encoders that read"""
    kept: int
    """for gradients"""
    tera: float
    numbers: int
    """that learn"""

    def line(self, live: Sequence[Network], tera: float) -> str:
        """For people. live: the encoders; tera: of a whole step."""
        readers = " and ".join(WORDS[name] for name in live)
        return (
            f"texts are read at each step, by {readers}: weights {gb(self.weights)} and kept for gradients "
            f"{gb(self.kept)} of the memory, {self.tera / tera:.1%} of a step's operations"
        )


def cost_of(
    variant: Variant, dtype: str, t5_dtype: str | None, live: Sequence[Network], learns: Sequence[Network], rank: int,
    vectors: int, batch: int, accumulation: int, forwards: tuple[int, int] = (1, 0),
) -> TextCost:  # fmt: skip
    """The cost of a step. dtype, batch, accumulation, forwards: as in `plan_of`, and a text is read for each; live:
    encoders that read ids; rank: of factors in those that learn; vectors: of a word, in all."""
    found, kind = TextCost(_weights(variant, dtype, t5_dtype, live), 0, 0.0, 0), torch_dtype(dtype)
    for name in live:
        length = CLIP_TOKENS if name == "clip" else variant.max_text
        size = variant.clip_size if name == "clip" else variant.t5_size
        backward = name in learns or vectors > 0  # to the inputs: it costs what a forward does
        passes = forwards[0] * (1 + backward) + forwards[1]
        found = found._replace(tera=found.tera + passes * 2 * size.of_linears * length * batch * accumulation / 1e12)
        if name in learns or vectors:
            ranks = rank if name in learns else 0
            kept, numbers = _learned(variant, name, kind, ranks, vectors, (batch, length))
            found = found._replace(kept=found.kept + kept, numbers=found.numbers + numbers)
    return found


def _weights(variant: Variant, dtype: str, t5_dtype: str | None, live: Sequence[Network]) -> int:
    text, _, _ = shares(variant, dtype, t5_dtype)
    return text.weights if "t5" in live else torch_dtype(dtype).itemsize * variant.clip_size.all


def _learned(
    variant: Variant, name: Network, kind: torch.dtype, rank: int, vectors: int, size: tuple[int, int]
) -> tuple[int, int]:
    """Bytes that a forward of an encoder keeps, and numbers that learn: of one layer and of two, counted on the meta
    device, and what the second adds for each other layer."""
    key = "num_hidden_layers" if name == "clip" else "num_layers"
    config = _config(variant, name)
    counted = []
    for layers in (1, 2):
        with torch.device("meta"), KeptAttention(), torch.enable_grad():
            model = _model(name, config | {key: layers}).to(kind).eval().requires_grad_(False)
            factors = beside(model, name, rank, 1.0) if rank else {}
            embedding = embedding_of(model)
            if vectors:
                embedding.register_forward_hook(lambda module, ids, y: y.requires_grad_())
            ids = torch.zeros(size, dtype=torch.int64, device="meta")
            kept = saved_by(partial(model, ids), model)
        own = vectors * embedding.embedding_dim
        counted.append((kept, own + sum(x.numel() for one in factors.values() for x in one.parameters())))
    (one, first), (two, second) = counted
    others = config[key] - 1
    return one + others * (two - one), first + others * (second - first)


def _config(variant: Variant, name: Network) -> dict[str, Any]:
    own = variant.clip_config if name == "clip" else variant.t5_config
    return dict(own) or encoder_config(variant, name, embedded_folder(variant))


def _model(name: Network, config: dict[str, Any]) -> nn.Module:
    return ClipText(clip_params(config)) if name == "clip" else T5Encoder(t5_params(config))


def with_text(plan: Plan, cost: TextCost, optimizer: str) -> Plan:
    """A plan of steps in which text encoders learn, too."""
    return plan._replace(
        weights=plan.weights + cost.weights,
        kept=plan.kept + cost.kept,
        tera=plan.tera + cost.tera,
        numbers=plan.numbers + cost.numbers,
        learning=plan.learning + STATES[optimizer] * cost.numbers,
    )
