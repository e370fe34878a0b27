"""A cache of encoded prompts: T5's tokens and CLIP's vector."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..device.memory import CACHED_PROMPTS
from .nonfinite import is_finite, nonfinite_error
from .placement import Placement


class PromptCache:
    """A function from a prompt to text tokens [1, T, D] and vector [1, V], on the device.

    Encoders, dtype and length are one pipeline's and do not change, so the key is the prompt, and what the LoRAs on
    the encoders are. The last CACHED_PROMPTS are kept; `device/memory.py` counts them in what a model needs.
    """

    def __init__(self, placement: Placement, dtype: torch.dtype, text_key: Callable[[], Hashable]) -> None:
        """text_key: what beside a prompt its encoding depends on."""
        self.placement, self.dtype, self.text_key = placement, dtype, text_key
        self._kept: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """NonFiniteError if an embedding is not finite."""
        key = prompt, self.text_key()
        found = self._kept.pop(key, None) or self._encode(prompt)
        self._kept[key] = found  # the latest, and last to go; never looked up again: threads may draw side by side
        if len(self._kept) > CACHED_PROMPTS:
            self._kept.popitem(last=False)
        return found

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        encoders = {"T5": self.placement.components.t5, "CLIP": self.placement.components.clip}
        with self.placement.using(*encoders.values()):
            txt, vec = (encode([prompt]).to(self.placement.device, self.dtype) for encode in encoders.values())
        for (name, encoder), x in zip(encoders.items(), (txt, vec), strict=True):
            if not is_finite(x):
                raise nonfinite_error(f"in {name}'s embedding of the prompt", self.dtype, encoder)
        return txt, vec
