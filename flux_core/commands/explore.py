"""`explore`: draw prompts over seeds, steps and guidance; saves pictures, grids and a table to repeat them from.

However a session ends (a signal, a full disk, a power cut), `--resume` draws what is missing, and nothing twice. With
torchrun, every process draws the next picture that no other process is drawing.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image
from tqdm import tqdm

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import FluxError, UsageError
from ..files import prepare_folder, write_whole
from ..hooks import Intervention, Lora, check_plan
from ..hooks.plan import Plan
from ..images.given import NOTHING, Given, check_same, natural_size, pop_given, with_image
from ..images.metadata import KEY, png_bytes
from ..images.output import save_picture
from ..images.pictures import as_rgb, open_picture
from ..methods.charts import labelled_grid
from ..request.batch import check_rows
from ..request.fields import FILES, LOADING, MEMORY, PICTURE_FILES, THREADS, pop_fields
from ..request.generation import GenerationRequest
from ..request.plans import given_plan, load_again
from ..request.prompt_lines import read_lines
from ..session.exploration import AXES, Drawn, Exploration, Point, Sheet, plan_exploration
from ..session.folder import Session, new_folder, read_manifest, wait_for_manifest
from ..session.record import NAME
from ..session.sharing import broadcast_name, only_session, own_gpu, rank_and_world
from ..session.stopping import Stop
from ..terminal import no_bars, note, tell
from ..variants import Variant
from ..version import __version__
from ..vision.maps import check_maps
from .loras import checked_plan, found_again, typed_entries
from .stepwise import Stepwise
from .table import EXPLORE

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step
    from ..session.latents import Latents

_FIELDS = {field.name: field for field in EXPLORE}
WITH_RESUME = {
    "device",
    "stepwise_dir",
    "lora",
    "plan",
    "hook",
    "image",
    *PICTURE_FILES,
    *(field.name for field in (*FILES, *MEMORY, *LOADING, THREADS)),
}
"""flags that a manifest does not hold: the machine's, and paths, because no file may make us open others"""


def explore(resume: str | None = None, **flags: Any) -> Path:
    """Draw a session, or what is missing in a folder, and its grids. Returns its folder.

    UsageError for wrong flags, FileError for files that cannot be read, DiskError.
    """
    rank, world = rank_and_world()
    if resume and (others := [_FIELDS[name].flag for name in flags if name not in WITH_RESUME]):
        raise UsageError(f"--resume draws what the session's folder says: leave out {', '.join(others)}")
    parent, device = (flags.pop(name, _FIELDS[name].default) for name in ("output_dir", "device"))
    steps_dir, files, memory = (
        flags.pop("stepwise_dir", None),
        pop_fields(flags, FILES),
        pop_fields(flags, MEMORY + LOADING),
    )
    threads = THREADS.parse(flags.pop("threads", None))
    began = read_manifest(Path(resume)) if resume else None
    name = began.request["name"] if began else flags.get("name")
    variant = with_files(name, **files)
    pictures, records = pop_given(with_image(flags, flags.pop("image", None), variant), variant)
    if began is not None:
        check_same(began.request_of(next(iter(began.places))), records)
    else:
        flags |= {**records, **natural_size(flags, pictures, variant)}
    plan = given_plan(flags) if began is None else load_again(flags, began.hooks, "the session")
    beside = tuple(entry for entry in plan if not (entry.portable or isinstance(entry, Lora)))
    if began is not None and began.beside != _labels(beside):
        raise UsageError(f"the session draws with {', '.join(began.beside) or 'no plan'}. Next: give the same --plan")
    with ExitStack() as stack:
        if rank == 0:
            given = flags.pop("lora", None)
            exploration = began or _build_exploration(flags | _lora(given), files, plan)
            first = exploration.request_of(next(iter(exploration.places)))
            pictures.check(first)
            check_maps(name for name, _ in pictures.maps(first))
            check_files(with_files(exploration.request["name"], **files))
            _check_loras(exploration, files, given if resume else None)
            if steps_dir:
                prepare_folder(steps_dir)
            folder = Path(resume) if resume else new_folder(prepare_folder(parent))
            stack.enter_context(only_session(folder))
            Session(folder, exploration).begin()
        if world > 1:
            name, store = broadcast_name(rank, world, folder.name if rank == 0 else "")
            stack.callback(lambda: store)  # kept, while other processes may still read from it
            folder = Path(resume) if resume else Path(parent, name)
            exploration = wait_for_manifest(folder)
        session, unit = Session(folder, exploration), "picture" if exploration.batch == 1 else "batch"
        stop = stack.enter_context(Stop(unit).listening())
        work = Work(session, stop, rank, Path(steps_dir, folder.name) if steps_dir else None, beside, pictures)
        try:
            set_threads(threads)
            work.run(with_files(exploration.request["name"], **files), device, memory)
        except (FluxError, KeyboardInterrupt):
            if rank == 0:
                done = f"{len(session.there())} of {len(exploration.places)} pictures are drawn"
                note(f"{done}. Next: explore --resume {folder}")
            raise
    return folder


def _labels(plan: Sequence[Intervention]) -> tuple[str, ...]:
    """What a manifest says of entries that it cannot hold: in words, and by a hash of all that they say."""
    digests = [hashlib.sha256(entry.model_dump_json().encode()).hexdigest()[:8] for entry in plan]
    return tuple(f"{entry.label} ({digest})" for entry, digest in zip(plan, digests, strict=True))


def _build_exploration(flags: dict[str, Any], files: dict[str, Any], given: Plan) -> Exploration:
    """The exploration that the flags and their plan describe. UsageError, FileError."""
    prompt, file = flags.pop("prompt", None), flags.pop("prompts", None)
    if (prompt is None) == (file is None):
        raise UsageError('say what to explore: --prompt "a red apple", or --prompts and a file of such lines')
    lists = {name: flags.pop(name, None) for name in ("seeds", "steps", "guidance", "lora_scales")}
    options = {
        "cross": flags.pop("cross", False),
        "save_latents": _FIELDS["save_latents"].parse(flags.pop("save_latents", None)),
        "metadata": not flags.pop("no_metadata", False),
        "batch": _FIELDS["batch"].parse(flags.pop("batch", None), 1),
    }
    if lists["lora_scales"] and flags.get("lora_scale") is not None:
        raise UsageError("--lora-scale and --lora-scales both say the scales. Next: leave --lora-scale out")
    variant = with_files(flags.get("name"), **files)
    kept = [entry for entry in checked_plan(given, variant) if entry.portable]
    loras = typed_entries(flags, variant)
    varied = [i for i, (_, typed) in enumerate(loras, len(kept)) if typed.scale is None]
    fields = {**flags, "name": variant.name, "plan": [*kept, *(entry for entry, _ in loras)]}
    beside = [entry for entry in given if not (entry.portable or isinstance(entry, Lora))]
    options["beside"] = _labels(beside)
    texts = _prompts(file) if file else [str(prompt)]
    found = plan_exploration(texts, fields, **lists, varied=varied, **options)
    for point in found.places:  # also with what no manifest holds
        request = found.request_of(point)
        check_plan([*request.hooks, *beside], variant.params, request.num_forward_steps, request.branches)
    check_rows((*found.hooks, *beside), variant.params, found.batch)
    return found


def _lora(given: Any) -> dict[str, Any]:
    return {} if given is None else {"lora": given}


def _check_loras(exploration: Exploration, files: dict[str, Any], given: Any) -> None:
    """Find the LoRAs of a session, among those given or where they were; their headers are compared with the model."""
    variant = with_files(exploration.request["name"], **files)
    loras = exploration.request_of(next(iter(exploration.places))).loras
    found_again(loras, given or (), variant, "the session")


def _prompts(file: str) -> list[str]:
    """The prompts of a file. UsageError for a line that sets other fields, which are axes here."""
    lines = read_lines(file)
    for line in lines:
        if others := [name for name in line.fields if name != "prompt"]:
            raise UsageError(f"{line.where}: explore takes only prompts from a file, not {', '.join(others)}")
        if not isinstance(line.fields.get("prompt"), str):
            raise UsageError(f'{line.where} has no prompt. Next: write a text, as in {{"prompt": "a red apple"}}')
    return [line.fields["prompt"] for line in lines]


def _count_steps(points: Iterable[Point]) -> int:
    return sum(point.steps for point in points)


@dataclass
class Work:
    """A process's part in a session. Rank 0 also prints, stays until all pictures exist, and makes the grids."""

    session: Session
    stop: Stop
    rank: int
    steps_folder: Path | None
    beside: tuple[Intervention, ...] = ()
    """entries of the plan that read or write files, which no manifest holds"""
    given: Given = NOTHING
    """pictures that all of the session's are drawn with"""

    def run(self, variant: Variant, device: str, memory: dict[str, Any]) -> None:
        """Draw pictures until none is missing, or none is free for this process."""
        if self.rank == 0:
            self._introduce()
        if len(self.session.there()) < len(self.session.exploration.places):
            self._draw_with(variant, device, memory)
        if self.rank == 0:
            self._finish()

    def _introduce(self) -> None:
        """Print what will be drawn, the licence, and whether another version began the session."""
        session, exploration = self.session, self.session.exploration
        first = exploration.request_of(next(iter(exploration.places)))
        prompts = f"{len(exploration.prompts)} prompt(s)"
        tell(f"{first.name}: {first.width}x{first.height}, {prompts}, {exploration.settings()}")
        missing = len(exploration.places) - len(session.there())
        rows = f"{exploration.batch} at once, " if exploration.batch > 1 else ""
        tell(f"{len(exploration.places):,} pictures, {missing:,} of them to be drawn, {rows}into {session.folder}")
        if not first.variant.embedded:
            note(first.variant.licence_line)
        if exploration.version != __version__:
            note(f"pixels may differ: version {exploration.version} began this session, this is {__version__}")

    def _draw_with(self, variant: Variant, device: str, memory: dict[str, Any]) -> None:
        """Load the model, draw with it, and free its memory."""
        from ..device.choice import empty_device_cache, pick_device  # and with it torch
        from ..device.rows import tell_idle_rows
        from ..pipeline import load_pipeline

        place, exploration = pick_device(own_gpu(device)), self.session.exploration
        first = exploration.request_of(next(iter(exploration.places)))
        pipeline = load_pipeline(variant, place, first.dtype, t5_dtype=first.t5_dtype, **memory)
        try:
            self.session.settle(
                Drawn(
                    dtype=pipeline.precision,
                    t5_dtype=pipeline.t5_precision,
                    attention=pipeline.attention,
                    weights=pipeline.weights,
                )
            )
            if self.rank == 0:
                tell_idle_rows(place, first, exploration.batch)
                loras = exploration.request_of(next(iter(exploration.places))).loras
                for line in (line for prompt in exploration.prompts for line in pipeline.text_notes(prompt, loras)):
                    note(line)
                maps = () if self.session.there() else pipeline.denoiser.maps.pictures(first, self.given)
                for name, map in maps:
                    save_picture(map, self.session.folder, name)
            self._draw_all(pipeline)
        finally:
            del pipeline
            empty_device_cache(place)

    def _draw_all(self, pipeline: "Pipeline") -> None:
        """Draw what is missing. Rank 0 waits for the others, and draws what processes that died had claimed."""
        points, there, quiet = self.session.exploration.places, self.session.there(), self.rank > 0 or no_bars()
        bar = tqdm(total=_count_steps(points), initial=_count_steps(there), unit="step", disable=quiet)
        with self.stop.finishing(), bar:
            while len(there) < len(points):
                todo = [batch for batch in self.session.exploration.batches if not there.issuperset(batch)]
                if not self._draw_free(pipeline, todo, bar):
                    if self.rank > 0:
                        return
                    time.sleep(0.5)
                self.stop.check()
                there = self._look(bar)

    def _draw_free(self, pipeline: "Pipeline", todo: list[list[Point]], bar: "tqdm[NoReturn]") -> int:
        """Draw those batches that no other process is drawing. Returns how many."""
        from ..device.memory import CACHED_PROMPTS

        session, drawn = self.session, 0
        ahead = max(1, CACHED_PROMPTS // session.exploration.batch)
        for number, batch in enumerate(todo):
            self.stop.check()
            if number % ahead == 0:
                requests = map(session.exploration.request_of, chain(*todo[number:][:ahead]))
                last = number + ahead >= len(todo)
                pipeline.encode_ahead(list({(x.texts, x.loras): x for x in requests}.values()), last)
            start = time.monotonic()
            with session.claim(batch[0]) as mine:
                missing = [point for point in batch if not session.first(point).is_file()]
                if not mine or not missing:
                    continue
                for point, files in zip(batch, self._draw(pipeline, batch, bar), strict=True):
                    if point in missing:  # the others an earlier run has kept
                        session.keep(point, *files)
            drawn += 1
            self._look(bar)
            if bar.disable and self.rank == 0 and drawn == 2:  # the first batch's time includes the text encoders
                seconds = (time.monotonic() - start) / _count_steps(batch) * _count_steps(chain(*todo[number + 1 :]))
                tell(f"about {max(1, round(seconds / 60))} min to go")
        return drawn

    def _look(self, bar: "tqdm[NoReturn]") -> set[Point]:
        """The pictures that exist, also those of other processes; the bar shows them."""
        there = self.session.there()
        if not bar.disable:
            bar.n = _count_steps(there)
            bar.set_description(f"{len(there)} of {len(self.session.exploration.places)} pictures")
        return there

    def _draw(
        self, pipeline: "Pipeline", batch: list[Point], bar: "tqdm[NoReturn]"
    ) -> Iterator[tuple[bytes, bytes | None]]:
        """For each picture the bytes of its file, and of its latents' file if latents are kept."""
        watches = [self._watch(pipeline, point, bar) for point in batch]
        requests, number = [watch.request for watch in watches], self.session.numbers[batch[0]]
        images = pipeline.draw_rows(requests, self.given, watches, self.beside, number)
        for image, watch in zip(images, watches, strict=True):
            yield self._files(image, watch)

    def _watch(self, pipeline: "Pipeline", point: Point, bar: "tqdm[NoReturn]") -> "Watch":
        from ..session.latents import Latents

        exploration = self.session.exploration
        request, stem = exploration.request_of(point), exploration.places[point][0]
        latents = Latents(request, exploration.save_latents == "every") if exploration.save_latents else None
        folder = self.steps_folder and prepare_folder(self.steps_folder / stem)
        stepwise = Steps(pipeline, request, folder, self.given) if folder else None
        return Watch(request, bar, latents, stepwise)

    def _files(self, image: Image.Image, watch: "Watch") -> tuple[bytes, bytes | None]:
        metadata = self.session.exploration.metadata
        if watch.stepwise is not None:
            watch.stepwise.save_sheet()
        recorded = image.info[KEY] if metadata else None
        if not metadata:
            del image.info[KEY], image.info["parameters"]
        return png_bytes(image), watch.latents.data(recorded) if watch.latents else None

    def _finish(self) -> None:
        """Complete the folder, and write and print the grids."""
        session = self.session
        session.end()
        for sheet in session.exploration.sheets():
            path = write_whole(session.folder / f"{sheet.name}.png", png_bytes(self._grid(sheet)))
            tell(str(path))
        if session.exploration.metadata:
            tell(str(session.folder / NAME))

    def _grid(self, sheet: Sheet) -> Image.Image:
        """A sheet's pictures, with the values that vary at their sides, and the values that all share above them."""
        exploration, axes = self.session.exploration, sheet.axes
        rows = [[self._open(point) for point in row] for row in sheet.rows]
        labels = [exploration.label(row[0], axes[-2]) if len(axes) > 1 else "" for row in sheet.rows]
        heads = [exploration.label(point, axes[-1]) for point in sheet.rows[0]]
        shared = [exploration.label(sheet.rows[0][0], axis) for axis in AXES if axis not in axes[-2:]]
        return labelled_grid(rows, labels, heads, ", ".join(filter(None, shared)))

    def _open(self, point: Point) -> Image.Image:
        path = self.session.first(point)
        return as_rgb(open_picture(path, formats=("PNG",))[0], str(path))


@dataclass
class Watch:
    """A step callback for one picture."""

    request: GenerationRequest
    bar: "tqdm[NoReturn]"
    latents: "Latents | None"
    stepwise: Stepwise | None

    def __call__(self, step: "Step") -> None:
        self.bar.update()
        if self.latents is not None:
            self.latents(step)
        if self.stepwise is not None:
            self.stepwise(step)


class Steps(Stepwise):
    """A Stepwise that replaces the files that an interrupted session left."""

    def _save(self, picture: Image.Image, name: str) -> None:
        write_whole(self.folder / f"seed_{self.request.seed}_{name}.png", png_bytes(picture))
