"""The controls that all tabs share: prompt, model, fields of the request, LoRAs; what a job says; and how to end it."""

from collections.abc import Sequence
from typing import Any

from ..errors import FluxError, UsageError
from ..hooks.intervention import Intervention
from ..images.given import Given, as_taken
from ..images.metadata import read_request
from ..request.fields import FIELDS, PICTURE_FILES
from ..request.generation import GenerationRequest
from ..variants import get_variant
from .controls import QUIET, RANDOM, SCALES, SHOWN, control, default_of, label, request_of, said, values_of
from .desk import Desk

IDLE = ("cfg_zero", "mimic_scale", "threshold_percentile", "cfg_schedule")
"""fields of a request that have no control"""


class Panel:
    """Builds the controls where it is made. `inputs` are their components, and `request(values)` reads their values."""

    def __init__(self, desk: Desk) -> None:
        import gradio as gr

        self.desk, variant = desk, desk.pipeline.variant
        self.prompt = gr.Textbox(
            label="Prompt", info=FIELDS["prompt"].help, lines=1, max_lines=6, autofocus=True, elem_id="prompt"
        )
        self.tokens = gr.HTML(elem_id="tokens")
        self.name = gr.Dropdown(
            desk.names, value=variant.name, label="Model", elem_id="model", visible=len(desk.names) > 1
        )
        with gr.Row():
            self.status = gr.HTML(elem_id="said")
            self.stop = gr.Button("Cancel", elem_id="cancel", variant="stop", min_width=80, scale=0)
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.fields: dict[str, Any] = {}
            for row in SHOWN:
                with gr.Row():
                    self.fields |= {name: control(FIELDS[name], variant) for name in row}
        self.loras = self._sliders() if desk.loras else []
        with gr.Accordion("Draw a picture again", open=False):
            self.picture = gr.Image(label="A PNG of flux_core, for its request", type="filepath", height=140,
                                    sources=["upload", "clipboard"], elem_id="again")  # fmt: skip
        self.inputs = [self.prompt, self.name, *self.fields.values(), *self.loras]
        self._connect()

    def _sliders(self) -> list[Any]:
        import gradio as gr

        with gr.Accordion("LoRAs", open=False):
            return [gr.Slider(-SCALES, SCALES, 0, step=0.05, label=name) for name in self.desk.loras]

    def _connect(self) -> None:
        import gradio as gr

        def stop(request: gr.Request) -> None:
            self.desk.cancel(request.session_hash)

        def again(path: str | None) -> list[Any]:
            return self.filled(path) if path else [gr.skip()] * len(self.filling)

        self.stop.click(stop, **QUIET)
        self.prompt.change(lambda text: said(self.desk.tokens(text)), self.prompt, self.tokens,
                           trigger_mode="always_last", **QUIET)  # fmt: skip
        self.name.change(self._defaults, self.name, [*self.fields.values()], **QUIET)
        self.picture.change(again, self.picture, self.filling, **QUIET)

    def _defaults(self, name: str) -> list[Any]:
        """The values of the fields that are a model's own, after another was chosen."""
        import gradio as gr

        variant = get_variant(name)
        fields = (FIELDS[one] for one in self.fields)
        return [default_of(field, variant) if field.from_variant else gr.skip() for field in fields]

    @property
    def filling(self) -> list[Any]:
        """The components that a recorded request fills."""
        return [self.status, *self.inputs]

    def filled(self, path: str) -> list[Any]:
        """Values for `filling`, of the request in a picture's file: what it was drawn with, and what has no control."""
        import gradio as gr

        try:
            request = read_request(path)
            return [said(self._beside(request)), *self._values(request)]
        except FluxError as error:
            text = str(error).replace(path, "the picture")
            return [said(text, "alert"), *[gr.skip()] * len(self.inputs)]

    def _values(self, request: GenerationRequest) -> list[Any]:
        if request.name not in self.desk.names:
            raise UsageError(
                f"the picture was drawn by {request.name}, and {', '.join(self.desk.names)} is loaded here"
            )
        values = values_of(request)
        scales, _ = self._scales(request)
        return [request.prompt, request.name, *(values[name] for name in self.fields),
                *(scales.get(name, 0) for name in self.desk.loras)]  # fmt: skip

    def _scales(self, request: GenerationRequest) -> tuple[dict[str, float], list[str]]:
        """The sliders' values for a recorded request's LoRAs, and what is said of those that no slider can show."""
        scales: dict[str, float] = {}
        left = []
        for entry in request.loras:
            name, narrow = self.desk.shelf.name_of(entry), entry.steps or entry.blocks or entry.partial or entry.merge
            if name in self.desk.loras and not narrow and abs(scale := scales.get(name, 0) + entry.scale) <= SCALES:
                scales[name] = scale
            else:
                left.append(f"LoRA {entry.settings()}{'' if name else ', whose file is not here'}")
        return scales, left

    def request(
        self,
        values: Sequence[Any],
        plan: Sequence[Intervention] = (),
        source: str | None = None,
        mask: str | None = None,
        again: int | None = None,
        **changes: Any,
    ) -> tuple[GenerationRequest, Given]:
        """The request of `inputs`' values, and its pictures. UsageError, FileError.

        source, mask: files of the picture for the model, and of where it is painted. again: the seed where the control
        says a random one. changes: other fields.
        """
        prompt, name, *others = values
        if name not in self.desk.names:
            raise UsageError(f"{name} is not loaded here")
        fields = dict(zip(self.fields, others, strict=False))
        if again is not None and fields["seed"] == RANDOM:
            fields["seed"] = again
        fields |= changes
        scales = dict(zip(self.desk.loras.values(), others[len(self.fields) :], strict=True))
        given, records = as_taken(get_variant(name), [source] if source else [], mask)
        return request_of(name, fields.pop("prompt", prompt), fields, scales, plan, records), given

    def _beside(self, request: GenerationRequest) -> str:
        """A line on what of a recorded request the controls cannot show."""
        left = [entry.kind for entry in request.hooks]
        left += self._scales(request)[1]
        left += [label(name) for name in IDLE if getattr(request, name) is not None]
        left += [FIELDS[name].flag for name in PICTURE_FILES if getattr(request, name)]
        left += list(request.functions)
        return f"its request is here, but for: {', '.join(left)}" if left else "its request is here"
