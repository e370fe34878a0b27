"""Text encoders that learn: LoRA's factors beside CLIP's and T5's attention.

Their texts cannot be encoded once: examples carry token ids, and each forward encodes them as the encoders are then, so
that gradients of the velocity reach the factors. Where T5 learns, CLIP reads ids, too, and no caption is kept; where
CLIP learns alone, T5's tokens come from the cache. Targets are the Linears of attention, as in diffusers' scripts and
PEFT's tables.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..checkpoint.write import write_safetensors
from ..errors import UsageError
from ..lora import tokens
from ..lora.dialects import TEXT, Network, Target
from ..lora.file import FILE_NAMES
from ..text import TextEncoder, TrainedWords
from ..text.trained import embedding_of
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


class Token(NamedTuple):
    """A word that learns vectors of its own, for each encoder."""

    word: str
    vectors: Mapping[Network, nn.Parameter]
    """[n, D], fp32"""
    first: Mapping[Network, Tensor]
    """what they were at first"""
    about: tuple[Any, ...]
    """what they were made from"""


def token_of(encoders: Mapping[Network, TextEncoder], word: str, start: str, count: int) -> Token:
    """A word with so many vectors, which begin as those of the tokens of `start`, again from the first where there are
    fewer. UsageError for a text without tokens."""
    first: dict[Network, Tensor] = {}
    for name, encoder in encoders.items():
        weight = embedding_of(encoder.ready()).weight.detach()
        ids = [token for token, begin, end in encoder.pieces(start) if begin < end]
        if not ids:
            raise UsageError(f"--token-init {start!a} has no words. Next: say what {word} is, as in a dog")
        first[name] = weight[[ids[i % len(ids)] for i in range(count)]].float()
    return Token(word, {name: nn.Parameter(x.clone()) for name, x in first.items()}, first, (word, start, count))


def encoders_of(text: str) -> list[Network]:
    """The encoders that a setting names, with commas between them. UsageError."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if other := next((name for name in found if name not in NAMES), None):
        raise UsageError(f"--train-text is {' or '.join(NAMES)}, or both with a comma between them, not {other!a}")
    return [name for name in TEXT if name in found]


def read_live(learns: Iterable[str], word: str = "") -> list[Network]:
    """The encoders that read token ids at each step, where these learn: CLIP reads them with T5. word: that learns
    vectors in both."""
    found = set(TEXT) if word else set(learns)
    return [name for name in TEXT if name in found or (name == "clip" and found)]


class TextAdapter(Adapter):
    """An adapter of a transformer with which text encoders learn. A batch's texts may be token ids."""

    def __init__(
        self, own: Adapter, encoders: Mapping[Network, TextEncoder], text: Mapping[Network, Mapping[str, Factors]],
        form: "TextForm", token: Token | None,
    ) -> None:  # fmt: skip
        """own: becomes this one. encoders: those that read ids. text: of those that learn, factors by the names that
        files have for modules. token: that learns."""
        vars(self).update(vars(own))
        self.encoders, self.text, self.text_form, self.token = dict(encoders), dict(text), form, token
        self._name(None if token is None else token.vectors)

    def _name(self, vectors: Mapping[Network, Tensor] | None) -> None:
        """Let prompts name the word by these vectors, or not at all."""
        for name, encoder in self.encoders.items():
            word = {} if self.token is None or vectors is None else {self.token.word: vectors[name]}
            encoder.trained = TrainedWords(word)

    @property
    def networks(self) -> list[nn.Module]:
        """The transformer, and the text encoders."""
        return [*super().networks, *self.encoders.values()]

    def encoded(self, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """`Adapter.encoded`, with gradients, of ids int64 [B, length]; what was encoded before stays."""
        return self._encoded("t5", txt), self._encoded("clip", vec)

    @contextmanager
    def off(self) -> Iterator[None]:
        """`Adapter.off`; the word has the vectors that it began with."""
        if self.token is None:
            with super().off():
                yield
            return
        self._name(self.token.first)
        try:
            with super().off():
                yield
        finally:
            self._name(self.token.vectors)

    def remove(self) -> None:
        """`Adapter.remove`; no prompt names the word any more."""
        super().remove()
        self._name(None)

    def _encoded(self, name: Network, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else self.encoders[name].encode(x)

    @property
    def _factors(self) -> dict[str, nn.Parameter]:
        """The numbers of text encoders' factors, by the names of a file."""
        return {
            f"{NAMES[name].prefix}.{module}.{ENDINGS[role]}": x
            for name, of in self.text.items()
            for module, one in of.items()
            for role, x in one.named_parameters()
        }

    @property
    def _vectors(self) -> dict[str, nn.Parameter]:
        """Those of the word, by the names of a file."""
        if self.token is None:
            return {}
        stem = f"{tokens.BUNDLED}{self.token.word}"
        return {f"{stem}.{tokens.NAMES[name][0]}": x for name, x in self.token.vectors.items()}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`Adapter.named_parameters`; behind the transformer's those of text encoders, by the names of a file."""
        text = self._factors | self._vectors
        return super().named_parameters() | {name: text[name] for name in sorted(text)}

    def factors_of_rate(self, lr: float, lora_plus: float = 1.0) -> dict[str, float]:
        """`Adapter.factors_of_rate`; LoRA+ is the transformer's."""
        found, form = super().factors_of_rate(lr, lora_plus), self.text_form
        for names, rate in ((self._factors, form.rate), (self._vectors, form.token_rate)):
            if rate is not None and lr:
                found |= dict.fromkeys(names, rate / lr)
        return found

    def identity(self) -> dict[str, Any]:
        """`Adapter.identity`"""
        told = [list(self.text), *self.text_form, None if self.token is None else self.token.about]
        return super().identity() | {"text": told}

    def configs(self) -> dict[str, Any]:
        """`Adapter.configs`"""
        form = self.text_form
        return super().configs() | {
            f"{NAMES[name].prefix}.{key}": value
            for name in self.text
            for key, value in {
                "lora_alpha": form.alpha,
                "peft_type": "LORA",
                "r": form.rank,
                "target_modules": list(NAMES[name].targets),
                "use_dora": False,
                "use_rslora": form.rslora,
            }.items()
        }

    def _in_file(self, take: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return super()._in_file(take) | {name: take(x) for name, x in (self._factors | self._vectors).items()}

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """`Adapter.save`; the word's vectors are in that file, for `--lora`, and alone in `learned_embeds.safetensors`,
        for other tools."""
        path = super().save(folder, dtype)
        if self.token is not None:
            every = {key: x for name, x in self.token.vectors.items() for key in tokens.NAMES[name]}
            alone = {key: x.detach().to("cpu", dtype, copy=True) for key, x in every.items()}
            write_safetensors(folder / f"{FILE_NAMES[-1]}.safetensors", alone, {tokens.SAID: self.token.word})
        return path

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """`Adapter.load`"""
        super().load(state)
        for name, x in (self._factors | self._vectors).items():
            x.copy_(state[name])


class TextForm(NamedTuple):
    """What learns in text encoders, and how fast."""

    rank: int
    alpha: float
    rslora: bool = False
    rate: float | None = None
    """of factors, if it is not that of all"""
    token_rate: float | None = None
    """of a word's vectors, likewise"""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapt_text(
    own: Adapter,
    encoders: Mapping[Network, TextEncoder],
    learns: Iterable[Network],
    form: TextForm,
    generator: torch.Generator | None = None,
    token: Token | None = None,
) -> TextAdapter:
    """The adapter of a transformer, and factors in the text encoders named in `learns`; all of them are frozen.

    encoders: those of `read_live`. generator: as in `adapt`. token: that learns, too, as of `token_of`.
    """
    models = {name: encoder.ready().requires_grad_(False) for name, encoder in encoders.items()}
    text = {name: beside(models[name], name, form.rank, form.scale, generator) for name in learns}
    return TextAdapter(own, encoders, text, form, token)


def beside(
    model: nn.Module, name: Network, rank: int, scale: float, generator: torch.Generator | None = None
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
