"""The default command: words in, picture files out.

Everything that can be wrong with what was asked is found before torch is imported and a model loaded: flags,
the request, the init image, the folders. Each picture is saved as soon as it is drawn, so what a later
failure costs is never more than one picture.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import MemoryShortage, UsageError
from ..files import prepare_folder
from ..hooks.plan import Plan, parse_plan, read_plan, short_form
from ..images.metadata import differences, read_request
from ..images.output import save_picture
from ..images.pictures import fit_note, grid, open_source
from ..request.fields import FILES, THREADS, take
from ..request.generation import DRAWN_BY, GenerationRequest, InitImage
from ..request.prompt_lines import Line, obey, read_lines, typed_lines
from ..terminal import no_bars, note, tell
from .stepwise import Stepwise
from .table import RUN

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step

_DEFAULTS = {field.name: field.default for field in RUN}


def generate(
    from_image: str | None = None,
    prompt_file: str | None = None,
    loop: bool = False,
    init_image: str | None = None,
    seed: list[str] | None = None,
    output_dir: str = str(_DEFAULTS["output_dir"]),
    stepwise_dir: str | None = None,
    device: str = str(_DEFAULTS["device"]),
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    threads: str | None = None,
    plan: str | None = None,
    skip: list[str] | None = None,
    **fields: Any,
) -> list[Path]:
    """Draw what the flags ask for. Returns the picture files, in order.

    fields: the request's own, and the user's own files (`fields.FILES`).

    UsageError for what cannot be asked, DiskError for a folder that cannot be written, FileError for an init
    image that cannot be read.
    """
    lines = _lines(prompt_file, fields, loop)
    source, origin = open_source(init_image)
    old = read_request(from_image) if from_image else None
    if old is not None:
        fields = _repeated(old, origin) | fields
    if plan or skip:
        fields["plan"] = plan_of(plan, skip)
    fields["init_image"] = origin
    variant = with_files(fields.get("name"), **take(fields, FILES))
    fields["name"] = variant.name
    asked = ask(seed, fields, lines)
    number = THREADS.parse(threads)
    folder = prepare_folder(output_dir)
    steps_folder = prepare_folder(stepwise_dir) if stepwise_dir else None

    check_files(variant)

    from ..pipeline import load_pipeline  # and with it torch

    set_threads(number)
    pipeline = load_pipeline(variant, device, asked[0].dtype, offload, vae_tiling, compile)
    draw = partial(_draw_all, pipeline, source, folder, steps_folder)
    paths = draw(asked, _first_notes(pipeline, asked[0], old))
    return paths + _draw_what_is_typed(draw, fields) if loop else paths


def _lines(file: str | None, fields: dict[str, Any], loop: bool) -> list[Line] | None:
    """The lines of --prompt-file, if it is given."""
    if file is None:
        return None
    if fields.get("prompt") is not None:
        raise UsageError("--prompt and --prompt-file both say what to draw: give one of them")
    if loop:
        raise UsageError("--prompt-file and --loop both say what comes next: give one of them")
    return read_lines(file)


def plan_of(file: str | None, skip: list[str] | None) -> Plan:
    """The interventions of --plan, and behind them those of the short forms."""
    entries = read_plan(file) if file else ()
    return (*entries, *parse_plan([short_form("skip", text) for text in skip or ()]))


def _repeated(old: GenerationRequest, origin: InitImage | None) -> dict[str, Any]:
    """The fields of a repeated picture: what was asked then, without who drew it."""
    if old.init_image is not None and origin is None:
        raise UsageError(f"that picture was made from {old.init_image.file!r}: give it with --init-image")
    if old.init_image is not None and origin is not None and old.init_image.sha256 != origin.sha256:
        note(f"{origin.file!r} is another picture than the {old.init_image.file!r} of then")
    if old.functions:
        note(f"what also worked on that picture is not in the file: {'; '.join(old.functions)}")
    return old.model_dump(exclude={*DRAWN_BY, "init_image"})


def ask(
    seeds: Sequence[str] | None, fields: dict[str, Any], lines: Sequence[Line] | None = None
) -> list[GenerationRequest]:
    """One request for each picture: `num_images` from every seed, for every line. The same twice is drawn once.

    What a line says comes before `fields` and `seeds`. A UsageError names the line.
    """
    each_seed = [{}] if seeds is None else [{"seed": seed} for seed in seeds]
    given = [GenerationRequest(**{**fields, **seed}) for seed in each_seed] if lines is None else []
    for line in lines or ():
        try:
            chosen = [{}] if "seed" in line.fields else each_seed
            given += [GenerationRequest(**{**fields, **seed, **line.fields}) for seed in chosen]
        except UsageError as error:
            raise UsageError(f"{line.where}: {error}") from None
    for finding in dict.fromkeys(finding for request in given for finding in request.notes()):
        note(finding)
    every = [one for request in given for one in request.images()]
    unique = list({one.model_dump_json(): one for one in every}.values())
    if len(unique) < len(every):
        note(f"{len(every) - len(unique)} repeated seed(s) are drawn once")
    return unique


def _first_notes(pipeline: "Pipeline", request: GenerationRequest, old: GenerationRequest | None) -> list[str]:
    """What is told once for a model, and of the picture that is repeated."""
    request = pipeline.complete(request)
    lines = [] if request.variant.embedded else [request.variant.licence_line]
    return lines + [f"pixels may differ: {reason}" for reason in (differences(old, request) if old else [])]


def _draw_what_is_typed(draw: Callable[[list[GenerationRequest]], list[Path]], fields: dict[str, Any]) -> list[Path]:
    """Draw after every line that is no command, until `/q` or the input's end. What is wrong is told, and it goes on.

    A seed is for one picture: the next one has another, unless `/s` says which.
    """
    paths: list[Path] = []
    fields = {**fields, "seed": None}
    for line in typed_lines():
        try:
            fields = obey(line, fields)
            if not line.startswith("/"):
                paths += draw(ask(None, fields))
                fields = {**fields, "seed": None}
        except (UsageError, MemoryShortage) as error:
            note(f"error: {error}")
    return paths


def _draw_all(
    pipeline: "Pipeline",
    source: Image.Image | None,
    folder: Path,
    steps_folder: Path | None,
    requests: list[GenerationRequest],
    notes: Sequence[str] = (),
) -> list[Path]:
    """Draw and save the pictures, and a grid of them if there are several. notes: what else is told before."""
    from ..device.memory import CACHED_PROMPTS

    first, ahead = requests[0], CACHED_PROMPTS // 2  # a request has at most two texts
    _introduce(pipeline, requests, [*notes, *_fit_notes(source, requests)])
    paths, images = [], []
    for number, request in enumerate(requests):
        if number % ahead == 0:
            pipeline.prompts.encode_ahead([text for one in requests[number : number + ahead] for text in one.texts])
        images.append(_draw(pipeline, request, source, steps_folder))
        paths.append(save_picture(images[-1], folder, f"{request.name}_seed{request.seed}"))
        tell(str(paths[-1]))
    if len(images) > 1:
        tell(str(save_picture(grid(images), folder, f"grid_{first.name}_seed{first.seed}")))
    return paths


def _fit_notes(source: Image.Image | None, requests: list[GenerationRequest]) -> list[str]:
    """What becomes of an init image of another shape than the pictures'."""
    shapes = dict.fromkeys((one.width, one.height, one.fit or "crop") for one in requests)
    return [line for shape in shapes if source is not None and (line := fit_note(source, *shape))]


def _introduce(pipeline: "Pipeline", requests: list[GenerationRequest], notes: Sequence[str]) -> None:
    """Say once what is about to be drawn, and what of it may surprise."""
    request = pipeline.complete(requests[0])
    seeds, prompts = (list(dict.fromkeys(getattr(one, name) for one in requests)) for name in ("seed", "prompt"))
    shown = ", ".join(map(str, seeds[:8])) + (", …" if len(seeds) > 8 else "")
    several = f", {len(prompts)} prompts" if len(prompts) > 1 else ""
    others = len({one.settings() for one in requests}) - 1
    more = f" (and {others} other settings)" if others else ""
    tell(f"{request.settings()}{more}{several}, seed {shown}, {request.dtype} on {pipeline.device}")
    dropped = [
        line for text in dict.fromkeys(chain(*(one.texts for one in requests))) for line in pipeline.text_notes(text)
    ]
    for line in dict.fromkeys([*notes, *dropped]):
        note(line)


def _draw(
    pipeline: "Pipeline", request: GenerationRequest, source: Image.Image | None, steps_folder: Path | None
) -> Image.Image:
    """One picture, under a progress bar where somebody looks at one."""
    stepwise = Stepwise(pipeline, request, steps_folder) if steps_folder else None
    with tqdm(total=request.num_forward_steps, desc=f"seed {request.seed}", unit="step", disable=no_bars()) as bar:

        def on_step(step: "Step") -> None:
            bar.update(step.index + 1 - bar.n)  # back to the first where memory ran out
            if stepwise is not None:
                stepwise(step)

        try:
            return pipeline.draw(request, source, on_step)
        finally:
            if stepwise is not None:
                stepwise.save_sheet()
