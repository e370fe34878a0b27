"""Charts and contact sheets of results: an importance study's bars, and labelled grids of pictures."""

import io
from collections.abc import Sequence
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from .importance import Row

COLOURS = {"double_blocks": "#3b6fb6", "single_blocks": "#d9822b"}
MARGIN = 4
COLUMNS, CELL = 8, 256
"""of a labelled grid: pictures in a row, and the most pixels of a picture's longer side"""
GAP = 0.8
"""space between the bars of the two kinds"""


def importance_chart(rows: Sequence[Row], vital: Sequence[str], cut: float, title: str, other: float | None) -> bytes:
    """A PNG: a bar with confidence interval for each block, coloured by kind, and a line at the cut.

    Blocks that are not vital are pale. other: the importance of changing the seed, drawn as a line for scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, 0.24 * len(rows) + 2), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = [row.layer + GAP * row.block.startswith("single") for row in rows]
    for kind, colour in COLOURS.items():
        of_kind = [row for row in rows if row.block.startswith(kind)]
        axes.bar(
            [positions[row.layer] for row in of_kind],
            [row.importance for row in of_kind],
            yerr=[row.ci95 for row in of_kind],
            color=[colour if row.block in vital else f"{colour}66" for row in of_kind],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#444444"},
        )
        axes.bar(0, 0, color=colour, label=kind.replace("_", " "))
    axes.axhline(cut, color="#b02a37", linewidth=1, linestyle="--", label=f"cut {cut:.3f}")
    if other is not None:
        axes.axhline(other, color="#777777", linewidth=1, linestyle=":", label=f"another seed {other:.3f}")
    axes.set_xticks(positions, [row.block.rpartition(".")[2] for row in rows])
    axes.tick_params(axis="x", labelsize=8 if len(rows) < 30 else 6)
    axes.set_ylabel("1 - mean similarity")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], heads: Sequence[str], side: int = 128
) -> Image.Image:
    """Pictures in labelled rows under labelled columns, each scaled to fit `side` pixels."""
    font = ImageFont.load_default(11)
    left = 2 * MARGIN + max(int(font.getlength(line)) for label, _ in rows for line in label.split("\n"))
    top = 2 * MARGIN + 30
    sheet = Image.new("RGB", (left + len(heads) * (side + MARGIN), top + len(rows) * (side + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        draw.text((left + i * (side + MARGIN), MARGIN), _wrap(head, font, side), fill="black", font=font)
    for j, (label, pictures) in enumerate(rows):
        y = top + j * (side + MARGIN)
        draw.text((MARGIN, y + side // 2 - 12), label, fill="black", font=font)
        for i, picture in enumerate(pictures):
            small = picture.copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + i * (side + MARGIN), y))
    return sheet


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], heads: Sequence[str], title: str
) -> Image.Image:
    """A sheet of pictures of one size with labelled rows and columns; long rows are split into bands of COLUMNS.

    title: a line above the bands. The sheet keeps the pictures' XMP mark.
    """
    side = min(max(rows[0][0].size), CELL)
    names = ["\n".join(wrap(label, 24, max_lines=4, placeholder=" …")) for label in labels]
    bands = []
    for i in range(0, len(heads), COLUMNS):
        band = [(name, pictures[i : i + COLUMNS]) for name, pictures in zip(names, rows, strict=True)]
        bands.append(contact_sheet(band, heads[i : i + COLUMNS], side))
    font = ImageFont.load_default(13)
    width, top = max(band.width for band in bands), 2 * MARGIN + 16
    sheet = Image.new("RGB", (width, top + sum(band.height for band in bands)), "white")
    draw, lines = ImageDraw.Draw(sheet), _wrap(title, font, width - 2 * MARGIN).split("\n")
    draw.text((MARGIN, MARGIN), lines[0] + (" …" if lines[1:] else ""), fill="black", font=font)
    for sheet_of_band in bands:
        sheet.paste(sheet_of_band, (0, top))
        top += sheet_of_band.height
    sheet.info["xmp"] = rows[0][0].info["xmp"]
    return sheet


def _wrap(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> str:
    """The text in at most two lines of that width in pixels; the rest is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < 2:
            lines.append(word)
        else:
            lines[-1] += "…"
            break
    return "\n".join(lines)
