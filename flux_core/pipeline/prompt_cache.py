"""A cache of encoded prompts: T5's tokens and CLIP's vector."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..device.memory import CACHED_PROMPTS
from .nonfinite import is_finite, nonfinite_error
from .placement import Placement


class PromptCache:
    """A function from a prompt to text tokens [1, T, D] and vector [1, V], on the device.

    Encoders, dtype and length are one pipeline's and do not change, so the prompt alone is the key. The last
    CACHED_PROMPTS are kept; `device/memory.py` counts them in what a model needs.
    """

    def __init__(self, placement: Placement, dtype: torch.dtype) -> None:
        self.placement, self.dtype = placement, dtype
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """NonFiniteError if an embedding is not finite."""
        found = self._kept.pop(prompt, None) or self._encode(prompt)
        self._kept[prompt] = found  # the latest, and last to go; never looked up again: threads may draw side by side
        if len(self._kept) > CACHED_PROMPTS:
            self._kept.popitem(last=False)
        return found

    @torch.no_grad()
    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Where parts take turns: encode at most CACHED_PROMPTS prompts in one turn. MemoryShortage."""
        fallback = self.placement.fallback
        if fallback.offload:
            fallback.run(f"encoding {len(prompts)} prompt(s)", lambda: list(map(self, prompts)))

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        encoders = {"T5": self.placement.components.t5, "CLIP": self.placement.components.clip}
        with self.placement.using(*encoders.values()):
            txt, vec = (encode([prompt]).to(self.placement.device, self.dtype) for encode in encoders.values())
        for (name, encoder), x in zip(encoders.items(), (txt, vec), strict=True):
            if not is_finite(x):
                raise nonfinite_error(f"in {name}'s embedding of the prompt", self.dtype, encoder)
        return txt, vec
