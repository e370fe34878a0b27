"""Layers: leave blocks out or change how much they add, and see at once what they do; and where each word looks."""

import html
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from ..hooks import Scale, Skip
from ..hooks.intervention import Intervention
from ..hooks.layers import IMPORTANCE, VITAL
from ..hooks.sites import block_names, match_blocks
from ..request.generation import GenerationRequest
from ..server.jobs import Job
from ..variants import Variant
from . import looking
from .controls import DRAWING, QUIET, said
from .desk import Desk, enlarged

if TYPE_CHECKING:
    from .panel import Panel

NAME = "Layers"
FEW = 8
"""steps of a picture that is drawn at every change, or the model's own, where these are fewer"""
LARGEST = 2.0
"""factor of a block"""


def blocks_plan(names: Sequence[str], on: Sequence[bool], factors: Sequence[float]) -> list[Intervention]:
    """Blocks that are off, or at factor 0, are skipped; others have their gates times the factor: what a block adds to
    the stream."""
    out = tuple(name for name, there, factor in zip(names, on, factors, strict=True) if not there or factor == 0)
    plan: list[Intervention] = [Skip(blocks=out)] if out else []
    for name, factor in zip(names, factors, strict=True):
        if name not in out and factor != 1:
            plan.append(Scale(sites=(f"{name}.*gate",), value=factor))
    return plan


def build(desk: Desk, panel: "Panel") -> None:
    """The tab's components and what they do."""
    import gradio as gr

    variant = desk.pipeline.variant
    names = block_names(variant.params)
    with gr.Row():
        with gr.Column(min_width=280):
            button = gr.Button("Redraw", variant="primary", elem_id="redraw")
            steps = gr.Slider(1, 50, min(FEW, variant.num_steps), step=1, elem_id="few-steps",
                              label="Steps of this picture", info="few, so that it comes at once")  # fmt: skip
            with gr.Column(elem_id="blocks"):
                rows = [_row(name, variant) for name in names]
            reset = gr.Button("All blocks as they are", elem_id="reset")
        switches, factors = [on for on, _ in rows], [factor for _, factor in rows]
        inputs = [*panel.inputs, steps, *switches, *factors]

        def request_of(visitor: str | None, values: Sequence[Any]) -> GenerationRequest:
            start = len(panel.inputs)
            shared, few, blocks = values[:start], values[start], values[start + 1 :]
            plan = blocks_plan(names, blocks[: len(names)], blocks[len(names) :])
            return panel.request(shared, plan, again=desk.seed(visitor), num_steps=few, num_images=1)[0]

        with gr.Column(min_width=280):
            picture = gr.Image(label="With these blocks", interactive=False, type="pil", format="jpeg",
                               elem_id="layers-picture", buttons=["download", "fullscreen"])  # fmt: skip
            looking.build(desk, panel, picture, inputs, request_of)

    async def redraw(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        visitor = request.session_hash
        async for job, line, wrong in desk.drawn(visitor, lambda: Job([request_of(visitor, values)], watched=True)):
            done = job is not None and job.over.is_set() and job.paths
            shown = None if job is None else str(job.paths[-1]) if done else enlarged(job)
            yield shown or gr.skip(), said(line, "alert" if wrong else "status")

    changes = [*(on.input for on in switches), *(factor.release for factor in factors), steps.release]
    gr.on([button.click, *changes], redraw, inputs, [picture, panel.status], trigger_mode="always_last", **DRAWING)
    reset.click(lambda: [True] * len(names) + [1.0] * len(names), None, [*switches, *factors], **QUIET)


def _row(name: str, variant: Variant) -> tuple[Any, Any]:
    """A block's switch and factor, and a bar of its importance, where a study is known."""
    import gradio as gr

    params, short = variant.params, html.escape(name.replace("_blocks.", " "))
    measured = dict(zip(block_names(params), IMPORTANCE.get(variant.name, ()), strict=False))
    vital = name in match_blocks(VITAL[variant.name], params) if variant.name in VITAL else False
    with gr.Row(elem_classes="block-row"):
        on = gr.Checkbox(True, label=short, min_width=110, scale=0, container=False, elem_id=f"on-{name}")
        factor = gr.Slider(0, LARGEST, 1, step=0.1, label=f"how much {short} adds", show_label=False, container=False,
                           min_width=120, elem_id=f"factor-{name}")  # fmt: skip
        if name in measured:
            told = f"importance of {short}: {measured[name]:.2f}{', vital' if vital else ''}"
            gr.HTML(f'<meter min="0" max="1" value="{measured[name]}" title="{told}" aria-label="{told}"></meter>',
                    min_width=60, container=False)  # fmt: skip
    return on, factor
