"""Where each word of the prompt looks: ConceptAttention's maps over the picture, by step and block."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ..errors import UsageError
from ..hooks.sites import block_names
from ..request.generation import PATCH, GenerationRequest
from ..server.jobs import Job
from .controls import DRAWING, QUIET, said
from .desk import Desk

if TYPE_CHECKING:
    from ..methods.concept_maps import Words
    from ..pipeline import Pipeline
    from .panel import Panel

IDLE = {
    "a", "an", "the", "of", "and", "with", "in", "on", "at", "to", "is", "are", "left", "right", "above", "below",
    "beside", "behind", "under", "over",
}  # fmt: skip
"""words that look nowhere"""
MOST = 8
"""words that are compared"""
GROUND = "background"
"""a word beside those of the prompt: where none of them is"""
ALL = "all"


class Sight(NamedTuple):
    """A picture and where its words look."""

    image: Image.Image
    words: "Words"
    size: tuple[int, int]
    """of the latents, in tokens: across and down"""

    def heat(self, word: str, step: int, block: str) -> Image.Image:
        """The picture under a word's map. step: counted from 1; 0: of all. UsageError where there is none."""
        from ..methods.concept_maps import overlay

        maps = self.words.maps([step - 1] if step else None, None if block == ALL else [block])
        return overlay(self.image, maps[:, self.words.words.index(word)].reshape(self.size[1], self.size[0]))


@dataclass(eq=False)
class Look(Job):
    """Draws a picture, which is not saved, and keeps where its words look for a visitor."""

    visitor: str | None = None
    into: dict[str | None, Sight] = field(default_factory=dict)
    """the page's, not this job's: the worker remembers many jobs, and maps are large"""

    def run(self, pipeline: "Pipeline", folder: Path) -> None:
        from ..methods.concept_maps import Words  # and with it torch

        self.check()
        request = self.requests[0]
        words = Words(pipeline, words_of(pipeline, request.prompt))
        image = pipeline.draw(request, None, lambda step: self.after(pipeline, step), words.hooks, [words])
        self.check()
        width, height = request.padded_size
        self.into[self.visitor] = Sight(image, words, (width // PATCH, height // PATCH))


def words_of(pipeline: "Pipeline", prompt: str) -> list[str]:
    """The words of a prompt that may look somewhere, each once, and the background. UsageError without any."""
    found = [word for word, _ in pipeline.words(prompt) if word.isalnum() and word.lower() not in IDLE]
    if not found:
        raise UsageError("the prompt has no word that could look anywhere. Next: name a thing")
    return [*dict.fromkeys(found[:MOST]), GROUND]


def build(
    desk: Desk,
    panel: "Panel",
    picture: Any,
    inputs: Sequence[Any],
    request_of: Callable[[str | None, Sequence[Any]], GenerationRequest],
) -> None:
    """The components and what they do. picture: shows what was drawn; request_of: the request of `inputs`' values."""
    import gradio as gr

    params = desk.pipeline.variant.params
    seen: dict[str | None, Sight] = {}
    look = gr.Button("Where do the words look?", elem_id="look")
    word = gr.Radio([], label="Word of the prompt", elem_id="word")
    with gr.Row():
        step = gr.Slider(0, 1, 0, step=1, label="Step", info="0: the mean of all", elem_id="map-step")
        block = gr.Dropdown([ALL, *block_names(params)[: params.depth]], value=ALL, label="Block", elem_id="map-block",
                            info="all: the mean of the later double blocks")  # fmt: skip
    heat = gr.Image(label="Where it looks", interactive=False, type="pil", format="png", elem_id="map",
                    buttons=["download", "fullscreen"])  # fmt: skip

    def shown(sight: Sight, *which: Any) -> tuple[Any, Any]:
        try:
            return sight.heat(*which), gr.skip()
        except UsageError as error:
            return gr.skip(), said(str(error), "alert")

    async def look_at(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        visitor = request.session_hash

        def make() -> Job:
            return Look([request_of(visitor, values)], visitor=visitor, into=seen)

        async for job, line, wrong in desk.drawn(visitor, make):
            told, sight = said(line, "alert" if wrong else "status"), seen.get(visitor)
            if job is None or job.state != "done" or sight is None:
                yield gr.skip(), told, gr.skip(), gr.skip(), gr.skip()
                continue
            words = list(sight.words.words)
            heat, fault = shown(sight, words[0], 0, ALL)
            yield (sight.image, fault if isinstance(fault, str) else told, gr.Radio(words, value=words[0]),
                   gr.Slider(maximum=job.requests[0].num_steps, value=0), heat)  # fmt: skip

    def turned(request: gr.Request, word: str | None, step: float, block: str) -> tuple[Any, Any]:
        sight = seen.get(request.session_hash)
        return (gr.skip(), gr.skip()) if sight is None or not word else shown(sight, word, int(step), block)

    def forget(request: gr.Request) -> None:
        seen.pop(request.session_hash, None)

    look.click(look_at, inputs, [picture, panel.status, word, step, heat], **DRAWING)
    turns = [word.input, step.input, block.input]
    gr.on(turns, turned, [word, step, block], [heat, panel.status], trigger_mode="always_last", **QUIET)
    desk.leaving.append(forget)
