"""Encode prompts to the tensors that FLUX.1 is conditioned on: T5's tokens and CLIP's pooled vector.

As in the official code, a prompt is padded to a fixed number of tokens and no attention mask is given:
padding attends and is attended to, so the length is part of the result. CLIP cuts at 77 tokens without a
warning, since the picture's content comes from T5; `notes` says what T5 cuts and what it cannot read.

The networks are our own (`model/t5.py`, `model/clip.py`): importing those of transformers takes longer than importing
torch.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.check import check_part
from ..checkpoint.contents import Contents, find_contents
from ..checkpoint.files import TextFiles, encoder_config, text_files
from ..checkpoint.identify import Part
from ..checkpoint.read import AS_STORED, dense, held_in_file, is_view, kept, note_precision
from ..checkpoint.shapes import T5_DEFAULTS, clip_params, t5_params
from ..checkpoint.tensors import mapped as in_file
from ..checkpoint.tensors import opened, reserve
from ..errors import FileError
from ..linears.formats import FORMATS
from ..linears.mapped import MappedLinear
from ..model import ClipText, T5Encoder
from ..model.shapes import without_weights
from ..terminal import note
from ..variants import Variant
from .tokenizer import Tokenizer, load_tokenizer
from .trained import TrainedWords

CLIP_TOKENS = 77
SLOW = 2.0
"""seconds from which a line says that a model was loaded again"""


class TextEncoder(nn.Module):
    """A tokenizer and its model: maps prompts to a tensor.

    The model may be freed, and is loaded again when it is needed.
    """

    model: nn.Module | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: nn.Module | None,
        max_length: int,
        dtype: torch.dtype,
        load: Callable[[], nn.Module] | None = None,
        precision: str | None = None,
        home: torch.device | None = None,
    ) -> None:
        """model: token ids to the tensor; None: loaded when it is first needed. max_length: tokens that a prompt is
        padded or cut to.

        load: returns the model anew; without it the model stays. precision: the model's, as requests name it.
        home: the device that it never leaves.
        """
        super().__init__()
        self.tokenizer, self.max_length, self.dtype = tokenizer, max_length, dtype
        self.model, self.load, self.precision, self.home = model, load, precision, home
        self.was_there = model is not None
        self.trained = TrainedWords({})
        """words of prompts with vectors of their own"""

    def ready(self) -> nn.Module:
        """The model, loaded if it is not there. Errors as in `load_encoder`."""
        if (model := self.model) is None:
            assert self.load is not None
            start = time.monotonic()
            self.model = model = self.load()
            if self.was_there and (seconds := time.monotonic() - start) > SLOW:
                note(f"the text encoder had been freed, and was loaded again for another text: {seconds:.0f} s")
            self.was_there = True
        return model

    def free(self) -> None:
        """Free the model's memory, if it can be loaded again."""
        if self.load is not None:
            self.model = None

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids, int64 [B, max_length], on the CPU; those of trained words are negative."""
        return torch.tensor([self._padded(prompt) for prompt in prompts], dtype=torch.int64, device="cpu")

    def _padded(self, prompt: str) -> list[int]:
        """As many token ids. A cut text ends as others do."""
        ids = [token for token, *_ in self.pieces(prompt)]
        ids = ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]
        return ids + [self.tokenizer.pad_id] * (self.max_length - len(ids))

    def forward(self, prompts: list[str]) -> Tensor:
        """[B, max_length, D] from T5, [B, D] from CLIP, in `dtype`."""
        return self.encode(self.tokens(prompts))

    def encode(self, ids: Tensor) -> Tensor:
        """`forward` of token ids, int64 [B, max_length], those of trained words included."""
        model = self.ready()
        ids = ids.to(next(model.parameters()).device)
        with self.trained.embedded(model, ids) as known:
            return model(known).to(self.dtype)

    def unread(self, prompt: str) -> tuple[str, list[str]]:
        """The parts of a prompt that do not reach the model, as written: the end that does not fit, and unknown words.

        A word is unknown without a token in the tokenizer, as emoji, Chinese or Cyrillic for T5; each is listed once.
        """
        pieces = self.pieces(prompt)
        kept = pieces[: self.max_length - 1]  # the last is the end-of-text token
        dropped = prompt[pieces[len(kept)][1] :].strip() if len(pieces) > self.max_length else ""
        unknown = [(start, end) for token, start, end in kept if token == self.tokenizer.unk_id and start < end]
        return dropped, list(dict.fromkeys(_word_around(prompt, start, end) for start, end in unknown))

    def truncated(self, prompt: str) -> str | None:
        """The end of the prompt that does not fit into `max_length` tokens, as written; None if all of it fits."""
        return self.unread(prompt)[0] or None

    def notes(self, prompt: str) -> list[str]:
        """Lines for people on what is dropped of a prompt, and on words that cannot be read; often none."""
        lines = []
        dropped, words = self.unread(prompt)
        if dropped:
            lines.append(f"the prompt is longer than {self.max_length} tokens; dropped: {_shortened(dropped, 60)!r}")
        if words:
            listed = ", ".join(repr(_shortened(word, 30)) for word in words[:5]) + (", …" if len(words) > 5 else "")
            lines.append(f"the text encoder cannot read {listed}; say it in English words")
        return lines

    def pieces(self, prompt: str) -> list[tuple[int, int, int]]:
        """Token id, start and end in the prompt, for all tokens of the prompt without padding."""
        if not self.trained.names(prompt):
            return self.tokenizer.pieces(prompt)
        *begin, end = self.tokenizer.pieces("")
        found = [*begin]
        for text, start, ids in self.trained.split(prompt):
            if ids is not None:
                found += [(i, start, start + len(text)) for i in ids]
            else:
                inner = self.tokenizer.pieces(text)[len(begin) : -1]
                found += [(token, start + first, start + last) for token, first, last in inner]
        return [*found, end]


def _word_around(text: str, start: int, end: int) -> str:
    """text[start:end], extended over adjacent letters and digits."""
    while start > 0 and text[start - 1 : start + 1].isalnum():
        start -= 1
    while end < len(text) and text[end - 1 : end + 1].isalnum():
        end += 1
    return text[start:end]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"


@dataclass(frozen=True, kw_only=True)
class T5Choice:
    """How T5 is loaded."""

    dtype: torch.dtype
    """that it computes in"""
    format: str | None = None
    """of `linears.formats`, which its Linears get"""
    device: Callable[[], torch.device] = lambda: torch.device("cpu")
    """where to, when it is loaded"""
    home: torch.device | None = None
    """the device that it never leaves"""
    later: bool = False
    """whether it is loaded when the first text is encoded"""
    mapped: bool = False
    """whether its Linears stay in the file, as in `load_flux`"""
    prepare: Callable[[nn.Module], object] = lambda model: None
    """called with the model"""

    @property
    def precision(self) -> str:
        """As requests name it."""
        return self.format or str(self.dtype).removeprefix("torch.")


def load_text_encoders(
    variant: Variant,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    t5: T5Choice | None = None,
    mapped: bool = False,
) -> tuple[TextEncoder, TextEncoder]:
    """T5 and CLIP of that model, frozen, their output in `dtype`. FileError, AccessError or DiskError.

    t5: how T5 is loaded, if not as CLIP. mapped: as in `load_flux`, of CLIP.
    """
    files, place = text_files(variant), torch.device(device)
    t5 = t5 or T5Choice(dtype=dtype, device=lambda: place, mapped=mapped)
    return _load_t5(variant, files, dtype, t5), _load_clip(variant, files, place, dtype, mapped)


def _load_t5(variant: Variant, files: TextFiles, dtype: torch.dtype, choice: T5Choice) -> TextEncoder:
    def load() -> nn.Module:
        what = (choice.device(), choice.dtype, choice.format, choice.mapped)
        model = load_encoder("t5", files.t5, variant, *what)
        choice.prepare(model)
        return model

    model = None if choice.later else load()
    known = encoder_config(variant, "t5", files.t5).get("vocab_size", T5_DEFAULTS["vocab_size"])
    tokenizer = load_tokenizer(files.t5_tokenizer, "t5", known)
    return TextEncoder(tokenizer, model, variant.max_text, dtype, load, choice.precision, choice.home)


def _load_clip(
    variant: Variant, files: TextFiles, device: torch.device, dtype: torch.dtype, mapped: bool
) -> TextEncoder:
    model = load_encoder("clip", files.clip, variant, device, dtype, mapped=mapped)
    words, places = (x.num_embeddings for x in model.embeddings.values())
    tokenizer = load_tokenizer(files.clip_tokenizer, "clip", words)
    return TextEncoder(tokenizer, model, min(CLIP_TOKENS, tokenizer.max_length or CLIP_TOKENS, places), dtype)


STAYS = re.compile(r".*\.wo")
"""Linears of T5 that stay as they are: they need their range"""


def load_encoder(
    part: Part,
    path: Path,
    variant: Variant,
    device: torch.device | str,
    dtype: torch.dtype,
    format: str | None = None,
    mapped: bool = False,
) -> Any:
    """A text encoder, frozen, from a file or a folder of any layout, tensor by tensor. FileError says what is wrong.

    Its sizes come from the config.json beside the weights, from that of the model that ships, or from the variant.
    format: of `linears.formats`, that its Linears get, or AS_STORED. mapped: as in `load_flux`.
    """
    contents = find_contents(path, part)
    source, storage = contents.source, contents.storage
    if contents.found.part != part:
        raise FileError(f"{path}: the text encoder could not be read: this is {contents.found.text}.")
    check_part(contents, variant)
    note_precision(contents, dtype, format)
    model = _empty_encoder(contents, variant)
    places = {name: model_name.rpartition(".") for model_name, name in contents.names.items()}
    order = sorted(places, key=source.spans.__getitem__)
    reserve(device, (dtype.itemsize * math.prod(shape) for shape in contents.shapes.values()))

    def put(name: str, x: Tensor) -> None:
        owner, _, role = places[name]
        setattr(model.get_submodule(owner), role, nn.Parameter(x, requires_grad=False))

    def fill(name: str, owner: str, linear: nn.Linear | None) -> None:
        """Put a weight in its place, in `dtype`."""
        if not mapped or is_view(contents, [name], dtype):
            put(name, dense(get, name, storage, dtype))
            return
        read = held_in_file(get, storage, [name], lambda get, dtype: dense(get, name, storage, dtype))
        if linear is None:
            put(name, read(dtype))
        else:
            model.set_submodule(owner, MappedLinear(read, linear.weight.shape, linear.bias))

    with in_file(source) if mapped else opened(source, device, storage.among(order)) as get:
        for name in order:
            owner, _, role = places[name]
            module = model.get_submodule(owner)
            linear = module if isinstance(module, nn.Linear) and role == "weight" else None
            stored = storage.of.get(name)
            held = stored.format if stored else None
            if linear is None or STAYS.fullmatch(owner) or (format in (None, AS_STORED) and held is None):
                fill(name, owner, linear)
            elif stored is not None and stored.keeps and format in (AS_STORED, held):
                model.set_submodule(owner, kept(get, stored, linear.bias))
            elif format not in (None, AS_STORED):
                put(name, dense(get, name, storage, torch.bfloat16))
                model.set_submodule(owner, FORMATS[format].kind.of(linear))
            else:
                fill(name, owner, linear)
    return model.to(device).eval().requires_grad_(False)


def _empty_encoder(contents: Contents, variant: Variant) -> T5Encoder | ClipText:
    """A text encoder without its weights. FileError."""
    path = contents.source.path
    try:
        config = encoder_config(variant, contents.part, path)
        if contents.part == "t5":
            return without_weights(T5Encoder, t5_params(config))
        return without_weights(ClipText, clip_params(config))
    except (ValueError, TypeError) as error:
        raise FileError(f"{path}: the text encoder's configuration could not be read: {error}") from error
