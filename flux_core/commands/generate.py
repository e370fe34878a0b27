"""`generate`, the default command: draw pictures and save them.

Flags, requests, the init image and the folders are checked before torch is imported and a model loaded. Each picture is
saved as soon as it is drawn, so that a later failure never costs more than a picture.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import FluxError, MemoryShortage, UsageError
from ..files import prepare_folder
from ..hooks import Lora
from ..hooks.plan import Plan
from ..images.given import Given, natural_size, pop_given, size_notes, with_image
from ..images.metadata import differences, read_request
from ..images.output import saver
from ..images.pictures import grid
from ..request.batch import as_it_was, batches, check_rows, common
from ..request.fields import DEVICE, FIELDS, FILES, LOADING, OUTPUT_DIR, PICTURE_FILES, THREADS, pop_fields
from ..request.generation import DRAWN_BY, GenerationRequest
from ..request.loop import apply_command, read_typed_lines
from ..request.pictures import InitImage
from ..request.plans import check_given, given_plan
from ..request.prompt_lines import Line, read_lines
from ..terminal import no_bars, note, one_line, tell
from ..variants import Variant, of_ratio
from ..vision.maps import check_maps
from .loras import changed_plan, checked_plan, entries_of
from .stepwise import Stepwise
from .table import BATCH

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step


def generate(
    from_image: str | None = None,
    prompt_file: str | None = None,
    loop: bool = False,
    image: str | None = None,
    aspect_ratio: str | None = None,
    batch: str | None = None,
    seed: list[str] | None = None,
    output_dir: str = OUTPUT_DIR.default,
    stepwise_dir: str | None = None,
    device: str = DEVICE.default,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    threads: str | None = None,
    **fields: Any,
) -> list[Path]:
    """Draw pictures. Returns their files, in the order in which they were asked for.

    fields: the request's other fields, the plan's flags (`fields.PLAN`), the user's own files (`fields.FILES`), and how
    a model is loaded (`LOADING`).

    UsageError for wrong flags, DiskError for a folder that cannot be written, FileError for a picture or a file of
    prompts that cannot be read.
    """
    given, rows = given_plan(fields), BATCH.parse(batch, 1)
    lines = _read_prompt_file(prompt_file, fields, loop)
    loading = pop_fields(fields, LOADING)
    old = read_request(from_image) if from_image else None
    variant = with_files(fields.get("name") or (old.name if old else None), **pop_fields(fields, FILES))
    pictures, records = pop_given(with_image(fields, image, variant), variant, old)
    shaped = shape(fields, aspect_ratio, variant)
    if old is not None:
        fields = _recorded_fields(old, records) | fields
    fields |= {**records, **shaped, "name": variant.name}
    fields["plan"] = _plan(old, given, fields, variant)
    if lines is None:
        fields |= natural_size(fields, pictures, variant)
    else:
        told: set[str] = set()
        lines = [_with_loras(line, fields["plan"], variant, told) for line in lines]
        lines = [_with_size(line, fields, pictures, variant) for line in lines]
    if batch is not None:
        fields["batch"] = None  # not that of the picture to repeat
        if old is not None and old.batch is not None and rows > 1:
            was = f"row {old.batch.row + 1} of {old.batch.rows}"
            note(f"{from_image} was {was}: with --batch {rows} it has other last bits")
    requests = build_requests(seed, fields, lines)
    if old is not None:
        requests = [as_it_was(request, old) for request in requests]
    for group in batches(requests, rows, common):
        check_rows(group[0].hooks, group[0].variant.params, len(group))
    for request in requests:
        if request.batch is not None:
            request.batch.check_again()
        pictures.check(request)
    check_maps(name for name, _ in pictures.maps(requests[0]))
    num_threads = THREADS.parse(threads)
    folder = prepare_folder(output_dir)
    steps_folder = prepare_folder(stepwise_dir) if stepwise_dir else None

    check_files(variant)

    from ..device.rows import tell_idle_rows  # and with it torch
    from ..pipeline import load_pipeline

    set_threads(num_threads)
    pipeline = load_pipeline(
        variant, device, requests[0].dtype, offload, vae_tiling, compile, requests[0].t5_dtype, **loading
    )
    tell_idle_rows(pipeline.device, requests[0], rows)
    draw = partial(_draw_all, pipeline, pictures, folder, steps_folder, not loop, rows)
    paths = draw(requests, _model_notes(pipeline, requests[0], pictures, old))
    return paths + _draw_typed_lines(draw, fields) if loop else paths


def _read_prompt_file(file: str | None, fields: dict[str, Any], loop: bool) -> list[Line] | None:
    """The lines of --prompt-file; None without it. UsageError beside other prompts."""
    if file is None:
        return None
    if fields.get("prompt") is not None:
        raise UsageError("--prompt and --prompt-file both say what to draw: give one of them")
    if loop:
        raise UsageError("--prompt-file and --loop both say what comes next: give one of them")
    return read_lines(file)


def _plan(old: GenerationRequest | None, given: Plan, fields: dict[str, Any], variant: Variant) -> Plan:
    """The interventions of the flags, else of the picture to repeat, and their LoRAs; removes the flags."""
    given = checked_plan(given, variant)
    if old is None:
        return (*given, *entries_of(fields, variant))
    own = [entry for entry in given if not isinstance(entry, Lora)]
    changes = any(entry.changes_pixels for entry in own)
    hooks = own if changes else [*old.hooks, *own]  # to look at a picture changes no plan
    check_given(hooks, "the picture")
    return (*hooks, *(x for x in given if isinstance(x, Lora)), *changed_plan(old.loras, fields, variant))


def _with_loras(line: Line, plan: Plan, variant: Variant, told: set[str]) -> Line:
    """A line of a file of prompts, with its own LoRAs as entries of a plan, in place of the run's. Errors name it.

    told: as in `entries_of`.
    """
    fields = dict(line.fields)
    try:
        own = entries_of(fields, variant, told)
    except FluxError as error:
        raise type(error)(f"{line.where}: {error}") from None
    kept = tuple(entry for entry in plan if not isinstance(entry, Lora))
    return replace(line, fields=fields | {"plan": (*kept, *own)}) if own else line


def _with_size(line: Line, fields: dict[str, Any], pictures: Given, variant: Variant) -> Line:
    """A line of a file of prompts, with the size that the run's pictures ask for as the line takes them."""
    return replace(line, fields=natural_size(fields | line.fields, pictures, variant) | line.fields)


def shape(fields: dict[str, Any], aspect_ratio: str | None, variant: Variant) -> dict[str, int]:
    """Width and height of `--aspect-ratio`, of the area that the model draws by itself. UsageError."""
    if aspect_ratio is None:
        return {}
    if given := [name for name in ("width", "height") if fields.get(name) is not None]:
        raise UsageError(f"--aspect-ratio and --{given[0]} both say the shape: leave one out")
    found = re.fullmatch(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", aspect_ratio, re.ASCII)
    if found is None or not float(found[1]) or not float(found[2]):
        raise UsageError(f"--aspect-ratio must be two numbers, as in 16:9, not {aspect_ratio[:40]!a}")
    width, height = of_ratio(float(found[1]) / float(found[2]), variant.width * variant.height)
    return {"width": width, "height": height}


def _recorded_fields(old: GenerationRequest, records: dict[str, Any]) -> dict[str, Any]:
    """The fields of a picture's request for drawing it again, with notes on what is missing. UsageError."""
    for name in PICTURE_FILES:
        before, now = (found if isinstance(found, tuple) else (found,) if found else ()
                       for found in (getattr(old, name), records.get(name)))  # fmt: skip
        if len(before) > len(now) and name == "controlnet":
            raise UsageError(f"that picture followed {before[len(now)].settings()}: give both files with --controlnet")
        if len(before) > len(now):
            missing = before[len(now)]
            raise UsageError(f"that picture was made from {missing.file!r}: give it with {_as_flag(name, missing)}")
        for one, other in zip(before, now, strict=False):
            if one.sha256 != other.sha256:
                note(f"{other.file!r} is another picture than the {one.file!r} that was used")
            elif name != "controlnet" and one != other.model_copy(update={"file": one.file}):
                note(f"that picture was made with {one_line(_as_flag(name, one))}")
            if getattr(one, "net_sha256", None) != getattr(other, "net_sha256", None):
                note(f"{other.net!r} is another ControlNet than the {one.net!r} that was used")
    if old.functions:
        note(f"interventions that the picture's file cannot hold are missing: {one_line('; '.join(old.functions))}")
    return old.model_dump(exclude={*DRAWN_BY, *PICTURE_FILES, "plan"})


def _as_flag(name: str, record: InitImage) -> str:
    """How a picture was given: `--control canny:photo.png`, `--reference cup.png 0.7`."""
    made, weight = getattr(record, "map", ""), getattr(record, "weight", 1.0)
    file = f"{made}:{record.file}" if made else record.file
    return f"{FIELDS[name].flag} {file}" + (f" {weight:g}" if weight != 1 else "")


def build_requests(
    seeds: Sequence[str] | None, fields: dict[str, Any], lines: Sequence[Line] | None = None
) -> list[GenerationRequest]:
    """A request for each picture: `num_images` from each seed, for each line. Equal requests are drawn once.

    A line's fields replace `fields` and `seeds`. Notes are printed, once each. UsageError, with the line's number.
    """
    each_seed: list[dict[str, Any]] = [{}] if seeds is None else [{"seed": seed} for seed in seeds]
    if lines is None:
        requests = [GenerationRequest(**{**fields, **seed}) for seed in each_seed]
    else:
        # a line with its own seed is drawn once
        pairs = [(line, seed) for line in lines for seed in ([{}] if "seed" in line.fields else each_seed)]
        requests = [line.request(fields | seed) for line, seed in pairs]
    for text in dict.fromkeys(text for request in requests for text in request.notes()):
        note(text)
    pictures = [picture for request in requests for picture in request.images()]
    unique = list({picture.model_dump_json(): picture for picture in pictures}.values())
    if len(unique) < len(pictures):
        note(f"{len(pictures) - len(unique)} repeated seed(s) are drawn once")
    return unique


def _model_notes(
    pipeline: "Pipeline", request: GenerationRequest, given: Given, old: GenerationRequest | None
) -> list[str]:
    """The licence, and why a repeated picture may have other pixels, a line each."""
    request = pipeline.complete(request, given=given)
    lines = [] if request.variant.embedded else [request.variant.licence_line]
    return lines + [f"pixels may differ: {reason}" for reason in (differences(old, request) if old else [])]


def _draw_typed_lines(draw: Callable[[list[GenerationRequest]], list[Path]], fields: dict[str, Any]) -> list[Path]:
    """Draw a picture for each typed line that is no command, until `/q` or the input's end. Errors are printed.

    Each picture has a random seed, unless `/s` sets it, and is drawn alone.
    """
    paths: list[Path] = []
    fields = {**fields, "seed": None, "batch": None}
    for line in read_typed_lines():
        try:
            fields = apply_command(line, fields)
            if not line.startswith("/"):
                paths += draw(build_requests(None, fields))
                fields = {**fields, "seed": None}
        except (UsageError, MemoryShortage) as error:
            note(f"error: {one_line(str(error))}")
    return paths


def _draw_all(
    pipeline: "Pipeline",
    given: Given,
    folder: Path,
    steps_folder: Path | None,
    last: bool,
    rows: int,
    requests: list[GenerationRequest],
    notes: Sequence[str] = (),
) -> list[Path]:
    """Draw and save the pictures, and a grid of several. Returns their paths, in the order of the requests.

    last: whether no other texts come later. rows: pictures drawn at once. notes: other lines to print before.
    """
    from ..device.memory import CACHED_PROMPTS

    first, ahead = requests[0], max(1, CACHED_PROMPTS // 2 // rows)  # batches: a request has at most two texts
    _introduce(pipeline, requests, [*notes, *(line for one in requests for line in size_notes(one, given))])
    images: dict[int, Image.Image] = {}  # by the request's id: batches draw in another order
    paths: dict[int, Future[Path]] = {}
    shown = []
    groups = batches(requests, rows, common)
    with saver(folder) as save:  # a file is written while the next picture is drawn
        for number, group in enumerate(groups):
            if number % ahead == 0:
                pipeline.encode_ahead([*chain(*groups[number:][:ahead])], last and number + ahead >= len(groups))
            drawn = _draw(pipeline, group, given, steps_folder, len(images))
            for image, request in zip(drawn, group, strict=True):
                images[id(request)] = image
                paths[id(request)] = save(image, f"{request.name}_seed{request.seed}")
            if (one := group[0]).padded_size not in shown:
                shown.append(one.padded_size)
                for name, map in pipeline.denoiser.maps.pictures(one, given):
                    save(map, f"{one.name}_seed{one.seed}_{name}")
        if len(requests) > 1:
            save(grid([images[id(request)] for request in requests]), f"grid_{first.name}_seed{first.seed}")
    return [paths[id(request)].result() for request in requests]


def _introduce(pipeline: "Pipeline", requests: list[GenerationRequest], notes: Sequence[str]) -> None:
    """Print the settings of what will be drawn, the notes, and the words that the text encoders drop."""
    request = pipeline.complete(requests[0])
    seeds, prompts = (list(dict.fromkeys(getattr(item, name) for item in requests)) for name in ("seed", "prompt"))
    shown = ", ".join(map(str, seeds[:8])) + (", …" if len(seeds) > 8 else "")
    several = f", {len(prompts)} prompts" if len(prompts) > 1 else ""
    others = len({item.settings() for item in requests}) - 1
    more = f" (and {others} other settings)" if others else ""
    tell(f"{request.settings()}{more}{several}, seed {shown}, {request.dtype} on {pipeline.device}")
    texts = dict.fromkeys((text, item.loras) for item in requests for text in item.texts)
    dropped = chain(*(pipeline.text_notes(text, loras) for text, loras in texts))
    again = (one.batch.told for one in requests if one.batch is not None)
    for line in dict.fromkeys([*notes, *again, *dropped]):
        note(line)


def _draw(
    pipeline: "Pipeline",
    requests: list[GenerationRequest],
    given: Given,
    steps_folder: Path | None,
    number: int,
) -> list[Image.Image]:
    """Draw pictures at once, with a progress bar on a terminal. number: of the first among those of the command."""
    watches = [Stepwise(pipeline, one, steps_folder, given) if steps_folder else None for one in requests]
    seeds = ", ".join(str(request.seed) for request in requests[:8]) + (", …" if len(requests) > 8 else "")
    with tqdm(total=requests[0].num_forward_steps, desc=f"seed {seeds}", unit="step", disable=no_bars()) as bar:

        def on_step(step: "Step", stepwise: Stepwise | None) -> None:
            bar.update(step.index + 1 - bar.n)  # back to the first step after out of memory
            if stepwise is not None:
                stepwise(step)

        try:
            return pipeline.draw_rows(requests, given, [partial(on_step, stepwise=one) for one in watches], (), number)
        finally:
            for stepwise in filter(None, watches):
                stepwise.save_sheet()
