"""A cache of encoded prompts: T5's tokens and CLIP's vector, in memory and, where the user wants it, on the disk."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..device.memory import CACHED_PROMPTS
from ..device.oom import retried
from ..lora.known import Known
from .kept_embeddings import KeptEmbeddings
from .nonfinite import is_finite, nonfinite_error
from .placement import Placement


class PromptCache:
    """A function from a prompt to text tokens [1, T, D] and vector [1, V], on the device.

    Encoders, dtype and length are one pipeline's and do not change, so the key is the prompt, and what the LoRAs on
    the encoders are. The last CACHED_PROMPTS are kept; `device/memory.py` counts them in what a model needs.
    """

    def __init__(
        self,
        placement: Placement,
        dtype: torch.dtype,
        text_key: Callable[[], tuple[Any, ...]],
        name_tokens: Callable[[], None],
        disk: KeptEmbeddings | None = None,
    ) -> None:
        """text_key: what beside a prompt its encoding depends on, as in `Loras.text_key`; name_tokens: called before
        the encoders are, as in `Loras.name_tokens`."""
        self.placement, self.dtype, self.text_key, self.disk = placement, dtype, text_key, disk
        self.name_tokens = name_tokens
        self._kept: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """NonFiniteError if an embedding is not finite."""
        key = prompt, self.text_key()
        found = self._kept.pop(key, None) or self._found(prompt, key[1])
        self._kept[key] = found  # the latest, and last to go; never looked up again: threads may draw side by side
        if len(self._kept) > CACHED_PROMPTS:
            self._kept.popitem(last=False)
        return found

    def remember(self, prompt: str, txt: Tensor, vec: Tensor) -> None:
        """Take a prompt's text tokens [T, D] and vector [V], which somebody has encoded before."""
        found = (x[None].to(self.placement.device, self.dtype) for x in (txt, vec))
        self._kept[prompt, self.text_key()] = next(found), next(found)

    def forget(self) -> None:
        """Drop what is in memory: the encoders are others than those that it was encoded by."""
        self._kept.clear()

    def _found(self, prompt: str, loras: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """From the disk, or encoded; with a LoRA that has no file of its own only the latter."""
        if self.disk is None or not all(isinstance(known, Known) for known, *_ in loras):
            return self._encode(prompt)
        path = self.disk.path(prompt, [[known.sha256, *how] for known, *how in loras])
        if (found := self.disk.find(path)) is not None and all(x.dtype == self.dtype and is_finite(x) for x in found):
            txt, vec = (x.to(self.placement.device) for x in found)
            return txt, vec
        txt, vec = self._encode(prompt)
        self.disk.keep(path, txt, vec)
        return txt, vec

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        encoders = {"T5": self.placement.components.t5, "CLIP": self.placement.components.clip}
        self.name_tokens()

        def work() -> list[Tensor]:
            with self.placement.using(*encoders.values()):
                return [encode([prompt]).to(self.placement.device, self.dtype) for encode in encoders.values()]

        txt, vec = retried(work, partial(self.placement.evict, encoders["T5"]))
        for (name, encoder), x in zip(encoders.items(), (txt, vec), strict=True):
            if not is_finite(x):
                raise nonfinite_error(f"in {name}'s embedding of the prompt", self.dtype, encoder)
        return txt, vec
