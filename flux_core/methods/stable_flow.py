"""Stable Flow: edit a picture by changing its prompt, and keep the rest (arXiv 2411.14430).

The source and its edits are rows of one batch and start from the same noise. In a few *vital* blocks the edits use the
source's keys and values of image tokens instead of their own, which keeps their layout and content; all else is
computed from their own prompts. This is a single `share_kv` intervention over named branches.

A source that is drawn starts as a picture does: from noise, from an init image, or painted into one where a mask is
white, and so do its edits.

A photograph is inverted first: it is encoded, nudged, and integrated backwards along the flow; then the source row is
set to that path at every step while the edits are drawn. The nudge (times 1.15, never undone) keeps the inverted noise
from collapsing to the picture. The released code uses the path two steps late, and its nearly clean end after the first
step: `replay="released"` reproduces that, `"exact"` sets the row to the path's latents at the same sigma.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..hooks import HookRun, Intervention, Sampler, ShareKV
from ..pipeline import Pipeline
from ..request.fields import FIT, NUDGE
from ..request.generation import PATCH, GenerationRequest
from ..request.pictures import InitImage
from ..sampling import OnStep, Step, Velocity, euler, get_schedule, invert

SOURCE = "source"
Replay = Literal["exact", "released"]


class Editing:
    """Draws a source and its edits with one pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        request: GenerationRequest,
        edits: Sequence[str],
        layers: Sequence[str],
        source_guidance: float | None = None,
        origin: InitImage | None = None,
        fit: str = FIT,
    ) -> None:
        """request: of the source, but with the edits' guidance. source_guidance: the source's; None: the same.

        origin: the photograph as recorded in the pictures' metadata. fit: how it gets their shape (`fields.FITS`).
        UsageError.
        """
        pipeline.given.check(request)
        self.given, _ = pipeline.given.on_canvas(request)
        if not edits:
            raise UsageError("nothing to edit. Next: describe at least one edit with --edit")
        if not request.num_forward_steps:
            raise UsageError("--strength 0 leaves no step: an edit would be its source. Next: a larger one")
        if request.uses_true_cfg:
            raise UsageError("an edit takes no negative prompt and no true CFG. Next: leave --true-cfg-scale out")
        if not (pipeline.variant.params.guidance_embed or source_guidance is None):
            raise UsageError(f"{pipeline.variant.name} takes no guidance")
        self.pipeline, self.request, self.edits = pipeline, pipeline.complete(request), tuple(edits)
        self.branches = (SOURCE, *(f"edit{i + 1}" for i in range(len(edits))))
        shared = (ShareKV(blocks=tuple(layers), source=SOURCE),) if layers else ()
        self.plan: tuple[Intervention, ...] = (*shared, *request.hooks)
        self.size = request.padded_size
        tokens = self.size[0] * self.size[1] // PATCH**2
        self.sigmas = get_schedule(request.num_steps, tokens, shift=pipeline.variant.shift)
        self.origin, self.fit, self.layers = origin, fit, tuple(layers)
        strength = request.guidance or 0.0
        self.guidance = [strength if source_guidance is None else source_guidance, *([strength] * len(edits))]

    @torch.no_grad()
    def generated(self, on_step: OnStep | None = None) -> Tensor:
        """Final tokens of source and edits [1 + E, L, 64], from the request's seed."""
        start = partial(self.pipeline.denoiser.start, [self.request], self.given, on_step)
        return self._retried(lambda: self._integrated(*start()))

    @torch.no_grad()
    def of_photo(
        self, photo: Image.Image, nudge: float = NUDGE, replay: Replay = "exact", on_step: OnStep | None = None
    ) -> Tensor:
        """Final tokens of a photograph and its edits [1 + E, L, 64]; the request's prompt describes the photograph.

        UsageError where the request starts from a picture of its own.
        """
        if self.request.init_image is not None:
            raise UsageError("a photograph is inverted to the noise that it starts from. Next: leave --init-image out")
        if others := [entry.kind for entry in self.plan if isinstance(entry, Sampler)]:
            raise UsageError(f"a photograph is held at Euler's steps, so an edit of one takes no {others[0]}")
        path = self.inverted(photo, nudge)
        steps = len(path) - 1

        def set_source(step: Step) -> Tensor:
            exact, released = steps - 1 - step.index, (steps - step.index) % steps + 1
            x = torch.cat((path[exact if replay == "exact" else released], step.x[1:]))
            if on_step is not None:
                on_step(step)
            return x

        return self._retried(lambda: self._integrated(path[-1], self.sigmas, set_source))

    @torch.no_grad()
    def inverted(self, photo: Image.Image, nudge: float = NUDGE) -> list[Tensor]:
        """The photograph's tokens at every sigma, up to noise; source prompt, guidance 1 (see `sampling.invert`)."""
        latent = nudge * self.pipeline.codec.encode(photo, *self.size, self.fit)

        def work() -> list[Tensor]:
            return invert(self._velocity([self.request.prompt], [1.0], self.sigmas)(None), latent, self.sigmas)

        return self.pipeline.fallback.run(f"inverting {self.size[0]}x{self.size[1]} pixels", work, "offload")

    def _velocity(
        self, prompts: Sequence[str], guidance: Sequence[float], sigmas: Sequence[float]
    ) -> Callable[[HookRun | None], Velocity]:
        """The velocity as a function of the hooks, with the request's LoRAs."""
        adapt = self.pipeline.loras.prepare(self.request.loras, sigmas)
        of, seen = self.pipeline.denoiser.velocity, self.pipeline.denoiser.seen(self.request, self.given)
        return lambda run: of(prompts, guidance, self.size, run, sigmas[:-1], seen, adapt)

    def _integrated(self, start: Tensor, sigmas: Sequence[float], on_step: OnStep | None) -> Tensor:
        x = start.expand(len(self.branches), *start.shape[1:])
        velocity = self._velocity([self.request.prompt, *self.edits], self.guidance, sigmas)
        integrate = self.pipeline.denoiser.integrate
        return integrate(velocity, x, sigmas, self.plan, on_step, euler, branches=self.branches)

    def _retried(self, work: Callable[[], Tensor]) -> Tensor:
        """What `work` gives, with less memory where that runs out."""
        what = f"drawing {len(self.branches)} pictures of {self.size[0]}x{self.size[1]} pixels"
        return self.pipeline.fallback.run(what, work, "offload")

    def picture(self, x: Tensor, row: int) -> Image.Image:
        """The picture of a row's tokens [L, 64]. Its metadata describe it; `--from-image` cannot repeat it."""
        prompt = (self.request.prompt, *self.edits)[row]
        what = f"Stable Flow, {self.branches[row]} of {self.request.prompt!r}, {len(self.layers)} blocks shared"
        changes: dict[str, object] = {"prompt": prompt, "functions": (what,)}
        changes |= {"init_image": self.origin, "fit": self.fit} if self.origin else {}
        return self.pipeline.picture(x[None], self.request.model_copy(update=changes))
