"""Sample the tokens of pictures for requests: noise, schedule, guidance, plan, conditions, and Euler."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..device.choice import compile_errors, empty_device_cache
from ..device.oom import retried
from ..errors import UsageError, foreign, is_out_of_memory
from ..hooks import HookRun, Intervention, Sampler, Sampling, StepCache, Wrap
from ..hooks.plan import expanded
from ..images.given import Given
from ..model import Adapt
from ..request.fields import FIT, PERCENTILE
from ..request.generation import PATCH, GenerationRequest
from ..sampling import (
    OnStep,
    SampledRun,
    Step,
    Velocity,
    euler,
    flow_velocity,
    get_noise,
    get_schedule,
    image_ids,
    pack,
    start_from_image,
)
from ..sampling.family import mask_of
from ..sampling.guidance import cfg_velocity, one_batch, two_passes
from ..sampling.inpaint import mask_tokens, repaint
from ..terminal import note
from ..variants import Variant
from .codec import Codec
from .conditions import Condition, FlowInputs, bytes_beside, conditioned, tokens_added
from .controlnets import ControlNets
from .family import Maps, conditions_of
from .loras import Loras
from .nonfinite import asked_finite, step_error
from .prompt_cache import PromptCache

if TYPE_CHECKING:
    from ..vision.redux import Redux

Prompt = str | tuple[Tensor, Tensor]
"""a text, or what `PromptCache` gives for one: T5's tokens [1, T, D] and CLIP's vector [1, V]"""


class Denoiser:
    """Samples with a placement's transformer."""

    def __init__(self, variant: Variant, prompts: PromptCache, codec: Codec, loras: Loras, dtype: torch.dtype) -> None:
        self.variant, self.prompts, self.codec, self.loras, self.dtype = variant, prompts, codec, loras, dtype
        self.placement = prompts.placement
        self.maps = Maps(self.placement.device)
        self.controlnets = ControlNets(variant.params, codec, self.maps)
        self.redux: Redux | None = None
        """makes words of pictures, for models that take them"""
        self.one_batch = True
        """whether positive and negative prompt are rows of one batch where that fits, which is faster"""

    def inputs(self, prompts: Sequence[Prompt], guidance: Sequence[float], size: tuple[int, int]) -> FlowInputs:
        """The fixed inputs of `velocity`: a prompt and a guidance for each row. size: width and height, padded."""
        device, rows = self.placement.device, len(prompts)
        encoded = (self.prompts(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
        txt, vec = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        return FlowInputs(
            img_ids=image_ids(rows, size[1] // PATCH, size[0] // PATCH, device),
            txt=txt,
            txt_ids=torch.zeros(rows, txt.shape[1], 3, device=device, dtype=torch.float32),
            vec=vec,
            guidance=torch.tensor(guidance, device=device, dtype=self.dtype),
        )

    def seen(self, request: GenerationRequest, given: Given) -> tuple[Condition, ...]:
        """What the model of a request sees besides its prompt, of pictures as large as they are drawn."""
        own = conditions_of(request, given, self.codec, self.maps, self.redux)
        return *own, *self.controlnets.conditions(request, given)

    def velocity(
        self,
        prompts: Sequence[Prompt],
        guidance: Sequence[float],
        size: tuple[int, int],
        run: SampledRun | None = None,
        sigmas: Sequence[float] = (),
        conditions: Sequence[Condition] = (),
        adapt: Adapt | None = None,
        positive: Sequence[Prompt] | None = None,
    ) -> Velocity:
        """The model as `velocity(x, sigma)` for x [B, L, 64]: a prompt and a guidance for each of the B rows.

        size: a request's `padded_size`. sigmas: those of the calls to come, if known. adapt: of `Loras.prepare`.
        positive: the prompts that conditions work for inside a forward, where there are negative ones, too.
        """
        model, placement = self.placement.components.flux, self.placement
        beside, behind = bytes_beside(conditions), tokens_added(conditions)
        placement.admit(size, len(prompts), len(sigmas) or None, beside, behind)
        seen = None
        if conditions and positive is not None:
            seen = self.inputs(positive, guidance[:: len(prompts) // len(positive)], size)
        inputs, run = conditioned(self.inputs(prompts, guidance, size), conditions, size, run, seen)
        if self.variant.takes.channels and inputs.img_cond is None:
            raise UsageError(
                f"{self.variant.name} sees a picture beside what it draws. Next: pipeline.generate with it"
            )
        options: dict[str, Any] = {"replay": placement.is_fixed, "fetch": placement.fetch, "adapt": adapt}
        flow = flow_velocity(model, **vars(inputs), run=run, sigmas=sigmas, **options)

        def step(x: Tensor, sigma: float) -> Tensor:
            with placement.using(model):
                return flow(x, sigma)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            if run is not None:  # which would count the forward twice
                return step(x, sigma)
            return retried(partial(step, x, sigma), partial(placement.evict, model))

        return velocity

    @compile_errors()
    def denoise(
        self,
        requests: Sequence[GenerationRequest],
        source: Image.Image | Given | None = None,
        on_step: OnStep | None = None,
        functions: Sequence[Intervention] = (),
        conditions: Sequence[Condition] = (),
        image: int = 0,
    ) -> Tensor:
        """The finished pictures' tokens, [B, L, 64], a row for each request; what they share is of `request.batch`.

        source: the requests' pictures; what is painted in is as large as it is drawn. functions: interventions beside
        those of the requests' plan. image: the number that these are told.
        """
        given = Given.of(source)
        conditions = (*self.seen(requests[0], given), *conditions)
        sample = partial(self._sample, requests, given, on_step, functions, conditions, image)
        try:
            return sample(self.one_batch)
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and self.one_batch and requests[0].uses_true_cfg):
                raise
        note("positive and negative prompt do not fit as one batch: two passes (the last bits of the picture differ)")
        empty_device_cache(self.placement.device)
        return sample(False)

    def _sample(
        self,
        requests: Sequence[GenerationRequest],
        given: Given,
        on_step: OnStep | None,
        functions: Sequence[Intervention],
        conditions: Sequence[Condition],
        image: int,
        together: bool,
    ) -> Tensor:
        first = requests[0]
        x, sigmas, on_step = self.start(requests, given, on_step)
        adapt = self.loras.prepare(first.loras, sigmas)
        velocity = partial(self._guided, requests, sigmas, conditions, together, adapt)
        request = first.recorded(functions).model_dump_json()
        about: dict[str, Any] = {"branches": first.branches, "passes": not together, "image": image, "request": request}
        return self.integrate(velocity, x, sigmas, (*first.hooks, *functions), on_step, **about)

    def start(
        self, requests: Sequence[GenerationRequest], given: Given, on_step: OnStep | None
    ) -> tuple[Tensor, list[float], OnStep | None]:
        """Where requests start: tokens [B, L, 64], the schedule from there, and `on_step` behind what keeps a source.

        given: as for `denoise`.
        """
        first = requests[0]
        width, height = first.padded_size
        noise = [get_noise(1, height, width, self.placement.device, self.dtype, request.seed) for request in requests]
        x = pack(torch.cat(noise))
        sigmas = get_schedule(first.num_steps, x.shape[1], shift=self.variant.shift)
        if given.image is not None:
            latent = self.codec.encode(given.image, width, height, first.fit or FIT)
            if given.mask is not None and not self.variant.takes.mask:
                tokens = mask_tokens(mask_of(given.mask)).to(x)
                on_step = both(repaint(latent, x, tokens, sigmas), on_step)
            x, sigmas = start_from_image(latent, x, sigmas, first.strength or 0.0)
        return x, sigmas, on_step

    def integrate(
        self,
        velocity: Callable[[HookRun | None], Velocity],
        x: Tensor,
        sigmas: Sequence[float],
        plan: Sequence[Intervention] = (),
        on_step: OnStep | None = None,
        sample: Callable[..., Tensor] | None = None,
        **about: Any,
    ) -> Tensor:
        """The tokens at the end of the schedule, under a plan.

        velocity: as a function of the hooks in a forward. sample: the sampler, if the plan has none; None: Euler's.
        about: the other arguments of `HookRun`. HookError, NonFiniteError.
        """
        params = self.variant.params
        plan = expanded(plan, params)
        samplers = [entry for entry in plan if isinstance(entry, Sampler)]
        if len(samplers) > 1:
            raise UsageError(f"{samplers[0].called} and {samplers[1].called} are two samplers. Next: leave one out")
        with ExitStack() as runs:

            def begun(plan: Any) -> HookRun:
                run = HookRun(plan, params, sigmas, **about)
                runs.push(lambda kind, error, trace: _end(run, error))
                return run

            def of(plan: Any) -> Velocity:
                run = begun(plan)
                return _ours(velocity(run if run.plan else None))

            run = begun([x for x in plan if x.in_forward])
            v, sampling = _ours(velocity(run if run.plan else None)), Sampling(tuple(sigmas), params, of)
            for wrap in (entry for entry in plan if isinstance(entry, Wrap | StepCache)):
                v = wrap.around(v, sampling)
            checked = self.checked(on_step, velocity, run)
            if not samplers:
                return (sample or euler)(v, x, sigmas, checked)
            return _sampled(samplers[0], v, x, sigmas, checked)

    def _guided(
        self,
        requests: Sequence[GenerationRequest],
        sigmas: Sequence[float],
        conditions: Sequence[Condition],
        together: bool,
        adapt: Adapt | None,
        run: HookRun | None,
    ) -> Velocity:
        """The requests' velocity, with guidance. together: positive and negative prompts as rows of one batch."""
        first, positive = requests[0], [request.prompt for request in requests]

        def of(*prompts: str) -> Velocity:
            each = len(prompts) // len(requests)  # of a request's texts
            strengths = [request.guidance or 0.0 for request in requests for _ in range(each)]
            seen = positive if first.uses_true_cfg else None
            return self.velocity(prompts, strengths, first.padded_size, run, sigmas[:-1], conditions, adapt, seen)

        if not first.uses_true_cfg:
            return of(*positive)
        texts = [request.texts for request in requests]
        negative = [text for _, text in texts]
        return cfg_velocity(
            one_batch(of(*chain(*texts))) if together else two_passes(of(*positive), of(*negative)),
            sigmas,
            first.true_cfg_scale or 1.0,
            first.cfg_zero,
            first.mimic_scale,
            first.threshold_percentile or PERCENTILE,
            first.cfg_schedule or "constant",
        )

    def checked(self, on_step: OnStep | None, velocity: Callable[[HookRun], Velocity], run: HookRun) -> OnStep:
        """`on_step` with a check for finite latents: before it, or on a card when the next step is on its way.

        velocity: the sampled velocity as a function of the run.
        """
        parts = self.placement.components.flux, self.placement.components.ae
        asked: deque[tuple[Step, Callable[[], bool]]] = deque()

        def check(step: Step) -> Tensor | None:
            asked.append((step, asked_finite(step.x)))
            is_last = step.sigma_next == run.sigmas[-1]
            while len(asked) > (step.x.is_cuda and not is_last):
                before, is_finite = asked.popleft()
                if not is_finite():
                    raise step_error(before, velocity, run, self.dtype, *parts)
            return None if on_step is None else on_step(step)

        return check


def both(first: OnStep, second: OnStep | None) -> OnStep:
    """Two callbacks, the second after what the first makes of the latents."""

    def called(step: Step) -> Tensor | None:
        changed = first(step)
        if second is None:
            return changed
        last = second(step if changed is None else replace(step, x=changed))
        return changed if last is None else last

    return called


def row_by_row(callbacks: Sequence[OnStep | None]) -> OnStep:
    """A callback for a batch, which gives each row's step to its own callback."""

    def called(step: Step) -> Tensor:
        tokens = zip(*(x.split(1) for x in (step.x, step.velocity, step.before)), strict=True)
        rows = [Step(step.index, step.sigma, step.sigma_next, *of_row) for of_row in tokens]
        told = [None if call is None else call(row) for call, row in zip(callbacks, rows, strict=True)]
        return torch.cat([row.x if changed is None else changed for row, changed in zip(rows, told, strict=True)])

    return called


def _ours(velocity: Velocity) -> Velocity:
    """The velocity, whose errors are none of the functions around it."""

    def called(x: Tensor, sigma: float) -> Tensor:
        with foreign():
            return velocity(x, sigma)

    return called


def _sampled(sampler: Sampler, velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep) -> Tensor:
    """The tokens of a user's sampler. If it tells of no step, it is told for it that the last was done."""
    told: list[int] = []

    def counted(step: Step) -> Tensor | None:
        told.append(step.index)
        with foreign():
            return on_step(step)

    drawn = sampler.sample(velocity, x, sigmas, counted)
    if told or len(sigmas) < 2:
        return drawn
    changed = on_step(Step(len(sigmas) - 2, sigmas[-2], sigmas[-1], drawn, drawn - x, x))
    return drawn if changed is None else changed


def _end(run: HookRun, error: BaseException | None) -> None:
    """End a run: where memory ran out, the picture is drawn again, and nothing of it is kept."""
    if error is not None and is_out_of_memory(error):
        run.discard()
    else:
        run.finish()
