"""Stable Flow: edit a picture by its prompt, and keep what the prompt does not touch (arXiv 2411.14430).

The source and its edits are rows of one batch and start from the same noise. In a few *vital* blocks the edits read the
source's keys and values of image tokens instead of their own, so that their content stays where it is; everything else
is theirs. All of it is one `share_kv` intervention over named branches.

A photograph has no noise of its own: it is encoded, nudged, and followed backwards along the flow; then the source
row is held on that path while the edits are drawn. The nudge (times 1.15, never undone) keeps the inverted noise from
collapsing to the picture. The released code takes the path two steps late, and its nearly clean end after the first
step: `replay="released"` does as it does, `"exact"` holds the row where it was at that sigma.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..hooks import HookRun, ShareKV
from ..pipeline import Pipeline
from ..request.fields import NUDGE
from ..request.generation import PATCH, GenerationRequest, InitImage
from ..sampling import OnStep, Step, euler, get_noise, get_schedule, invert, pack

SOURCE = "source"
Replay = Literal["exact", "released"]


class Editing:
    """A source and its edits on one pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        request: GenerationRequest,
        edits: Sequence[str],
        layers: Sequence[str],
        source_guidance: float | None = None,
        origin: InitImage | None = None,
        fit: str = "crop",
    ) -> None:
        """request: the source's, with the guidance of the edits. source_guidance: the source's own; None: the same.

        origin: what the pictures' metadata say of the photograph. fit: how it gets their shape (`fields.FITS`).
        """
        if not edits:
            raise UsageError("nothing to edit: say what shall be drawn with --edit")
        if request.uses_true_cfg:
            raise UsageError("an edit takes no negative prompt and no true CFG: leave --true-cfg-scale out")
        if not (pipeline.variant.params.guidance_embed or source_guidance is None):
            raise UsageError(f"{pipeline.variant.name} takes no guidance")
        self.pipeline, self.request, self.edits = pipeline, pipeline.complete(request), tuple(edits)
        self.branches = (SOURCE, *(f"edit{i + 1}" for i in range(len(edits))))
        self.plan = [ShareKV(blocks=tuple(layers), source=SOURCE)] if layers else []
        self.size = request.padded_size
        tokens = self.size[0] * self.size[1] // PATCH**2
        self.sigmas = get_schedule(request.num_steps, tokens, shift=pipeline.variant.shift)
        self.origin, self.fit, self.layers = origin, fit, tuple(layers)
        strength = request.guidance or 0.0
        self.guidance = [strength if source_guidance is None else source_guidance, *([strength] * len(edits))]

    @torch.no_grad()
    def generated(self, on_step: OnStep | None = None) -> Tensor:
        """Tokens of source and edits [1 + E, L, 64], drawn from the request's seed."""
        noise = get_noise(1, self.size[1], self.size[0], self.pipeline.device, self.pipeline.dtype, self.request.seed)
        return self._sample(pack(noise), on_step)

    @torch.no_grad()
    def of_photo(
        self, photo: Image.Image, nudge: float = NUDGE, replay: Replay = "exact", on_step: OnStep | None = None
    ) -> Tensor:
        """Tokens of a photograph and its edits [1 + E, L, 64]; the request's prompt describes the photograph."""
        path = self.inverted(photo, nudge)
        steps = len(path) - 1

        def hold(step: Step) -> Tensor:
            exact, released = steps - 1 - step.index, (steps - step.index) % steps + 1
            x = torch.cat((path[exact if replay == "exact" else released], step.x[1:]))
            if on_step is not None:
                on_step(step)
            return x

        return self._sample(path[-1], hold)

    @torch.no_grad()
    def inverted(self, photo: Image.Image, nudge: float = NUDGE) -> list[Tensor]:
        """The photograph's path to noise, by the source prompt at guidance 1 (see `sampling.invert`)."""
        latent = nudge * self.pipeline.tokens_of(photo, *self.size, self.fit)
        velocity = self.pipeline.velocity([self.request.prompt], [1.0], self.size, sigmas=self.sigmas[:-1])
        what = f"inverting {self.size[0]}x{self.size[1]} pixels"
        return self.pipeline.fallback.run(what, lambda: invert(velocity, latent, self.sigmas), "offload")

    def _sample(self, start: Tensor, on_step: OnStep | None) -> Tensor:
        prompts = [self.request.prompt, *self.edits]
        velocity = partial(self.pipeline.velocity, prompts, self.guidance, self.size, sigmas=self.sigmas[:-1])
        x = start.expand(len(self.branches), *start.shape[1:])

        def work() -> Tensor:
            run = HookRun(self.plan, self.pipeline.variant.params, self.sigmas, self.branches)
            return euler(velocity(run), x, self.sigmas, self.pipeline.checked(on_step, velocity, run))

        what = f"drawing {len(x)} pictures of {self.size[0]}x{self.size[1]} pixels"
        return self.pipeline.fallback.run(what, work, "offload")

    def picture(self, x: Tensor, row: int) -> Image.Image:
        """One row's tokens [L, 64] as a picture. Its metadata say what it is; `--from-image` cannot make it again."""
        prompt = (self.request.prompt, *self.edits)[row]
        what = f"Stable Flow, {self.branches[row]} of {self.request.prompt!r}, {len(self.layers)} blocks shared"
        changes = {"prompt": prompt, "functions": (what,), "init_image": self.origin}
        changes |= {"fit": self.fit} if self.origin else {}
        return self.pipeline.picture(x[None], self.request.model_copy(update=changes))
