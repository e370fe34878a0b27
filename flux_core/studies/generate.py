"""The default command: words in, picture files out.

Everything that can be wrong with what was asked is found before torch is imported and a model loaded: flags,
the request, the init image, the folders. Each picture is saved as soon as it is drawn, so what a later
failure costs is never more than one picture.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from ..errors import UsageError
from ..fields import RUN
from ..hooks.plan import Plan, parse_plan, read_plan, short_form
from ..metadata import differences, read_request
from ..output import prepare_folder, save_picture
from ..pictures import grid, open_source
from ..request import GenerationRequest, InitImage
from ..stepwise import Stepwise
from ..terminal import no_bars, note, tell

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step

_DEFAULTS = {field.name: field.default for field in RUN}


def generate(
    from_image: str | None = None,
    init_image: str | None = None,
    seed: list[str] | None = None,
    output_dir: str = str(_DEFAULTS["output_dir"]),
    stepwise_dir: str | None = None,
    device: str = str(_DEFAULTS["device"]),
    plan: str | None = None,
    skip: list[str] | None = None,
    **fields: Any,
) -> list[Path]:
    """Draw what the flags ask for. `fields`: the request's own. Returns the picture files, in order.

    UsageError for what cannot be asked, DiskError for a folder that cannot be written, FileError for an init
    image that cannot be read.
    """
    source, origin = open_source(init_image)
    old = read_request(from_image) if from_image else None
    if old is not None:
        fields = _repeated(old, origin) | fields
    if plan or skip:
        fields["plan"] = plan_of(plan, skip)
    asked = ask(seed, {**fields, "init_image": origin})
    folder = prepare_folder(output_dir)
    steps_folder = prepare_folder(stepwise_dir) if stepwise_dir else None
    return _draw_all(asked, source, folder, steps_folder, device, old)


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
    return old.model_dump(exclude={"version", "weights", "init_image", "functions"})


def ask(seeds: list[str] | None, fields: dict[str, Any]) -> list[GenerationRequest]:
    """One request for each picture: `num_images` from every seed given. A seed twice is drawn once."""
    each = [{}] if seeds is None else [{"seed": seed} for seed in seeds]
    requests = [GenerationRequest(**{**fields, **seed}) for seed in each]
    for line in requests[0].notes():
        note(line)
    every = [one for request in requests for one in request.images()]
    unique = list({one.seed: one for one in every}.values())
    if len(unique) < len(every):
        note(f"{len(every) - len(unique)} repeated seed(s) are drawn once")
    return unique


def _draw_all(
    requests: list[GenerationRequest],
    source: Image.Image | None,
    folder: Path,
    steps_folder: Path | None,
    device: str,
    old: GenerationRequest | None,
) -> list[Path]:
    from ..pipeline import load_pipeline  # and with it torch

    first = requests[0]
    pipeline = load_pipeline(first.name, device, first.dtype)
    _introduce(pipeline, requests, old)
    paths, images = [], []
    for request in requests:
        images.append(_draw(pipeline, request, source, steps_folder))
        paths.append(save_picture(images[-1], folder, f"{request.name}_seed{request.seed}"))
        tell(str(paths[-1]))
    if len(images) > 1:
        tell(str(save_picture(grid(images), folder, f"grid_{first.name}_seed{first.seed}")))
    return paths


def _introduce(pipeline: "Pipeline", requests: list[GenerationRequest], old: GenerationRequest | None) -> None:
    """Say once what is about to be drawn, and what of it may surprise."""
    request = pipeline.complete(requests[0])
    seeds = ", ".join(str(one.seed) for one in requests[:8]) + (", …" if len(requests) > 8 else "")
    tell(f"{request.settings()}, seed {seeds}, {request.dtype} on {pipeline.device}")
    lines = [] if request.variant.embedded else [f"licence of {request.name}: {request.variant.licence}"]
    lines += pipeline.text_notes(request.prompt)
    lines += [] if old is None else [f"pixels may differ: {reason}" for reason in differences(old, request)]
    for line in lines:
        note(line)


def _draw(
    pipeline: "Pipeline", request: GenerationRequest, source: Image.Image | None, steps_folder: Path | None
) -> Image.Image:
    """One picture, under a progress bar where somebody looks at one."""
    stepwise = Stepwise(pipeline, request, steps_folder) if steps_folder else None
    with tqdm(total=request.steps_made, desc=f"seed {request.seed}", unit="step", disable=no_bars()) as bar:

        def on_step(step: "Step") -> None:
            bar.update()
            if stepwise is not None:
                stepwise(step)

        try:
            return pipeline.draw(request, source, on_step)
        finally:
            if stepwise is not None:
                stepwise.save_sheet()
