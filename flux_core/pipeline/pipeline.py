"""A loaded model that draws: text -> noise -> denoising -> picture.

Images are drawn one at a time, unless `draw_rows` is asked for: a batch of four and four batches of one differ in their
last bits, and a request must give the same pixels however many images it is drawn with. A row's request says how many
rows there were.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from ..device.budget import Budget
from ..device.choice import dtype_name
from ..device.memory import CACHED_PROMPTS
from ..device.oom import CPU, OomFallback, fewer_rows
from ..errors import UsageError
from ..hooks import Intervention, Lora, check_plan
from ..hooks.plan import listed
from ..images.given import NOTHING, Given, Picture, natural_size, open_given, size_notes
from ..images.masks import Canvas
from ..images.metadata import describe
from ..images.pictures import crop_centre
from ..kernels import describe as functions_of
from ..linears.formats import format_of
from ..lora import Handle, attached
from ..model import AutoEncoder, Flux
from ..model.tiny import TinyDecoder
from ..request.batch import check_rows, numbered
from ..request.fields import kind_of_attention
from ..request.generation import GenerationRequest
from ..sampling import OnStep
from ..text import TextEncoder
from ..variants import Variant
from .by_hand import ByHand
from .codec import Codec
from .components import Components
from .conditions import Condition
from .denoiser import Denoiser, row_by_row
from .environment import environment
from .family import tokens_behind
from .kept_embeddings import KeptEmbeddings
from .loras import Loras, record_of
from .placement import Placement
from .prompt_cache import PromptCache
from .streamed import Streamed


class Pipeline(ByHand):
    """One loaded model on one device.

    `t5.notes(prompt)` are lines on what t5 does not read of a prompt. With `offload` text encoders, transformer and
    autoencoder take turns on the device; with `vae_tiling` the autoencoder works in strips. Where memory runs out, both
    are switched on (`device/oom.py`).
    """

    def __init__(
        self,
        variant: Variant,
        components: Components,
        device: torch.device,
        dtype: torch.dtype,
        weights: dict[str, str] | None = None,
        offload: bool = False,
        vae_tiling: bool = False,
        compile: bool = False,
        kept: KeptEmbeddings | None = None,
        budget: Budget | None = None,
    ) -> None:
        """kept: where embeddings are kept on the disk. budget: memory that it may take."""
        self.variant, self.components, self.dtype, self.weights = variant, components, dtype, weights or {}
        self.precision = format_of(components.flux) or dtype_name(dtype)
        """the precision as requests name it; `dtype` is that of everything but Linears in few bits"""
        self.t5_precision: str | None = getattr(components.t5, "precision", None)
        """T5's, likewise; None for a T5 that is not ours"""
        self.given = NOTHING
        """pictures of requests that are drawn without any of their own: a study's or an exploration's"""
        self.tiny: TinyDecoder | None = None
        """decodes previews, where somebody has one (`checkpoint/tiny.py`)"""
        self.fallback, self.compiled = OomFallback(device, offload, vae_tiling), compile
        streams = budget is not None and device != CPU
        self.placement = (Streamed if streams else Placement)(components, self.fallback, budget)  # type: ignore[arg-type]
        self.loras, self.codec = Loras(components), Codec(self.placement, dtype)
        self.prompts = PromptCache(self.placement, dtype, self.loras.text_key, self.loras.name_tokens, kept)
        self.denoiser = Denoiser(variant, self.prompts, self.codec, self.loras, dtype)
        if compile:
            for block in (*self.model.double_blocks, *self.model.single_blocks):
                block.compile(fullgraph=True)

    @property
    def model(self) -> Flux:
        return self.components.flux

    @property
    def ae(self) -> AutoEncoder:
        return self.components.ae

    @property
    def t5(self) -> Any:
        return self.components.t5

    @property
    def clip(self) -> Any:
        return self.components.clip

    @property
    def device(self) -> torch.device:
        return self.fallback.device

    @property
    def attention(self) -> str:
        """`exact`, or in which eight bits."""
        return kind_of_attention(functions_of(self.model)["attention"])

    def generate(
        self,
        prompt: str | GenerationRequest,
        seed: int | None = None,
        *,
        init_image: Picture | None = None,
        mask: Picture | None = None,
        control: Picture | None = None,
        reference: Picture | Sequence[Any] | None = None,
        controlnet: Sequence[Sequence[Any]] | None = None,
        on_step: OnStep | None = None,
        plan: Intervention | Sequence[Intervention] | None = None,
        **fields: Any,
    ) -> list[Image.Image]:
        """The pictures of a request, or of a prompt and the request's other fields.

        Each image carries its own request: `image.info["flux_core"]` (JSON) and `image.info["parameters"]`.
        Notes for the user (a size that is cropped, a prompt that is too long) are Python warnings.
        `plan`: interventions of `flux_core.hooks`, after those of the request. What has a JSON form becomes part of it.
        `init_image`, `mask`, `control`, `reference`: files or pictures, and `controlnet`, with files of ControlNets:
        `[("union.safetensors", "canny:photo.png", 0.7, (0, 0.8), "canny")]`; all as in `images.given.open_given`.
        """
        plan = listed(plan)
        functions = [entry for entry in plan if entry.is_code]
        pictures, records = open_given(init_image, mask, control, reference, controlnet, self.variant)
        given = dict(prompt) if isinstance(prompt, GenerationRequest) else {"prompt": prompt}
        fields |= {"seed": seed, "functions": (), **records}
        fields["plan"] = [*given.get("plan", ()), *(entry for entry in plan if not entry.is_code)]
        changes = {key: value for key, value in fields.items() if value is not None}
        fields = {"name": self.variant.name, **given, **changes}
        request = GenerationRequest(**natural_size(fields, pictures, self.variant), **fields)
        texts = [line for text in request.texts for line in self.text_notes(text, request.loras)]
        for line in [*request.notes(), *size_notes(request, pictures), *texts]:
            warnings.warn(line, stacklevel=2)
        images = enumerate(request.images())
        return [self.draw(one, pictures, on_step, functions, (), number) for number, one in images]

    def load_lora(
        self, file: str | Path, scale: float = 1.0, allow_partial: bool = False, merge: bool = False
    ) -> Handle:
        """Attach a LoRA to transformer and text encoders, for all pictures until its handle is removed.

        file: a safetensors file, a folder that a trainer wrote, or a hub id. `handle.scale` may be set at any time; the
        handle is a context manager, too. allow_partial: apply what matches. merge: write it into the weights. Errors
        as in `lora.attach`.
        """
        return self.loras.load(file, scale, allow_partial, merge)

    @torch.no_grad()
    def encode_ahead(self, requests: Sequence[GenerationRequest], last: bool = False) -> None:
        """Where parts take turns: encode the texts of requests, CACHED_PROMPTS at most, in one turn. MemoryShortage.

        last: these are all texts from now on. Then T5 is freed on every device, unless a LoRA is on it. A text that
        comes nevertheless loads it again.
        """
        texts = {(text, request.loras) for request in requests for text in request.texts}
        last = last and len(texts) <= CACHED_PROMPTS and len({request.loras for request in requests}) == 1

        def work() -> None:
            for request in requests:
                self.loras.prepare(request.loras, (1.0, 0.0))
                for text in request.texts:
                    self.prompts(text)

        if self.fallback.offload or last:
            self.fallback.run(f"encoding {len(requests)} prompt(s)", work, "offload")
        if last:
            self.free_t5()

    def free_t5(self) -> None:
        """Free T5's memory. It is loaded again for the next text that was not encoded yet.

        A T5 with a LoRA on it stays, and one that did not come from `load_pipeline`.
        """
        model = getattr(self.t5, "model", None)
        if isinstance(self.t5, TextEncoder) and model is not None and not attached(model):
            self.placement.free(self.t5)

    def text_notes(self, prompt: str, loras: Sequence[Lora] = ()) -> list[str]:
        """Lines for people on what T5 drops of a prompt or cannot read; none when it reads all.

        loras: of the request, whose trained tokens it can read. FileError.
        """
        notes = getattr(self.t5, "notes", None)  # a plain function has none
        if notes is None:
            return []
        before, self.t5.trained = getattr(self.t5, "trained", None), self.loras.words(loras)
        try:
            return list(notes(prompt))
        finally:
            self.t5.trained = before

    def complete(
        self, request: GenerationRequest, functions: Sequence[Intervention] = (), given: Given | None = None
    ) -> GenerationRequest:
        """The request as this pipeline draws it: its LoRAs by their hashes, with dtype, weights and environment.

        given: its pictures, by default the pipeline's. UsageError if it cannot, or if the functions do not fit its
        plan.
        """
        if functions:
            whole = (*request.hooks, *functions)
            check_plan(whole, self.variant.params, request.num_forward_steps, request.branches)
        if request.name != self.variant.name:
            raise UsageError(f"the request is for {request.name}, but {self.variant.name} is loaded")
        if request.dtype not in (None, self.precision):
            raise UsageError(f"the request is for {request.dtype}, but the model is loaded in {self.precision}")
        if request.t5_dtype not in (None, self.t5_precision):
            raise UsageError(f"the request is for T5 in {request.t5_dtype}, but it is loaded in {self.t5_precision}")
        plan = tuple(record_of(entry) if isinstance(entry, Lora) else entry for entry in request.plan)
        request = request.model_copy(update={"plan": plan})
        dtypes = {"dtype": self.precision, "t5_dtype": self.t5_precision}
        drawn_by = {**dtypes, "weights": self.weights, "compiled": self.compiled}
        behind = tokens_behind(request, given or self.given, self.denoiser.redux)
        found = environment(self.placement, request, functions, self.loras.branched(request.loras), behind)
        return request.model_copy(update={**drawn_by, "environment": found})

    @torch.no_grad()
    def draw(
        self,
        request: GenerationRequest,
        source: Image.Image | Given | None = None,
        on_step: OnStep | None = None,
        functions: Sequence[Intervention] = (),
        conditions: Sequence[Condition] = (),
        image: int = 0,
    ) -> Image.Image:
        """The picture of a request for a single image. `source`: its init image, RGB, of any size, or all its pictures.

        `functions` are added to the request's plan, `conditions` to its prompt. `image`: what hooks are told as
        `at.image`. A request that was a row of a batch is drawn as that row again, and the others are copies of it.
        """
        batch = request.batch
        if batch is None:
            return self._drawn([request], source, on_step, functions, conditions, image)[0]
        told = [on_step if row == batch.row else None for row in range(batch.rows)]
        copies = [request] * batch.rows
        with fewer_rows("1, which draws it alone"):
            return self._drawn(copies, source, row_by_row(told), functions, conditions, image, batch.row)[0]

    @torch.no_grad()
    def draw_rows(
        self,
        requests: Sequence[GenerationRequest],
        source: Image.Image | Given | None = None,
        on_steps: Sequence[OnStep | None] = (),
        functions: Sequence[Intervention] = (),
        image: int = 0,
    ) -> list[Image.Image]:
        """The pictures of requests that differ in prompt, seed and guidance alone, drawn as rows of one batch.

        on_steps: of each request. The others as for `draw`. Faster where one row leaves the device idle. Last bits
        differ from those of a picture drawn alone, so each records its batch. UsageError for none, and for
        what cannot share one.
        """
        if not requests or len(on_steps) not in (0, len(requests)):
            raise UsageError(f"draw_rows has {len(requests)} requests and {len(on_steps)} callbacks: give one for each")
        if len(requests) == 1:
            return [self.draw(requests[0], source, next(iter(on_steps), None), functions, (), image)]
        check_rows((*requests[0].hooks, *functions), self.variant.params, len(requests))
        on_step = row_by_row(on_steps) if on_steps else None
        with fewer_rows(str(len(requests) // 2)):
            return self._drawn(numbered(requests), source, on_step, functions, (), image)

    def _drawn(
        self,
        requests: Sequence[GenerationRequest],
        source: Image.Image | Given | None,
        on_step: OnStep | None,
        functions: Sequence[Intervention],
        conditions: Sequence[Condition],
        image: int,
        only: int | None = None,
    ) -> list[Image.Image]:
        """The pictures of the rows of one batch; `only`: that of one row."""
        given = self.given if source is None else Given.of(source)
        requests = [self.complete(request, functions, given) for request in requests]
        first, several = requests[0], "" if len(requests) == 1 else f"{len(requests)} pictures of "
        given.check(first)
        given, canvas = given.on_canvas(first)
        what = f"drawing {several}{first.width}x{first.height} pixels"

        def work() -> Tensor:
            return self.denoiser.denoise(requests, given, on_step, functions, conditions, image)

        own = self.loras.own_entries()  # before the work: a file that is gone cannot be recorded
        x = self.fallback.run(what, work, "offload")
        rows = zip([x] if len(requests) == 1 else x.split(1), requests, strict=True)
        return [
            self._decoded(x, request.recorded([*functions, *own]), canvas)
            for row, (x, request) in enumerate(rows)
            if only in (None, row)
        ]

    @torch.no_grad()
    def picture(self, x: Tensor, request: GenerationRequest, source: Image.Image | Given | None = None) -> Image.Image:
        """The picture of a request, decoded from tokens [1, L, 64], with the request attached. UsageError for rows.

        source: the request's pictures: what is painted in a part of one is put back into it.
        """
        if x.shape[0] != 1:
            raise UsageError(f"a request is for one picture, and these are {x.shape[0]} rows. Next: pipeline.decode(x)")
        given = self.given if source is None else Given.of(source)
        return self._decoded(x, self.complete(request, (), given).recorded(), given.on_canvas(request)[1])

    def _decoded(self, x: Tensor, request: GenerationRequest, canvas: Canvas | None = None) -> Image.Image:
        image = crop_centre(self.codec.decode(x, *request.padded_size), request.width, request.height)
        return describe(image if canvas is None else canvas.finished(image), request)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Pipeline cannot be pickled or copied: it holds a device and its weights. "
            "Next: call load_pipeline in each process"
        )
