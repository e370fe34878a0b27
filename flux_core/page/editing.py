"""Edit: change what the words say and keep the rest, by Stable Flow; with a slider between before and after."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..hooks.layers import VITAL, layers_of
from ..images.given import Given
from ..images.pictures import open_source
from ..request.fields import FIT
from ..request.pictures import InitImage
from ..server.jobs import Job
from .controls import DRAWING, said
from .desk import Desk

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from .panel import Panel

NAME = "Edit"
CHOICES = ("vital", "non-vital", "all", "none")


@dataclass(eq=False)
class Edit(Job):
    """A source and an edit of it, drawn as rows of one batch; both are saved."""

    edits: Sequence[str] = ()
    layers: Sequence[str] = ()
    origin: InitImage | None = None

    def run(self, pipeline: "Pipeline", folder: Path) -> None:
        from ..methods.stable_flow import Editing  # and with it torch

        self.check()
        request = self.requests[0]
        photo = self.source.image
        guidance = None if photo is None or not pipeline.variant.params.guidance_embed else 1.0
        editing = Editing(pipeline, request, self.edits, self.layers, guidance, self.origin, FIT)

        def on_step(step: Any) -> None:
            self.after(pipeline, step)

        x = editing.generated(on_step) if photo is None else editing.of_photo(photo, on_step=on_step)
        for row, branch in enumerate(editing.branches):
            self.save(editing.picture(x[row], row), folder, f"{request.name}_seed{request.seed}_{branch}")


def build(desk: Desk, panel: "Panel") -> None:
    """The tab's components and what they do."""
    import gradio as gr

    variant = desk.pipeline.variant
    known = [choice for choice in CHOICES if variant.name in VITAL or "vital" not in choice]
    gr.Markdown("The prompt says what the source shows; without a photograph the source is drawn from it.")
    wanted = gr.Textbox(label="What the edit should show", lines=1, max_lines=4, elem_id="edit")
    with gr.Row():
        layers = gr.Dropdown(
            known, value=known[0], label="Blocks that share the source's keys and values", elem_id="shared"
        )
        button = gr.Button("Edit", variant="primary", elem_id="start-edit")
    photo = gr.Image(label="Photograph", type="filepath", sources=["upload", "clipboard"], height=200, elem_id="photo")
    compared = gr.ImageSlider(
        label="Source and edit", interactive=False, format="png", type="pil", elem_id="compared",
        buttons=["download", "fullscreen"],
    )  # fmt: skip

    def job_of(visitor: str | None, values: Sequence[Any]) -> Job:
        *shared, wanted, layers, photo = values
        if not (wanted or "").strip():
            raise UsageError("nothing to edit. Next: say what the edit should show")
        source, origin = open_source(photo)
        request, _ = panel.request(shared, again=desk.seed(visitor), num_images=1)
        blocks = layers_of(layers, request.name, request.variant.params)
        return Edit([request], Given(source), True, edits=(wanted,), layers=blocks, origin=origin)

    async def edit(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        visitor = request.session_hash
        async for job, line, wrong in desk.drawn(visitor, lambda: job_of(visitor, values)):
            done = job is not None and job.state == "done"
            pair = tuple(str(path) for path in job.paths) if job is not None and done else gr.skip()
            yield pair, said(line, "alert" if wrong else "status")

    gr.on(
        [button.click, wanted.submit], edit, [*panel.inputs, wanted, layers, photo], [compared, panel.status],
        **DRAWING,
    )  # fmt: skip
