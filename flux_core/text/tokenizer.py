"""Prompts to token ids, by the tokenizer.json that comes with an encoder.

The ids are those of transformers' classes, which take longer to import than a small model to draw. They still read
folders in which there is only a vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers

from ..checkpoint.identify import Part
from ..checkpoint.layouts import tokenizer_class
from ..errors import FileError
from ..jsonfile import read_json


class Kind(NamedTuple):
    """What a tokenizer is where its files do not say so."""

    name: str
    """of its class in transformers"""
    pad: str
    unk: str


KINDS: Mapping[Part, Kind] = MappingProxyType(
    {
        "t5": Kind("T5TokenizerFast", "<pad>", "<unk>"),
        "clip": Kind("CLIPTokenizer", "<|endoftext|>", "<|endoftext|>"),
    }
)


class Tokenizer:
    """Texts to ids. Its id of unknown words is None where it has no such token."""

    def __init__(self, backend: tokenizers.Tokenizer, pad: str, unk: str, max_length: int | None) -> None:
        """pad, unk: tokens for padding and unknown words. max_length: of a text, if files say it. ValueError if it
        cannot pad."""
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.max_length = backend, max_length
        found = backend.token_to_id(pad)
        if found is None:
            raise ValueError(f"it has no token {pad!r} to fill up texts with")
        self.pad_id: int = found
        self.unk_id = backend.token_to_id(unk)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def pieces(self, text: str) -> list[tuple[int, int, int]]:
        """Token id, start and end in the text, of all its tokens and those that begin and end it."""
        found = self.backend.encode(text)
        return [(token, *place) for token, place in zip(found.ids, found.offsets, strict=True)]


def load_tokenizer(folder: Path, part: Part, known: int) -> Tokenizer:
    """The tokenizer in that folder. FileError if it can't be read, or has more tokens than are known to the model."""
    kind = KINDS[part]
    try:
        backend, said = _backend(folder, kind.name), _config(folder)
        pad, unk = (_content(said.get(f"{name}_token")) or getattr(kind, name) for name in ("pad", "unk"))
        tokenizer = Tokenizer(backend, pad, unk, _length(said.get("model_max_length")))
    except FileError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise FileError(f"{folder}: the tokenizer could not be read: {error}") from error
    if len(tokenizer) > known:
        raise FileError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for {known}.")
    return tokenizer


def _backend(folder: Path, default: str) -> tokenizers.Tokenizer:
    if (path := folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(path))
    import transformers

    kind = getattr(transformers, tokenizer_class(folder, default))
    return kind.from_pretrained(folder, local_files_only=True).backend_tokenizer


def _config(folder: Path) -> dict[str, Any]:
    """What a folder's files say of its tokenizer; newer ones have all in the last."""
    said: dict[str, Any] = {}
    for path in (folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")):
        said |= read_json(path, "the tokenizer's configuration") if path.is_file() else {}
    return said


def _length(said: Any) -> int | None:
    """The tokens of a text that a configuration allows. ValueError for what is no number of them."""
    if said is None:
        return None
    if type(said) not in (int, float) or said < 1:
        raise ValueError(f"model_max_length is {str(said)[:40]!a}")
    return int(said)


def _content(token: Any) -> str | None:
    """A special token's text, which files have bare or with how it is matched."""
    return token.get("content") if isinstance(token, dict) else token
