"""What a training run shows: its losses as a picture and as CSV, sheets of samples, and what it changed."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from ..methods.charts import CELL, contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS, VALIDATION, BEST, RATE = "#3b6fb6", "#d9822b", "#b02a37", "#777777"
"""colours of curves, and of the best point"""
KINDS = {"transformer_blocks": "double blocks", "single_transformer_blocks": "single blocks"}
"""diffusers' name -> the title above the blocks' columns"""
OTHERS = "others"
"""the title above the modules outside the blocks"""
IN_BLOCK = re.compile(rf"({'|'.join(KINDS)})\.(\d+)\.(.+)")
CELLS, DPI = 0.24, 110
"""of charts: inches of a heat map's cell, and pixels of an inch"""


class LossRow(NamedTuple):
    """A step in the table of losses. What was not measured is None."""

    step: int
    """steps that are done; 0 is before the first"""
    loss: float | None
    rate: float | None
    norm: float | None
    """of the gradient before it is clipped"""
    validation: float | None


def loss_csv(rows: Iterable[LossRow]) -> str:
    """The table as CSV. A number is written so that reading it gives the same bits."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(LossRow._fields)
    writer.writerows(rows)
    return table.getvalue()


def window_of(steps: int) -> int:
    """How many of the last steps a running mean is of, in a run of so many: a tenth of them, at most 100."""
    return max(1, min(100, steps // 10))


def running_mean(losses: Sequence[float], window: int) -> list[float]:
    """The mean of each step and those before it, `window` in all; of fewer at the start."""
    spans = (losses[max(0, end - window) : end] for end in range(1, len(losses) + 1))
    return [math.fsum(span) / len(span) for span in spans]


def best_step(validated: Mapping[int, float]) -> int:
    """The step of the least validation loss, the first of equal ones."""
    return min(validated, key=lambda step: (validated[step], step))


def loss_chart(losses: Sequence[float], rates: Sequence[float], validated: Mapping[int, float], title: str) -> bytes:
    """A PNG of a run: losses and their running mean, validation losses with the best one named, and the rate.

    losses, rates: of each step. validated: losses of held-out pictures, by the steps done before; in a panel of their
    own, since they are of other noise levels than the losses of steps.
    """
    heights = [3, 2, 0.5] if validated else [3, 0.5]
    figure = _figure(7.5, 1.1 * sum(heights) + 0.8)
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    steps, window = range(1, len(losses) + 1), window_of(len(losses))
    panels[0].plot(steps, losses, color=LOSS, alpha=0.25, linewidth=0.8, label="loss of a step")
    panels[0].plot(steps, running_mean(losses, window), color=LOSS, linewidth=2, label=f"mean of the last {window}")
    panels[0].legend(frameon=False, fontsize=8, loc="upper right")
    panels[0].set_title(title, fontsize=10, parse_math=False)
    panels[0].set_ylabel("loss")
    last = max([1, len(losses), *validated])
    if validated:
        points, best = sorted(validated.items()), best_step(validated)
        panels[1].plot(*zip(*points, strict=True), color=VALIDATION, marker="o", markersize=4, linewidth=1.5)
        panels[1].plot(best, validated[best], color=BEST, marker="o", markersize=9, zorder=3, clip_on=False)
        side = "left" if best < 0.1 * last else "right" if best > 0.9 * last else "center"
        panels[1].annotate(
            f"best: step {best}", (best, validated[best]), (0, -9), textcoords="offset points", ha=side, va="top",
            fontsize=9, fontweight="bold",
        )  # fmt: skip
        panels[1].margins(y=0.3)
        panels[1].set_ylabel("validation")
    highest = max(rates, default=0.0)
    panels[-1].plot(range(1, len(rates) + 1), rates, color=RATE, linewidth=1.2)
    panels[-1].set_yticks([0, highest] if highest else [0], ["0", f"{highest:g}"] if highest else ["0"])
    panels[-1].set_ylim(0, 1.2 * highest or 1)
    panels[-1].set_ylabel("rate")
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(0, last)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels(panels)
    return _png(figure)


def change_chart(changes: Sequence[tuple[str, float]], title: str) -> bytes:
    """A PNG of how much was changed, and where: a heat map with a column for each block, a row for each kind of module.

    changes: |difference| / |weight| of each module, by diffusers' names, as `Adapter.changes` gives them.
    """
    cells = {place_of(name): value for name, value in changes}
    rows = sorted({row for _, _, row in cells})
    columns = [(kind, sorted({number for found, number, _ in cells if found == kind})) for kind in (*KINDS, OTHERS)]
    columns = [(kind, numbers) for kind, numbers in columns if numbers]
    widths = [max(2, len(numbers)) for _, numbers in columns]
    figure = _figure(max(6, CELLS * sum(widths) + 3.5), max(2.4, CELLS * len(rows) + 1.4))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, (kind, numbers) in zip(panels, columns, strict=True):
        values = [[100 * cells.get((kind, number, row), math.nan) for number in numbers] for row in rows]
        image = panel.imshow(values, cmap="viridis", vmin=0, vmax=100 * max(cells.values()) or 1, aspect="auto")
        panel.set_facecolor("#e6e6e6")  # behind cells without a module that learned
        panel.set_xticks(range(len(numbers)), ["" if kind == OTHERS else number for number in numbers], fontsize=7)
        panel.set_yticks(range(len(rows)), rows, fontsize=8)
        panel.tick_params(length=0)
        panel.set_title(KINDS.get(kind, kind), fontsize=9)
        panel.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=panels, label="change of the weight, %", pad=0.01)
    return _png(figure)


def place_of(name: str) -> tuple[str, int, str]:
    """Where the chart of changes has a module of diffusers' names: kind of block, block, and row."""
    found = IN_BLOCK.fullmatch(name)
    return (found[1], int(found[2]), found[3]) if found else (OTHERS, 0, name)


def sample_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], prompts: Sequence[str]) -> Image.Image:
    """A sheet with a column for each prompt and a row for each label, such as the steps done: `0`, `100`, or `base`.

    It keeps the pictures' XMP mark.
    """
    first = rows[0][1][0]
    sheet = contact_sheet(rows, prompts, min(CELL, max(first.size)))
    if "xmp" in first.info:
        sheet.info["xmp"] = first.info["xmp"]
    return sheet


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches, which no window shows. ModuleNotFoundError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: "Figure") -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()
