"""The pipeline owns devices and dtypes: text -> noise -> denoising -> picture.

Images are drawn one at a time, never as rows of one batch: a batch of four and four batches of one differ in
their last bits, and the same request shall give the same pixels however many were asked for with it.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..checkpoint import check_files, load_autoencoder, load_flux, weights_hashes, with_files
from ..device.choice import compile_errors, dtype_name, empty_device_cache, pick_device, pick_dtype, wants_fp8
from ..device.oom import CPU, OomFallback
from ..errors import UsageError, is_out_of_memory
from ..hooks import Custom, HookRun, Intervention
from ..images.metadata import describe
from ..images.pictures import crop_centre, fitted, open_source
from ..kernels import install, install_decode
from ..linears.fp8 import is_quantized
from ..model import MODULATION, AutoEncoder, Flux
from ..model import strips as tiles
from ..request.fields import PERCENTILE
from ..request.generation import PATCH, GenerationRequest
from ..sampling import (
    OnStep,
    Step,
    Velocity,
    euler,
    flow_velocity,
    get_noise,
    get_schedule,
    image_ids,
    pack,
    start_from_image,
    unpack,
)
from ..sampling.guidance import cfg_velocity, one_batch, two_passes
from ..terminal import note
from ..text import load_text_encoders
from ..variants import Variant
from .nonfinite import is_finite, lost, lost_at_step

Encoder = Callable[[list[str]], Tensor]
KNOWN_PROMPTS = 64
"""prompts whose text tokens are kept"""


class Pipeline:
    """One loaded model.

    `t5` and `clip` map prompts to [B, T, D] and [B, V]; `t5.truncated(prompt)` is the text that t5 drops, if
    any. With `offload` they, the transformer and the autoencoder take turns on the device; with `vae_tiling` the
    autoencoder works strip by strip. Where memory runs out, both come by themselves (`device/oom.py`).
    """

    def __init__(
        self,
        variant: Variant,
        model: Flux,
        ae: AutoEncoder,
        t5: Any,
        clip: Encoder,
        device: torch.device,
        dtype: torch.dtype,
        weights: dict[str, str] | None = None,
        offload: bool = False,
        vae_tiling: bool = False,
        compile: bool = False,
    ) -> None:
        self.variant, self.model, self.ae, self.t5, self.clip = variant, model, ae, t5, clip
        self.device, self.dtype = device, dtype
        self.precision = "fp8" if is_quantized(model) else dtype_name(dtype)
        """what requests call it; `dtype` is what everything but fp8 Linears computes in"""
        self.weights = weights or {}
        self.fallback, self.compiled = OomFallback(device, offload, vae_tiling), compile
        if compile:
            for block in (*model.double_blocks, *model.single_blocks):
                block.compile(fullgraph=True)
        self.one_batch = True
        """whether positive and negative prompt are rows of one batch where that fits, which is the faster way"""
        self._present: tuple[Any, ...] = ()
        # By a weak reference: in a cycle with its own cache, a dropped pipeline would keep its memory for a while.
        self.encode = lru_cache(maxsize=KNOWN_PROMPTS)(partial(Pipeline._encode, weakref.proxy(self)))
        """Text tokens [1, T, D] and vector [1, V] of a prompt, or of a negative one, computed once for those that come
        again. All else that they depend on (encoders, dtype, length) is one pipeline's, and does not change."""

    def generate(
        self,
        prompt: str | GenerationRequest,
        seed: int | None = None,
        *,
        init_image: str | Path | Image.Image | None = None,
        on_step: OnStep | None = None,
        plan: Sequence[Intervention] | None = None,
        **fields: Any,
    ) -> list[Image.Image]:
        """Draw the pictures of a request, or of a prompt and the request's other fields.

        Each image carries its own request: `image.info["flux_core"]` (JSON) and `image.info["parameters"]`.
        What a user should know (a size that is cropped, a prompt that is too long) comes as a Python warning.
        `plan`: interventions of `flux_core.hooks`. Those with a JSON form become part of the request.
        """
        functions = [one for one in plan or () if isinstance(one, Custom)]
        if plan is not None:
            fields["plan"] = [one for one in plan if not isinstance(one, Custom)]
        source, origin = open_source(init_image)
        given = dict(prompt) if isinstance(prompt, GenerationRequest) else {"prompt": prompt}
        fields |= {"seed": seed, "init_image": origin}
        changes = {key: value for key, value in fields.items() if value is not None}
        request = GenerationRequest(**{"name": self.variant.name, **given, **changes})
        for line in [*request.notes(), *(line for text in request.texts for line in self.text_notes(text))]:
            warnings.warn(line, stacklevel=2)
        return [self.draw(one, source, on_step, functions) for one in request.images()]

    def text_notes(self, prompt: str) -> list[str]:
        """What the text encoder drops of a prompt, for people; nothing when it reads all."""
        dropped = self.t5.truncated(prompt)
        if not dropped:
            return []
        start = dropped if len(dropped) <= 60 else dropped[:60] + "…"
        return [f"the prompt is longer than {self.variant.max_text} tokens; dropped: {start!r}"]

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        """The request as this pipeline draws it: with its dtype and weights. UsageError if it cannot."""
        if request.name != self.variant.name:
            raise UsageError(f"the request is for {request.name}, but {self.variant.name} is loaded")
        if request.dtype not in (None, self.precision):
            raise UsageError(f"the request is for {request.dtype}, but the model is loaded in {self.precision}")
        return request.model_copy(update={"dtype": self.precision, "weights": self.weights, "compiled": self.compiled})

    @torch.no_grad()
    def draw(
        self,
        request: GenerationRequest,
        source: Image.Image | None = None,
        on_step: OnStep | None = None,
        functions: Sequence[Custom] = (),
    ) -> Image.Image:
        """The one picture of a request with one image. `source`: the init image, RGB, of any size.

        `functions` work beside the request's plan.
        """
        request = self.complete(request)
        if (source is None) != (request.init_image is None):
            raise UsageError("an init image goes with a request that names one, and the other way round")
        what = f"drawing {request.width}x{request.height} pixels"
        x = self.fallback.run(what, lambda: self._denoise([request], source, on_step, functions), "offload")
        return self.picture(x, request.recorded(functions))

    @torch.no_grad()
    def draw_rows(self, requests: Sequence[GenerationRequest]) -> list[Image.Image]:
        """Pictures of requests that differ in prompt and seed alone, as rows of one batch.

        Faster where one row leaves the device idle; the last bits are others than those of a picture drawn alone.
        """
        first = self.complete(requests[0])
        if len({one.model_copy(update={"prompt": "", "seed": 0}).model_dump_json() for one in requests}) > 1:
            raise UsageError("rows of one batch differ in prompt and seed alone")
        what = f"drawing {len(requests)} pictures of {first.width}x{first.height} pixels"
        rows = self.fallback.run(what, lambda: self._denoise(requests, None, None, ()), "offload")
        return [self.picture(x[None], one.recorded()) for x, one in zip(rows, requests, strict=True)]

    @compile_errors()
    def _denoise(
        self,
        requests: Sequence[GenerationRequest],
        source: Image.Image | None,
        on_step: OnStep | None,
        functions: Sequence[Custom],
    ) -> Tensor:
        """The finished pictures' tokens, [B, L, 64], a row for each request; they differ in prompt and seed alone."""
        try:
            return self._sample(requests, source, on_step, functions, self.one_batch)
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and self.one_batch and requests[0].uses_true_cfg):
                raise
        note("positive and negative prompt do not fit as one batch: two passes (the last bits of the picture differ)")
        empty_device_cache(self.device)
        return self._sample(requests, source, on_step, functions, False)

    def _sample(
        self,
        requests: Sequence[GenerationRequest],
        source: Image.Image | None,
        on_step: OnStep | None,
        functions: Sequence[Custom],
        together: bool,
    ) -> Tensor:
        first = requests[0]
        width, height = first.padded_size
        x = pack(torch.cat([get_noise(1, height, width, self.device, self.dtype, one.seed) for one in requests]))
        sigmas = get_schedule(first.num_steps, x.shape[1], shift=self.variant.shift)
        if source is not None:
            latent = self.tokens_of(source, width, height, first.fit or "crop")
            x, sigmas = start_from_image(latent, x, sigmas, first.strength or 0.0)
        plan = (*first.plan, *functions)
        run = HookRun(plan, self.variant.params, sigmas, first.branches, passes=not together)
        velocity = partial(self._velocity_of, requests, sigmas, together)
        x = euler(velocity(run if plan else None), x, sigmas, self.checked(on_step, velocity, run))
        run.finish()
        return x

    def _velocity_of(
        self, requests: Sequence[GenerationRequest], sigmas: Sequence[float], together: bool, run: HookRun | None
    ) -> Velocity:
        """The velocity that requests are drawn by. together: positive and negative prompts as rows of one batch."""
        first = requests[0]

        def of(*prompts: str) -> Velocity:
            strengths = [first.guidance or 0.0] * len(prompts)
            return self.velocity(prompts, strengths, first.padded_size, run, sigmas[:-1])

        if not first.uses_true_cfg:
            return of(*(one.prompt for one in requests))
        texts = [one.texts for one in requests]
        positive, negative = zip(*texts, strict=True)
        return cfg_velocity(
            one_batch(of(*chain(*texts))) if together else two_passes(of(*positive), of(*negative)),
            sigmas,
            first.true_cfg_scale or 1.0,
            first.cfg_zero,
            first.mimic_scale,
            first.threshold_percentile or PERCENTILE,
            first.cfg_schedule or "constant",
        )

    def velocity(
        self,
        prompts: Sequence[str],
        guidance: Sequence[float],
        size: tuple[int, int],
        run: HookRun | None = None,
        sigmas: Sequence[float] = (),
    ) -> Velocity:
        """The model as `velocity(x, sigma)` for x [B, L, 64]: a prompt and a guidance for each of the B rows.

        size: a request's `padded_size`. sigmas: those that will be asked for, if known.
        """
        txt, vec = (torch.cat(rows) for rows in zip(*map(self.encode, prompts), strict=True))
        ids = image_ids(len(prompts), size[1] // PATCH, size[0] // PATCH, self.device)
        txt_ids = torch.zeros(len(prompts), txt.shape[1], 3, device=self.device)
        strengths = torch.tensor(guidance, device=self.device, dtype=self.dtype)
        replay = not self.fallback.offload  # which takes the weights from under a graph
        flow = flow_velocity(self.model, ids, txt, txt_ids, vec, strengths, run=run, sigmas=sigmas, replay=replay)

        def velocity(x: Tensor, sigma: float) -> Tensor:
            self._turn(self.model)
            return flow(x, sigma)

        return velocity

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """With `offload`: encode at most KNOWN_PROMPTS prompts in one turn, before the text encoders leave."""
        if self.fallback.offload:
            with torch.no_grad():
                self.fallback.run(f"encoding {len(prompts)} prompt(s)", lambda: list(map(self.encode, prompts)))

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        self._turn(self.t5, self.clip)
        txt, vec = self.t5([prompt]), self.clip([prompt])
        for name, encoder, x in (("T5", self.t5, txt), ("CLIP", self.clip, vec)):
            if not is_finite(x):
                raise lost(f"in {name}'s embedding of the prompt", self.dtype, encoder)
        return txt, vec

    def _turn(self, *parts: Any) -> None:
        """With `offload`: the others go back to the CPU, then these parts come to the device."""
        if not self.fallback.offload or self._present == parts:
            return
        self._present = ()  # until all moves are made: one may run out of memory
        every: tuple[Any, ...] = (self.t5, self.clip, self.model, self.ae)
        for part in every:
            if part not in parts:
                _move(part, CPU)
        empty_device_cache(self.device)
        for part in parts:
            _move(part, self.device)
        self._present = parts

    def tokens_of(self, source: Image.Image, width: int, height: int, fit: str = "crop") -> Tensor:
        """The init image, in that size by `fit` (`fields.FITS`), as the tokens of its latent: [1, L, 64]."""
        pixels = torch.from_numpy(np.array(fitted(source, width, height, fit)))
        x = rearrange(pixels.float() / 127.5 - 1, "h w c -> 1 c h w").to(self.device, self.dtype)
        what = f"encoding {width}x{height} pixels"
        return pack(self._with_ae(what, lambda: self.ae.encode(x), lambda: tiles.encode(self.ae, x)))

    def _with_ae(self, what: str, whole: Callable[[], Tensor], in_strips: Callable[[], Tensor]) -> Tensor:
        """Where memory runs out, strips come first: they cost less time than moving the other parts away."""

        def work() -> Tensor:
            self._turn(self.ae)
            return in_strips() if self.fallback.vae_tiling else whole()

        return self.fallback.run(what, work, "vae_tiling", "offload")

    def checked(self, on_step: OnStep | None, velocity: Callable[[HookRun], Velocity], run: HookRun) -> OnStep:
        """`on_step` behind a check of every step's latents. velocity: makes the one that is sampled, for any run."""

        def check(step: Step) -> Tensor | None:
            if not is_finite(step.x):
                raise lost_at_step(step, velocity, run, self.dtype, self.model, self.ae)
            return None if on_step is None else on_step(step)

        return check

    @torch.no_grad()
    def picture(self, x: Tensor, request: GenerationRequest) -> Image.Image:
        """Decode tokens [1, L, 64] to the picture that was asked for, with its request attached."""
        width, height = request.padded_size
        z, what = unpack(x, height, width), f"decoding {width}x{height} pixels"
        pixels = self._with_ae(what, lambda: self.ae.decode(z), lambda: tiles.decode(self.ae, z))[0].float()
        if not is_finite(pixels):
            raise lost("in the decoded picture", self.dtype, self.ae)
        # Rounded to the nearest of 256 levels; the official command cuts off and is darker by half a level.
        levels = rearrange((pixels.clamp(-1, 1) + 1) * 127.5, "c h w -> h w c").round().to(torch.uint8)
        image = Image.fromarray(levels.cpu().numpy())
        return describe(crop_centre(image, request.width, request.height), self.complete(request))


def _move(part: Any, device: torch.device) -> None:
    """Move a part. The transformer's modulation stays on the CPU: its layers come one by one for a table of theirs."""
    if not isinstance(part, Flux):
        part.to(device)
        return
    for name, layer in part.named_modules():
        if not any(layer.children()):
            layer.to(CPU if name.endswith(MODULATION) else device)


def load_pipeline(
    name: str | Variant | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    **files: str | Path | None,
) -> Pipeline:
    """Load a model by name; by itself on the best device there is, in bfloat16 on CUDA, else in float32.

    offload: load it to the CPU, from where each part comes to the device for its turn only. vae_tiling: the autoencoder
    strip by strip, for large pictures. Where memory runs out, both come by themselves. compile: the blocks are compiled
    at their first step, one graph for each kind. files: your own instead of the model's, as `checkpoint.with_files`
    takes them: `model`, `ae`, `clip_l`, `t5xxl`.
    """
    variant = name if isinstance(name, Variant) else with_files(name, **files)
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    check_files(variant)  # a wrong file is told before a text encoder is loaded for it
    empty_device_cache(place)  # of a model that was here before
    fallback = OomFallback(place, offload)

    def load() -> tuple[Flux, AutoEncoder, Any, Any]:
        home = CPU if fallback.offload else place
        encoders = load_text_encoders(variant, home, kind)
        return load_flux(variant, home, kind, wants_fp8(dtype)), load_autoencoder(variant, home, kind), *encoders

    model, ae, t5, clip = fallback.run(f"loading {variant.name}", load, "offload")
    install(model, place)
    install_decode(ae, place)
    hashes = weights_hashes(variant)
    return Pipeline(variant, model, ae, t5, clip, place, kind, hashes, fallback.offload, vae_tiling, compile)
