"""Explore: a grid of pictures over one field or two, which grows as it is drawn."""

from collections.abc import AsyncIterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..request.fields import FIELDS
from ..server.jobs import Job
from .controls import DRAWING, QUIET, label, said
from .desk import Desk

if TYPE_CHECKING:
    from .panel import Panel

NAME = "Explore"
AXES = ("seed", "num_steps", "guidance", "true_cfg_scale", "prompt", "width", "height")
NONE = "none"
MOST = 64
"""pictures of a grid"""


def cells(axes: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The fields of each cell, row by row. axes: a field's name and its values, parted by commas (prompts by lines).
    UsageError."""
    given = [(name, _values(name, text)) for name, text in axes if name != NONE]
    if not given:
        raise UsageError("nothing to explore. Next: choose what varies, as in seed with 1, 2, 3")
    if len({name for name, _ in given}) < len(given):
        raise UsageError(f"both axes are {label(given[0][0])}. Next: another for one of them")
    if (number := len(list(product(*(values for _, values in given))))) > MOST:
        raise UsageError(f"these are {number} pictures, at most {MOST} are drawn here. Next: python cli.py explore")
    return [dict(zip([name for name, _ in given], found, strict=True)) for found in product(*(x for _, x in given))]


def _values(name: str, text: str) -> list[Any]:
    parts = [part.strip() for part in (text or "").split("\n" if name == "prompt" else ",")]
    values = [FIELDS[name].parse(part) for part in parts if part]
    if not values:
        raise UsageError(f"{label(name)} has no values. Next: {'a prompt a line' if name == 'prompt' else '1, 2, 3'}")
    return values


def told(cell: dict[str, Any]) -> str:
    """A cell's caption."""
    return ", ".join(f"{label(name)} {value}" if name != "prompt" else str(value) for name, value in cell.items())


def build(desk: Desk, panel: "Panel") -> None:
    """The tab's components and what they do."""
    import gradio as gr

    shown = [("nothing", NONE), *((label(name), name) for name in AXES)]
    axes = []
    for number, (first, values) in enumerate((("seed", "1, 2, 3"), (NONE, ""))):
        with gr.Row():
            which = "Down" if number == 0 else "Across"
            axes += [gr.Dropdown(shown, value=first, label=which, elem_id=f"axis-{number}"),
                     gr.Textbox(values, label=f"{which}: values, parted by commas (prompts by lines)", lines=1,
                                max_lines=6, elem_id=f"values-{number}")]  # fmt: skip
    button = gr.Button("Explore", variant="primary", elem_id="explore")
    grid = gr.Gallery(label="Choose one for its request", columns=3, interactive=False, object_fit="contain",
                      allow_preview=False, elem_id="grid")  # fmt: skip

    async def explore(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        shared, (down, downs, across, acrosses) = values[:-4], values[-4:]
        found: list[dict[str, Any]] = []
        visitor = request.session_hash

        def make() -> Job:
            found[:] = cells([(down, downs), (across, acrosses)])
            again = desk.seed(visitor)
            return Job([panel.request(shared, again=again, num_images=1, **cell)[0] for cell in found])

        async for job, line, wrong in desk.drawn(visitor, make):
            text = said(line, "alert" if wrong else "status")
            if job is None:
                yield gr.skip(), text
                continue
            columns = len({str(cell.get(across)) for cell in found})
            pictures = [(str(path), told(cell)) for path, cell in zip(job.paths, found, strict=False)]
            yield gr.Gallery(pictures, columns=columns), text

    button.click(explore, [*panel.inputs, *axes], [grid, panel.status], **DRAWING)

    def chosen(event: gr.SelectData) -> list[Any]:
        return panel.filled(desk.picture(event.value["image"]["path"]))

    grid.select(chosen, None, panel.filling, **QUIET)
