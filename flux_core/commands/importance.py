"""`importance`: measure which blocks matter; writes a table, a chart, contact sheets, and the layers for `edit`.

With torchrun, every process draws the next pictures that no other process has claimed. Rank 0 also draws what a
process that died had claimed, and writes the results.
"""

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import DiskError, UsageError
from ..files import prepare_folder, write_whole
from ..hub.places import SCORER
from ..images.given import natural_size, pop_given, size_notes, with_image
from ..methods.importance import (
    REFERENCE,
    Study,
    Task,
    choose,
    csv_of,
    default_prompts,
    json_rows,
    other_seeds,
    read_prompts,
    rows_of,
    similarities,
)
from ..request.batch import check_rows, mixing
from ..request.fields import DEVICE, FILES, LOADING, THREADS, pop_fields
from ..request.generation import GenerationRequest
from ..request.plans import given_plan
from ..session.folder import PNG_BYTES
from ..session.sharing import own_gpu
from ..terminal import no_bars, note, tell
from ..vision.maps import check_maps
from .loras import checked_plan, entries_of
from .table import IMPORTANCE

if TYPE_CHECKING:
    from ..methods.importance import Row
    from ..methods.scoring import Scorer

_FIELDS = {field.name: field for field in IMPORTANCE}
HUB_SCORER = "facebook/dinov2-base"
PROMPTS_ON_A_SHEET = 8
WAIT = 5.0
"""seconds between two looks at what other processes are drawing"""


def importance(
    name: str | None = None,
    prompts: str | None = None,
    limit: str | None = None,
    seeds: str = str(_FIELDS["seeds"].default),
    batch: str | None = None,
    scorer: str | None = None,
    pooling: str = _FIELDS["pooling"].default,
    top: str | None = None,
    threshold: str | None = None,
    output_dir: str | None = None,
    device: str = DEVICE.default,
    offload: bool = False,
    vae_tiling: bool = False,
    threads: str | None = None,
    **fields: Any,
) -> Path:
    """Draw what is missing of a study, score it and write its results. Returns its folder.

    UsageError for wrong flags, FileError for files that cannot be read, DiskError.
    """
    if top is not None and threshold is not None:
        raise UsageError("--top and --threshold are two ways to choose: give one of them")
    pool, count, cut = (
        _FIELDS[key].parse(text) for key, text in (("pooling", pooling), ("top", top), ("threshold", threshold))
    )
    num_threads, loading = THREADS.parse(threads), pop_fields(fields, LOADING)
    variant = with_files(name, **pop_fields(fields, FILES))
    known, most = read_prompts(prompts or default_prompts(variant.name)), _FIELDS["limit"].parse(limit)
    if most is not None and most > len(known):
        note(f"--limit {most}: there are {len(known)} prompts, and all of them are taken")
    chosen = known[:most]
    given = given_plan(fields)
    pictures, records = pop_given(with_image(fields, fields.pop("image", None), variant), variant)
    fields |= {**records, **natural_size(fields, pictures, variant)}
    fields |= {"seed": 0, "plan": (*checked_plan(given, variant), *entries_of(fields, variant))}
    fields.setdefault("num_steps", _FIELDS["num_steps"].default)
    request = GenerationRequest(name=variant.name, prompt=chosen[0].prompt, **fields)
    pictures.check(request)
    check_maps(name for name, _ in pictures.maps(request))
    rows = _FIELDS["batch"].parse(batch, 1 if mixing(request.hooks, variant.params) else None)
    check_rows(request.hooks, variant.params, rows)
    study = Study(
        Path(output_dir or f"output/importance-{request.name}"), chosen, _FIELDS["seeds"].parse(seeds), request
    )
    if (count or 0) > len(study.blocks):
        raise UsageError(f"--top {count}: {request.name} has {len(study.blocks)} blocks. Next: a smaller number")
    check_files(variant)
    prepare_folder(study.folder)
    study.check_settings(request, keep=False)
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        _announce(study)
        about = [*request.notes(), *size_notes(request, pictures)]
        for line in about if variant.embedded else [variant.licence_line, *about]:
            note(line)

    from ..device.choice import pick_device  # and with it torch
    from ..device.memory import CACHED_PROMPTS
    from ..device.rows import rows_that_fill, tell_idle_rows
    from ..methods.scoring import load_scorer
    from ..pipeline import load_pipeline

    set_threads(num_threads)
    place = pick_device(own_gpu(device))
    dino = load_scorer(scorer or (SCORER if request.variant.embedded else HUB_SCORER), place, pool)
    pipeline = load_pipeline(variant, place, request.dtype, offload, vae_tiling, t5_dtype=request.t5_dtype, **loading)
    pipeline.given = pictures
    groups = study.groups(rows or rows_that_fill(place, request))
    if rank == 0:
        tell_idle_rows(place, request, rows or 1)
    study.check_settings(pipeline.complete(request))
    todo = {task.number: task for group in groups if study.missing(group) for task in group}
    ahead = [study.request_of(task) for task in todo.values()][:CACHED_PROMPTS]
    pipeline.encode_ahead(ahead, last=len(ahead) == len(todo))
    Work(study, pipeline, rank).draw(groups)
    if rank == 0:
        study.end()
        _report(study, dino, count, cut)
    return study.folder


def _announce(study: Study) -> None:
    """Print what will be drawn. DiskError when the pictures would not fit."""
    tasks = [task for group in study.groups(batch=1) for task in group]
    missing = study.missing(tasks)
    size = len(missing) * study.request.width * study.request.height * PNG_BYTES
    free = shutil.disk_usage(study.folder).free
    tell(
        f"{len(study.prompts)} prompts, {study.seeds} seed(s) each, {len(study.blocks)} blocks: {len(tasks):,} pictures"
        f" ({study.request.settings()}); {len(tasks) - len(missing):,} exist, "
        f"{len(missing):,} will be drawn, about {size / 1e9:.2f} GB of {free / 1e9:.0f} GB free, into {study.folder}"
    )
    if size > free:
        raise DiskError(f"{study.folder}: the pictures take about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


@dataclass
class Work:
    """A process's part in drawing a study. Rank 0 shows the progress, and stays until all pictures exist."""

    study: Study
    pipeline: Any
    rank: int

    def draw(self, groups: list[list[Task]]) -> None:
        """Draw what is missing. Rank 0 waits for the others, and draws what those that died had claimed."""
        drawn, start = 0, time.monotonic()
        with tqdm(desc="pictures", unit="picture", disable=self.rank > 0 or no_bars()) as bar:
            while todo := [group for group in groups if self.study.missing(group)]:
                before, left = drawn, sum(len(self.study.missing(group)) for group in todo)
                bar.total = bar.n + left
                for tasks in todo:
                    missing = len(self.study.missing(tasks))
                    mine = self._draw_free(tasks)
                    bar.update(missing - len(self.study.missing(tasks)))  # also those of other processes
                    if mine and not drawn and self.rank == 0:
                        _print_estimate((time.monotonic() - start) / mine, left - mine)
                    drawn += mine
                if drawn == before:
                    if self.rank > 0:
                        return
                    note(f"waiting for {left} pictures of the other processes")
                    time.sleep(WAIT)

    def _draw_free(self, tasks: list[Task]) -> int:
        """Draw the missing pictures of a group, in the batch of all its pictures, unless another process does.
        Returns how many."""
        with self.study.claimed(tasks) as missing:
            if missing:
                self.study.draw(self.pipeline, tasks)
        return len(missing)


def _print_estimate(seconds: float, left: int) -> None:
    tell(f"{seconds:.2f} s a picture: about {max(1, round(seconds * left / 60))} min to go")


def _report(study: Study, scorer: "Scorer", top: int | None, threshold: float | None) -> None:
    """Score the pictures, write the results, and print the table and the files."""
    with tqdm(total=len(study.pairs), desc="scores", unit="prompt", disable=no_bars()) as bar:
        similar = similarities(study, scorer, bar.update)
    rows, other = rows_of(study, similar), other_seeds(study, scorer)
    vital, cut = choose(rows, top, threshold)
    _write_tables(study, scorer, rows, similar, {"other_seed": other, "cut": cut, "vital": vital})

    name, pictures = study.request.name, len(study.pairs)
    title = f"{name}: each block left out, {pictures} pictures, {scorer.name} ({scorer.pooling})"
    _write_chart(study.folder / "importance.png", rows, vital, cut, title, other)
    _write_sheets(study, rows)
    tell(_table(rows, vital, other))
    for file in ("importance.png", "importance.csv", "importance.json", "vital.json", "sheets"):
        if (study.folder / file).exists():
            tell(str(study.folder / file))


def _write_tables(
    study: Study, scorer: "Scorer", rows: list["Row"], similar: list[dict[str, float]], results: dict[str, Any]
) -> None:
    """Write `importance.csv`, `importance.json` with all settings and results, and `vital.json` for `edit --layers`."""
    model, counts = {"model": study.request.name}, {"prompts": len(study.prompts), "seeds": study.seeds}
    settings = {"scorer": scorer.name, "pooling": scorer.pooling, "num_steps": study.request.num_steps}
    pairs = [
        {"prompt": study.prompts[number].prompt, "seed": seed, **values}
        for (number, seed), values in zip(study.pairs, similar, strict=True)
    ]
    whole = {**model, **settings, **counts, **results, "blocks": list(json_rows(rows)), "similarities": pairs}
    layers = {**model, "layers": results["vital"], "cut": results["cut"], **counts, "scorer": scorer.name}
    write_whole(study.folder / "importance.csv", csv_of(rows))
    write_whole(study.folder / "importance.json", json.dumps(whole, indent=1) + "\n")
    write_whole(study.folder / "vital.json", json.dumps(layers, indent=2) + "\n")


def _write_chart(path: Path, rows: list["Row"], vital: list[str], cut: float, title: str, other: float | None) -> None:
    """Write the chart; without matplotlib print a note, so that hours of drawing still end with all other results."""
    from ..methods.charts import importance_chart

    try:
        write_whole(path, importance_chart(rows, vital, cut, title, other))
    except ModuleNotFoundError:
        note('no chart without matplotlib: pip install "matplotlib>=3.9", then run this again; nothing is drawn twice')


def _table(rows: list["Row"], vital: list[str], other: float | None) -> str:
    """The results as a Markdown table."""
    lines = ["| block | layer | importance | 95 % | between seeds | |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        seeds = "" if row.seed_spread is None else f"{row.seed_spread:.3f}"
        mark = "vital" if row.block in vital else ""
        wide = "" if math.isnan(row.ci95) else f"±{row.ci95:.3f}"  # a single prompt has no spread
        lines.append(f"| {row.block} | {row.layer} | {row.importance:.3f} | {wide} | {seeds} | {mark} |")
    lines += [] if other is None else [f"another seed of the same prompt: {other:.3f}"]
    return "\n".join(lines)


def _write_sheets(study: Study, rows: list["Row"]) -> None:
    """Write sheets of the first seed's pictures: a column for each prompt, a row for the reference and each block."""
    from io import BytesIO

    from ..methods.charts import contact_sheet

    labels = [(REFERENCE, REFERENCE), *((row.block, f"{row.block}\n{row.importance:.3f}") for row in rows)]
    folder = prepare_folder(study.folder / "sheets")
    for first in range(0, len(study.prompts), PROMPTS_ON_A_SHEET):
        shown = list(enumerate(study.prompts))[first : first + PROMPTS_ON_A_SHEET]
        pictures = [
            (label, [study.picture(Task(i, prompt.seed, block)) for i, prompt in shown]) for block, label in labels
        ]
        data = BytesIO()
        contact_sheet(pictures, [prompt.prompt for _, prompt in shown]).save(data, "PNG")
        write_whole(folder / f"prompts_{first + 1:03}-{first + len(shown):03}.png", data.getvalue())
