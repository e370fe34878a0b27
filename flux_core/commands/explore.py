"""`explore`: one prompt, or several, over seeds, steps and guidance; as pictures, grids and a table that repeats them.

Whatever ends a session (a signal, a full disk, the power), `--resume` draws what is missing, and nothing twice. Started
by torchrun, every process takes the next picture that nobody is at.
"""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image
from tqdm import tqdm

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import FluxError, UsageError
from ..files import prepare_folder, write_whole
from ..images.metadata import KEY, png_bytes
from ..images.pictures import as_rgb, open_picture
from ..methods.charts import labelled_grid
from ..request.fields import FILES, MEMORY, THREADS, take
from ..request.prompt_lines import read_lines
from ..session.exploration import AXES, Drawn, Exploration, Point, Sheet, plan_exploration
from ..session.folder import Session, new_folder, read_manifest, wait_for_manifest
from ..session.record import NAME
from ..session.sharing import broadcast_name, only_session, own_gpu, rank_and_world
from ..session.stopping import Stop
from ..terminal import no_bars, note, tell
from ..variants import Variant
from ..version import __version__
from .stepwise import Stepwise
from .table import EXPLORE

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step

_FIELDS = {field.name: field for field in EXPLORE}
WITH_RESUME = {"device", "stepwise_dir", *(field.name for field in (*FILES, *MEMORY, THREADS))}
"""flags that a manifest does not hold: where it is drawn, and paths, since no file may make us open others"""


def explore(resume: str | None = None, **flags: Any) -> Path:
    """Draw a session, or what is missing of one, and its grids. Returns its folder.

    UsageError for what cannot be asked, FileError for what cannot be read, DiskError.
    """
    rank, world = rank_and_world()
    if resume and (others := [_FIELDS[name].flag for name in flags if name not in WITH_RESUME]):
        raise UsageError(f"--resume goes on with what was asked: leave out {', '.join(others)}")
    parent, device = (flags.pop(name, _FIELDS[name].default) for name in ("output_dir", "device"))
    steps_dir, files, memory = flags.pop("stepwise_dir", None), take(flags, FILES), take(flags, MEMORY)
    threads = THREADS.parse(flags.pop("threads", None))
    with ExitStack() as stack:
        if rank == 0:
            asked = read_manifest(Path(resume)) if resume else _asked(flags, files)
            check_files(with_files(asked.request["name"], **files))
            if steps_dir:
                prepare_folder(steps_dir)
            folder = Path(resume) if resume else new_folder(prepare_folder(parent))
            stack.enter_context(only_session(folder))
            Session(folder, asked).begin()
        if world > 1:
            name, store = broadcast_name(rank, world, folder.name if rank == 0 else "")
            stack.callback(lambda: store)  # the first process keeps it while others may still listen
            folder = Path(resume) if resume else Path(parent, name)
            asked = wait_for_manifest(folder)
        session, stop = Session(folder, asked), stack.enter_context(Stop().listening())
        work = Work(session, stop, rank, Path(steps_dir, folder.name) if steps_dir else None)
        try:
            set_threads(threads)
            work.do(with_files(asked.request["name"], **files), device, memory)
        except (FluxError, KeyboardInterrupt):
            if rank == 0:
                there = f"{len(session.there())} of {len(asked.places)} pictures are there"
                note(f"{there}. Next: explore --resume {folder}")
            raise
    return folder


def _asked(flags: dict[str, Any], files: dict[str, Any]) -> Exploration:
    prompt, file = flags.pop("prompt", None), flags.pop("prompts", None)
    if (prompt is None) == (file is None):
        raise UsageError('say what to explore: --prompt "a red apple", or --prompts and a file of such lines')
    lists = [flags.pop(name, None) for name in ("seeds", "steps", "guidance")]
    options = {
        "cross": flags.pop("cross", False),
        "save_latents": _FIELDS["save_latents"].parse(flags.pop("save_latents", None)),
        "metadata": not flags.pop("no_metadata", False),
    }
    fields = {**flags, "name": with_files(flags.get("name"), **files).name}
    return plan_exploration(_prompts(file) if file else [str(prompt)], fields, *lists, **options)


def _prompts(file: str) -> list[str]:
    """The lines of a file; what else a CSV or JSONL file may say of a picture is the axes' business here."""
    lines = read_lines(file)
    for line in lines:
        if others := [name for name in line.fields if name != "prompt"]:
            raise UsageError(f"{line.where}: explore takes prompts alone from a file, not {', '.join(others)}")
        if not isinstance(line.fields.get("prompt"), str):
            raise UsageError(f'{line.where} says no prompt. Next: write a text, as in {{"prompt": "a red apple"}}')
    return [line.fields["prompt"] for line in lines]


def steps_of(points: Iterable[Point]) -> int:
    return sum(point.steps for point in points)


@dataclass
class Work:
    """One process's part in a session. The first one (rank 0) talks, stays to the end, and makes the grids."""

    session: Session
    stop: Stop
    rank: int
    steps_folder: Path | None

    def do(self, variant: Variant, device: str, memory: dict[str, bool]) -> None:
        if self.rank == 0:
            self._introduce()
        if len(self.session.there()) < len(self.session.asked.places):
            self._draw_with(variant, device, memory)
        if self.rank == 0:
            self._finish()

    def _introduce(self) -> None:
        session, asked = self.session, self.session.asked
        one = asked.request_of(next(iter(asked.places)))
        tell(f"{one.name}: {one.width}x{one.height}, {len(asked.prompts)} prompt(s), {asked.settings()}")
        missing = len(asked.places) - len(session.there())
        tell(f"{len(asked.places):,} pictures, {missing:,} of them to be drawn, into {session.folder}")
        if not one.variant.embedded:
            note(one.variant.licence_line)
        if asked.version != __version__:
            note(f"pixels may differ: version {asked.version} began this session, this is {__version__}")

    def _draw_with(self, variant: Variant, device: str, memory: dict[str, bool]) -> None:
        """Load the model, draw with it, and give its memory back."""
        from ..device.choice import empty_device_cache, pick_device  # and with it torch
        from ..pipeline import load_pipeline

        place, asked = pick_device(own_gpu(device)), self.session.asked
        dtype = asked.request_of(next(iter(asked.places))).dtype
        pipeline = load_pipeline(variant, place, dtype, **memory)  # type: ignore[arg-type]
        try:
            self.session.settle(Drawn(dtype=pipeline.precision, weights=pipeline.weights))
            if self.rank == 0:
                for line in (line for prompt in asked.prompts for line in pipeline.text_notes(prompt)):
                    note(line)
            self._draw_all(pipeline)
        finally:
            del pipeline
            empty_device_cache(place)

    def _draw_all(self, pipeline: "Pipeline") -> None:
        """Draw what nobody has drawn. The first process waits for the others, and takes over from those that died."""
        every, there, quiet = self.session.asked.places, self.session.there(), self.rank > 0 or no_bars()
        bar = tqdm(total=steps_of(every), initial=steps_of(there), unit="step", disable=quiet)
        with self.stop.finishing(), bar:
            while len(there) < len(every):
                if not self._draw_free(pipeline, [point for point in every if point not in there], bar):
                    if self.rank > 0:
                        return
                    time.sleep(0.5)
                self.stop.check()
                there = self._there(bar)

    def _draw_free(self, pipeline: "Pipeline", todo: list[Point], bar: "tqdm[NoReturn]") -> int:
        """Draw those that no other process is at. Returns how many."""
        from ..device.memory import CACHED_PROMPTS

        session, drawn = self.session, 0
        for number, point in enumerate(todo):
            self.stop.check()
            if number % CACHED_PROMPTS == 0:
                ahead = dict.fromkeys(session.asked.prompts[one.prompt] for one in todo[number:][:CACHED_PROMPTS])
                pipeline.prompts.encode_ahead(list(ahead))
            start = time.monotonic()
            with session.claim(point) as mine:
                if not mine or session.first(point).is_file():
                    continue
                session.keep(point, *self._draw(pipeline, point, bar))
            drawn += 1
            self._there(bar)
            if bar.disable and self.rank == 0 and drawn == 2:  # the first one's time has the text encoders in it
                seconds = (time.monotonic() - start) / point.steps * steps_of(todo[number + 1 :])
                tell(f"about {max(1, round(seconds / 60))} min to go")
        return drawn

    def _there(self, bar: "tqdm[NoReturn]") -> set[Point]:
        """Look at what is there, also of other processes, and show it."""
        there = self.session.there()
        if not bar.disable:
            bar.n = steps_of(there)
            bar.set_description(f"{len(there)} of {len(self.session.asked.places)} pictures")
        return there

    def _draw(self, pipeline: "Pipeline", point: Point, bar: "tqdm[NoReturn]") -> tuple[bytes, bytes | None]:
        """The whole files of a picture and of its latents, if they are kept."""
        from ..session.latents import Latents

        asked = self.session.asked
        request, stem = asked.request_of(point), asked.places[point][0]
        latents = Latents(request, asked.save_latents == "every") if asked.save_latents else None
        stepwise = Steps(pipeline, request, prepare_folder(self.steps_folder / stem)) if self.steps_folder else None

        def on_step(step: "Step") -> None:
            bar.update()
            if latents is not None:
                latents(step)
            if stepwise is not None:
                stepwise(step)

        image = pipeline.draw(request, None, on_step)
        if stepwise is not None:
            stepwise.save_sheet()
        recorded = image.info[KEY] if asked.metadata else None
        if not asked.metadata:
            del image.info[KEY], image.info["parameters"]
        return png_bytes(image), latents.data(recorded) if latents else None

    def _finish(self) -> None:
        session = self.session
        session.end()
        for sheet in session.asked.sheets():
            path = write_whole(session.folder / f"{sheet.name}.png", png_bytes(self._grid(sheet)))
            tell(str(path))
        if session.asked.metadata:
            tell(str(session.folder / NAME))

    def _grid(self, sheet: Sheet) -> Image.Image:
        """The sheet's pictures with the moving axes at their sides, and above them what all have in common."""
        asked, axes = self.session.asked, sheet.axes
        rows = [[self._open(point) for point in row] for row in sheet.rows]
        labels = [asked.label(row[0], axes[-2]) if len(axes) > 1 else "" for row in sheet.rows]
        heads = [asked.label(point, axes[-1]) for point in sheet.rows[0]]
        still = [asked.label(sheet.rows[0][0], axis) for axis in AXES if axis not in axes[-2:]]
        return labelled_grid(rows, labels, heads, ", ".join(filter(None, still)))

    def _open(self, point: Point) -> Image.Image:
        path = self.session.first(point)
        return as_rgb(open_picture(path, formats=("PNG",))[0], str(path))


class Steps(Stepwise):
    """The pictures of the steps in a folder of their own, each in the place of what an ended session left there."""

    def _save(self, picture: Image.Image, what: str) -> None:
        write_whole(self.folder / f"seed_{self.request.seed}_{what}.png", png_bytes(picture))
