"""A picture whose examples come from a run's caches of latents and texts."""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch

from . import captions
from .data import Picture
from .loss import PRIOR, others_of
from .recipe import Example

if TYPE_CHECKING:
    from .run import Run


class Cached:
    """A picture whose examples come from the caches."""

    def __init__(self, run: "Run", picture: Picture, kinds: Sequence[str]) -> None:
        self.run, self.picture, self.kinds, self.cuts = run, picture, kinds, run.cuts[picture]
        self.name = picture.path.name

    @property
    def size(self) -> tuple[int, ...]:
        return *self.cuts[0].size, len(self.picture.beside)

    @property
    def digest(self) -> str:
        """A hash of all that its examples depend on: the latents' file is named by one."""
        run, settings = self.run, self.run.settings
        texts = [run.texts.key(text) for text in run.captions_of(self.picture).values()]
        told: list[Any] = [
            run.latents.path(self.picture).name, texts, settings.caption_dropout, settings.trigger_only,
        ]  # fmt: skip
        if self.picture.mask is not None or self.weight != 1:
            told += [settings.mask_floor, self.weight]
        if settings.preserve == PRIOR and self.picture.prior:
            told.append(PRIOR)
        if run.class_word:
            told.append(run.texts.key(run.of_class(self.picture)))
        return sha256(json.dumps(told).encode()).hexdigest()

    @property
    def weight(self) -> float:
        """Of its loss."""
        weight: float = self.run.settings.prior_weight if self.picture.prior else 1.0
        return weight

    def draw(self, generator: torch.Generator | None) -> Example:
        """One of its cuts and captions; without a generator the first cut, and the caption as it is."""
        kind, number, settings = captions.CAPTION, 0, self.run.settings
        if generator is not None:
            chances = settings.caption_dropout, settings.trigger_only if captions.TRIGGER in self.kinds else 0.0
            kind = captions.draw(self.kinds, generator, *chances)
            drawn = torch.randint(len(self.cuts), (1,), dtype=torch.int64, device="cpu", generator=generator)
            number = int(drawn)
        sha, others = self.picture.sha256, others_of(settings.recipe) if generator is not None else set[str]()
        latents, text = self.run.latents, self.run.text
        seen = latents.seen(self.picture, number).float() if settings.takes else None
        mask, floor = None, settings.mask_floor
        if self.picture.mask is not None:
            mask = floor + (1 - floor) * latents.mask(self.picture, number)
        return Example(
            self.name, latents.get(self.picture, number).float(), *text(sha, kind), seen, mask, self.weight,
            {other: text(sha, other) for other in others}, self.picture.prior,
        )  # fmt: skip
