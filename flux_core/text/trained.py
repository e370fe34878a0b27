"""Words with trained vectors in a prompt, in place of tokens of the tokenizer (textual inversion).

Their ids are negative, -1 for the first vector of all: no tokenizer has such ids, and CLIP's search for the end of a
text, which for FLUX.1's takes the largest id, does not meet them. An encoder's embedding never sees them.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

EMBEDDINGS = ("token_embedding", "shared")
"""CLIP's and T5's modules whose outputs a layer reads"""


class Piece(NamedTuple):
    """A part of a prompt."""

    text: str
    start: int
    """in the prompt"""
    ids: range | None
    """of its vectors; None: text for the tokenizer"""


class TrainedWords:
    """The words that prompts of one encoder may name."""

    def __init__(self, vectors: Mapping[str, Tensor]) -> None:
        """vectors: of each word, [n, D]."""
        self.vectors = dict(vectors)
        self._ids: dict[str, range] = {}
        first = -1
        for word, x in self.vectors.items():
            self._ids[word] = range(first, first - len(x), -1)
            first -= len(x)
        longest_first = sorted(map(_pattern, self.vectors), key=len, reverse=True)
        self._words = re.compile("|".join(longest_first) or r"(?!)")

    def split(self, prompt: str) -> list[Piece]:
        """The prompt in parts: words with vectors, the longest that fits, and what is between them."""
        found, done = [], 0
        for hit in self._words.finditer(prompt):
            found += [Piece(prompt[done : hit.start()], done, None), Piece(hit[0], hit.start(), self._ids[hit[0]])]
            done = hit.end()
        return [piece for piece in (*found, Piece(prompt[done:], done, None)) if piece.text]

    def names(self, prompt: str) -> bool:
        """Whether the prompt has one of the words."""
        return self._words.search(prompt) is not None

    @contextmanager
    def embedded(self, model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
        """A context in which an encoder may read these ids [B, L]: yields those that it gets, with which its embedding
        returns the words' vectors, with gradients."""
        mine = ids < 0
        if not mine.any():
            yield ids
            return

        def put(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
            every = torch.cat([x.to(y.device, y.dtype) for x in self.vectors.values()])
            return torch.where(mine[..., None], every[(-1 - ids).clamp(min=0)], y)

        hook = embedding_of(model).register_forward_hook(put)
        try:
            yield ids.clamp(min=0)
        finally:
            hook.remove()


def _pattern(word: str) -> str:
    """A word, where no letter or digit goes on with one of its own."""
    before, behind = (r"\b" if end.isalnum() else "" for end in (word[0], word[-1]))
    return f"{before}{re.escape(word)}{behind}"


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The embedding of tokens that CLIP or T5 reads by."""
    found = next(module for name, module in model.named_modules() if name.endswith(EMBEDDINGS))
    assert isinstance(found, nn.Embedding)
    return found
