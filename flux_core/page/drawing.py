"""Draw: the picture as it comes, step by step, and those that were drawn before."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ..request.fields import FIELDS
from ..server.jobs import Job
from .controls import DRAWING, QUIET, control, said
from .desk import Desk, enlarged

if TYPE_CHECKING:
    from .panel import Panel

NAME = "Draw"


def build(desk: Desk, panel: "Panel") -> None:
    """The tab's components and what they do."""
    import gradio as gr

    with gr.Row():
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        typed = gr.Checkbox(label="Draw as I type", elem_id="typed", scale=0, min_width=160)
    picture = gr.Image(label="Picture", interactive=False, type="pil", format="jpeg", elem_id="picture",
                       buttons=["download", "fullscreen"])  # fmt: skip
    with gr.Accordion("Start from a picture", open=False):
        source = gr.Image(
            label="Picture for the model" if desk.takes else "Init image", type="filepath", height=200,
            sources=["upload", "clipboard"], elem_id="init",
        )  # fmt: skip
        mask = gr.Image(label="Mask: white is painted anew, black is kept", type="filepath", height=200,
                        sources=["upload", "clipboard"], elem_id="mask")  # fmt: skip
        start = [control(FIELDS[name], desk.pipeline.variant) for name in ("strength", "fit")]
    history = gr.Gallery(
        desk.recent, label="Drawn before: choose one for its request", columns=6, height=220, interactive=False,
        object_fit="contain", allow_preview=False, elem_id="history",
    )  # fmt: skip

    async def draw(*values: Any) -> AsyncIterator[Any]:
        *shared, path, masked, strength, fit, visitor = values
        starts = path and not (desk.takes.control or desk.takes.pictures)
        given = {"strength": strength, "fit": fit} if starts else {}

        def make() -> Job:
            request, image = panel.request(shared, source=path, mask=masked, **given)
            return Job(request.images(), image, watched=True)

        async for job, line, wrong in desk.drawn(visitor, make):
            told = said(line, "alert" if wrong else "status")
            if job is None:
                yield gr.skip(), told, gr.skip()
            elif job.over.is_set() and job.paths:
                yield str(job.paths[-1]), told, desk.recent()
            else:
                yield enlarged(job) or gr.skip(), told, gr.skip()

    async def start_drawing(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        async for found in draw(*values, request.session_hash):
            yield found

    async def start_typed(request: gr.Request, on: bool, *values: Any) -> AsyncIterator[Any]:
        if on:
            async for found in draw(*values, request.session_hash):
                yield found

    inputs, outputs = [*panel.inputs, source, mask, *start], [picture, panel.status, history]
    gr.on([button.click, panel.prompt.submit], start_drawing, inputs, outputs, trigger_mode="multiple", **DRAWING)
    panel.prompt.input(start_typed, [typed, *inputs], outputs, trigger_mode="always_last", **DRAWING)

    def chosen(event: gr.SelectData) -> list[Any]:
        return panel.filled(desk.picture(event.value["image"]["path"]))

    history.select(chosen, None, panel.filling, **QUIET)
