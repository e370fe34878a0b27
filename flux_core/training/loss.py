"""The loss of a micro-batch: how far the velocity is from where it should be, and what else is asked of the model.

    contrast g       the target becomes u + g (target - u), with the frozen model's velocity u for the empty text: what
                     a model that guidance was distilled into predicts at guidance g, so it stays one
    masks            the error counts by how white a picture's mask is; outside of it, by `mask_prior`, the target is
                     the frozen model's velocity
    differential     |v(c) - v'(c)|^2 more, v' the frozen model and c the caption with the class in place of the
                     trigger word: the class stays as it was (differential output preservation, of ai-toolkit)
    blank            the same with the empty text
    regularization   the target of regularization pictures is the frozen model's velocity, so that they say where it is
                     kept and not what they show (prior predictions, of OneTrainer)

A term with a forward of its own is a part of its own: its gradients are taken before the next forward begins, so no
more is kept for them than for one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from ..model.transformer import Fetch
from ..sampling import FlowInputs, image_ids, pack
from .adapter import Adapter
from .captions import CLASS, EMPTY
from .objective import LOSSES, MAPS, WEIGHTINGS, flow_target, predicted
from .recipe import Encoded, Example, Recipe
from .recompute import fetch_for
from .seen import condition_of

PRESERVED: Mapping[str, str] = MappingProxyType({"differential": CLASS, "blank": EMPTY})
"""the kind of text for which the frozen model is kept to, by the ways of `--preserve` with a forward of their own"""
PRIOR = "regularization"
"""the way that has none"""
GUIDED = EMPTY
"""that of `contrast`"""


def others_of(recipe: Recipe) -> set[str]:
    """The kinds of texts that an example needs beside its own."""
    return ({PRESERVED[recipe.preserve]} if recipe.preserve in PRESERVED else set()) | (
        {GUIDED} if recipe.contrast else set()
    )


def forwards_of(recipe: Recipe) -> tuple[int, int]:
    """How many forwards a micro-batch takes: those that are learned from, and those of the frozen model."""
    return 1 + (recipe.preserve in PRESERVED), bool(recipe.contrast) + bool(recipe.mask_prior) + bool(recipe.preserve)


def parts(
    adapter: Adapter, batch: Sequence[Example], recipe: Recipe, noise: Tensor, sigma: Tensor, fetch: Fetch | None = None
) -> Iterator[Tensor]:
    """The parts of each picture's loss, fp32 [B] each, whose sum it is. noise: as the latents; sigma: [B], fp32."""
    see = Forwards(adapter, batch, recipe, noise, sigma, fetch)
    own = [(one.txt, one.vec) for one in batch]
    target = pack(flow_target(see.latents, see.noise))
    if recipe.contrast:
        base = see.frozen([one.others[GUIDED] for one in batch])
        target = base + recipe.contrast * (target - base)
    if recipe.preserve == PRIOR:  # in every batch: all ranks of a spread model go forward together
        target = torch.where(see.priors(), see.frozen(own), target)
    found, weight = see.learned(own), see.weight()
    error = LOSSES[recipe.loss](found - target, see.knee())
    if (mask := see.mask()) is not None:
        error = mask * error
        if recipe.mask_prior:
            error = error + recipe.mask_prior * (1 - mask) * (found - see.frozen(own)).square()
    yield weight * error.mean((1, 2))
    if recipe.preserve in PRESERVED:
        kept = [one.others[PRESERVED[recipe.preserve]] for one in batch]
        before = see.frozen(kept)
        yield recipe.preserve_weight * (see.learned(kept) - before).square().mean((1, 2))


class Forwards:
    """Forwards of one micro-batch at its noise, with other texts."""

    def __init__(
        self, adapter: Adapter, batch: Sequence[Example], recipe: Recipe, noise: Tensor, sigma: Tensor,
        fetch: Fetch | None,
    ) -> None:  # fmt: skip
        self.adapter, self.batch, self.recipe = adapter, batch, recipe
        self.fetch = fetch or fetch_for(recipe.checkpointing)
        self.device = adapter.parameters()[0].device
        self.latents = torch.stack([one.latents for one in batch]).to(self.device)
        self.noise, self.sigma = noise.to(self.device), sigma.to(self.device)
        adapter.at(sigma)

    def learned(self, texts: Sequence[Encoded]) -> Tensor:
        """The velocity for these texts, packed, fp32 [B, L, 64]."""
        latents, recipe = self.latents, self.recipe
        txt, vec = (torch.stack(part).to(self.device) for part in zip(*texts, strict=True))
        txt, vec = (x.to(self.device) for x in self.adapter.encoded(txt, vec))
        inputs = FlowInputs(
            img_ids=image_ids(len(latents), latents.shape[2] // 2, latents.shape[3] // 2, self.device),
            txt=txt,
            txt_ids=torch.zeros(len(latents), txt.shape[1], 3, dtype=torch.float32, device=self.device),
            vec=vec,
            guidance=torch.full((len(latents),), recipe.guidance, dtype=txt.dtype, device=self.device),
        )
        if recipe.takes:
            seen = condition_of(recipe.takes, [cast(Tensor, one.seen) for one in self.batch])
            inputs = seen.apply(inputs, (8 * latents.shape[3], 8 * latents.shape[2]))
        half = torch.autocast(self.device.type, torch.float16) if recipe.precision == "fp16" else nullcontext()
        with half:
            return predicted(self.adapter.model, inputs, latents, self.noise, self.sigma, self.fetch)

    def frozen(self, texts: Sequence[Encoded]) -> Tensor:
        """The same of the model without what it learned."""
        with torch.no_grad(), self.adapter.off():
            return self.learned(texts)

    def weight(self) -> Tensor:
        """Of each picture, at its level: [B]."""
        own = torch.tensor([one.weight for one in self.batch], dtype=torch.float32, device=self.device)
        sigma, recipe = self.sigma.float(), self.recipe
        return own * MAPS[recipe.timesteps].weight(sigma) * WEIGHTINGS[recipe.weighting](sigma)

    def priors(self) -> Tensor:
        """Whether each is a regularization picture: [B, 1, 1]."""
        found = [one.prior for one in self.batch]
        return torch.tensor(found, dtype=torch.bool, device=self.device)[:, None, None]

    def knee(self) -> Tensor:
        """Where an error begins to count linearly: [B, 1, 1]. With kohya's schedule it falls from 1 to c with noise."""
        c = torch.full_like(self.sigma, self.recipe.huber_c, dtype=torch.float32)
        return (c if self.recipe.huber_schedule == "constant" else c**self.sigma)[:, None, None]

    def mask(self) -> Tensor | None:
        """Of the packed latents, [B, L, 64]; nothing where no picture has one."""
        if all(one.mask is None for one in self.batch):
            return None
        whole = torch.ones(self.latents.shape[2:], dtype=torch.float32, device="cpu")
        masks = torch.stack([whole if one.mask is None else one.mask for one in self.batch])
        return pack(masks[:, None].expand(self.latents.shape).to(self.device))
