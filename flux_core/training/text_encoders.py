"""Text encoders that learn: LoRA's factors beside CLIP's and T5's attention.

Their texts cannot be encoded once: examples carry token ids, and each forward encodes them as the encoders are then, so
that gradients of the velocity reach the factors. Where T5 learns, CLIP reads ids, too, and no caption is kept; where
CLIP learns alone, T5's tokens come from the cache. Targets are the Linears of attention, as in diffusers' scripts and
PEFT's tables.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..lora.dialects import TEXT, Target
from ..text import TextEncoder
from .adapter import AdaptedLinear, Adapter
from .factors import ENDINGS, Factors


class Names(NamedTuple):
    """How files name what an encoder learns."""

    prefix: str
    """before every key, and before the entries of PEFT's configuration"""
    inside: str
    """before every module: transformers before 5 has CLIP's there"""
    targets: tuple[str, ...]
    """names of the Linears that learn"""


NAMES: Mapping[str, Names] = MappingProxyType(
    {
        "clip": Names("text_encoder", "text_model.", ("k_proj", "out_proj", "q_proj", "v_proj")),
        "t5": Names("text_encoder_2", "", ("k", "o", "q", "v")),
    }
)
"""by `dialects.Network`"""


def encoders_of(text: str) -> list[str]:
    """The encoders that a setting names, with commas between them. UsageError."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if other := next((name for name in found if name not in NAMES), None):
        raise UsageError(f"--train-text is {' or '.join(NAMES)}, or both with a comma between them, not {other!a}")
    return [name for name in TEXT if name in found]


def read_live(learns: Iterable[str]) -> list[str]:
    """The encoders that read token ids at each step, where these learn: CLIP reads them with T5."""
    found = set(learns)
    return [name for name in TEXT if name in found or (name == "clip" and found)]


class TextAdapter(Adapter):
    """An adapter of a transformer with which text encoders learn. A batch's texts may be token ids."""

    def __init__(
        self, own: Adapter, encoders: Mapping[str, TextEncoder], text: Mapping[str, Mapping[str, Factors]],
        rank: int, rate: float | None,
    ) -> None:  # fmt: skip
        """own: becomes this one. encoders: those that read ids. text: of those that learn, factors by the names that
        files have for modules. rate: of the factors, if it is not that of all."""
        vars(self).update(vars(own))
        self.encoders, self.text, self.text_rank, self.text_rate = dict(encoders), dict(text), rank, rate

    @property
    def networks(self) -> list[nn.Module]:
        """The transformer, and the text encoders."""
        return [*super().networks, *self.encoders.values()]

    def encoded(self, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """`Adapter.encoded`, with gradients, of ids int64 [B, length]; what was encoded before stays."""
        return self._encoded("t5", txt), self._encoded("clip", vec)

    def _encoded(self, name: str, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else self.encoders[name].encode(x)

    @property
    def _text_factors(self) -> dict[str, Factors]:
        return {f"{NAMES[name].prefix}.{module}": x for name, of in self.text.items() for module, x in of.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`Adapter.named_parameters`; behind the transformer's those of text encoders, by the names of a file."""
        text = {f"{name}.{role}": x for name, one in self._text_factors.items() for role, x in one.named_parameters()}
        return super().named_parameters() | {name: text[name] for name in sorted(text)}

    def factors_of_rate(self, lr: float, lora_plus: float = 1.0) -> dict[str, float]:
        """`Adapter.factors_of_rate`; LoRA+ is the transformer's."""
        found = super().factors_of_rate(lr, lora_plus)
        if self.text_rate is None or not lr:
            return found
        mine = (name for name in self.named_parameters() if name.startswith("text_encoder"))
        return found | dict.fromkeys(mine, self.text_rate / lr)

    def identity(self) -> dict[str, Any]:
        """`Adapter.identity`"""
        return super().identity() | {"text": [list(self.text), self.text_rank, self.text_rate]}

    def configs(self) -> dict[str, Any]:
        """`Adapter.configs`"""
        own = self.config()
        return super().configs() | {
            f"{NAMES[name].prefix}.{key}": value
            for name in self.text
            for key, value in {
                "lora_alpha": alpha_of(own["lora_alpha"], own["r"], self.text_rank, own["use_rslora"]),
                "peft_type": "LORA",
                "r": self.text_rank,
                "target_modules": list(NAMES[name].targets),
                "use_dora": False,
                "use_rslora": own["use_rslora"],
            }.items()
        }

    def _in_file(self, take: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return super()._in_file(take) | {
            f"{name}.{ENDINGS[role]}": take(x)
            for name, one in self._text_factors.items()
            for role, x in one.named_parameters()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """`Adapter.load`"""
        super().load(state)
        for name, one in self._text_factors.items():
            for role, x in one.named_parameters():
                x.copy_(state[f"{name}.{ENDINGS[role]}"])


def alpha_of(alpha: float, rank: int, text_rank: int, rslora: bool) -> float:
    """The alpha of a text encoder's factors, with which alpha / rank is that of the transformer's."""
    return alpha if rslora else alpha * text_rank / rank


def adapt_text(
    own: Adapter,
    encoders: Mapping[str, TextEncoder],
    learns: Iterable[str],
    rank: int,
    rate: float | None = None,
    generator: torch.Generator | None = None,
) -> TextAdapter:
    """The adapter of a transformer, and factors of that rank in the text encoders named in `learns`, which are frozen.

    encoders: those of `read_live`. rate: of their factors, if it is not the others'. generator: as in `adapt`.
    """
    config, text = own.config(), {}
    alpha = alpha_of(config["lora_alpha"], config["r"], rank, config["use_rslora"])
    scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    for name in learns:
        model = encoders[name].ready().requires_grad_(False)
        text[name] = beside(model, name, rank, scale, generator)
    return TextAdapter(own, encoders, text, rank, rate)


def beside(
    model: nn.Module, name: str, rank: int, scale: float, generator: torch.Generator | None = None
) -> dict[str, Factors]:
    """Put factors beside the Linears of an encoder's attention. Returns them by the names that files have."""
    found, (_, inside, targets) = {}, NAMES[name]
    for module, layer in list(model.named_modules()):
        if module.rpartition(".")[2] not in targets or not hasattr(layer, "in_features"):
            continue
        device = next(x.device for x in (*layer.parameters(), *layer.buffers()))
        rows, columns = cast(int, layer.out_features), cast(int, layer.in_features)
        one = Factors(Target(module, 0, rows), columns, rank, scale, device)
        one.reset(generator)
        model.set_submodule(module, AdaptedLinear(layer, [one]))
        found[inside + module.removeprefix("text_model.")] = one
    return found
