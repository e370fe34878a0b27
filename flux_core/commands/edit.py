"""`edit`: draw a source and its edits by Stable Flow, and save them as single pictures and as a strip."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import UsageError
from ..files import prepare_folder
from ..images.given import natural_size, pop_given, size_notes, with_image
from ..images.output import save_picture
from ..images.pictures import fit_note, grid, open_source
from ..request.fields import DEVICE, FIELDS, FILES, FIT, LOADING, OUTPUT_DIR, THREADS, pop_fields
from ..request.generation import GenerationRequest
from ..request.plans import given_plan
from ..terminal import no_bars, note, tell
from ..vision.maps import check_maps
from .loras import checked_plan, entries_of
from .table import EDIT

if TYPE_CHECKING:
    from ..methods.stable_flow import Editing
    from ..sampling import Step

_FIELDS = {field.name: field for field in EDIT}
PHOTO_GUIDANCE = (1.0, 3.0)
"""guidance of a photograph as the source, and of its edits, as in the released code"""
STARTS = ("init_image", "strength", "mask", "mask_padding", "pad")
"""fields of a source that is drawn from a picture, or painted into one"""


def edit(
    source: str | None = None,
    edit: list[str] | None = None,
    image: str | None = None,
    layers: str | None = None,
    source_guidance: str | None = None,
    nudge: str | None = None,
    replay: str | None = None,
    fit: str | None = None,
    output_dir: str = OUTPUT_DIR.default,
    device: str = DEVICE.default,
    offload: bool = False,
    vae_tiling: bool = False,
    threads: str | None = None,
    **fields: Any,
) -> list[Path]:
    """Draw a source and its edits. Returns the paths of the strip, the source and the edits.

    UsageError for wrong arguments, FileError for a photograph or layers that cannot be read, DiskError.
    """
    if not source or not edit:
        raise UsageError('an edit needs a source and an edit. Next: --source "a pig face" --edit "a green pig face"')
    for flag, text in (("--source", source), *(("--edit", text) for text in edit)):
        if not text.strip():
            raise UsageError(f"{flag} has no words. Next: say what it shows")
    loading = pop_fields(fields, LOADING)
    variant = with_files(fields.pop("name", None), **pop_fields(fields, FILES))
    if variant.takes.mask:  # which paints into it, and inverts none
        with_image(fields, image, variant)
        image = None
    if image is not None and variant.takes and not {"control", "reference"} & fields.keys():
        note(f"--image is the photograph that is inverted; what {variant.name} takes is given beside it")
    guided = variant.params.guidance_embed
    if source_guidance is not None and not guided:
        raise UsageError(f"{variant.name} takes no guidance. Next: leave --source-guidance out")
    photo, origin = open_source(image)
    if photo is not None:
        if guided:
            fields.setdefault("guidance", PHOTO_GUIDANCE[1])
        if others := [FIELDS[key].flag for key in STARTS if key in fields]:
            raise UsageError(
                f"--image is inverted to the noise that it starts from: leave out {', '.join(others)}. Next: "
                "--init-image, to start from the picture itself"
            )
    elif fit and "init_image" in fields:
        fields["fit"] = fit
    plan = given_plan(fields)
    fields["plan"] = (*checked_plan(plan, variant), *entries_of(fields, variant))
    pictures, records = pop_given(fields, variant)
    fields |= {**records, **natural_size(fields, pictures, variant)}
    request = GenerationRequest(name=variant.name, prompt=source, **fields)
    pictures.check(request)
    check_maps(name for name, _ in pictures.maps(request))
    fitting = _FIELDS["fit"].parse(fit, FIT)
    shape = fit_note(photo, request.width, request.height, fitting) if photo is not None else None
    idle = {} if photo is not None else {"fit": None if request.init_image else fit, "nudge": nudge, "replay": replay}
    unused = [f"{_FIELDS[key].flag} does nothing without a photograph" for key, value in idle.items() if value]
    for line in [*request.notes(), *size_notes(request, pictures), *unused, *([shape] if shape else [])]:
        note(line)
    guidance = _FIELDS["source_guidance"].parse(
        source_guidance, PHOTO_GUIDANCE[0] if photo is not None and guided else None
    )
    factor, mode = (
        _FIELDS[key].parse(value, _FIELDS[key].default) for key, value in (("nudge", nudge), ("replay", replay))
    )
    blocks, num_threads = choose_layers(layers, request), THREADS.parse(threads)
    folder = prepare_folder(output_dir)
    check_files(variant)
    if not variant.embedded:
        note(variant.licence_line)

    from ..methods.stable_flow import Editing  # and with it torch
    from ..pipeline import load_pipeline

    set_threads(num_threads)
    pipeline = load_pipeline(variant, device, request.dtype, offload, vae_tiling, t5_dtype=request.t5_dtype, **loading)
    pipeline.given = pictures
    job = Editing(pipeline, request, edit, blocks, guidance, origin, fitting)
    tell(f"{job.request.settings()}, seed {request.seed}, {len(blocks)} blocks shared, on {pipeline.device}")
    pipeline.encode_ahead([request.model_copy(update={"prompt": prompt}) for prompt in (source, *edit)], last=True)
    return _save(job, _draw(job, photo, factor, mode), folder)


def choose_layers(layers: str | None, request: GenerationRequest) -> list[str]:
    """The blocks of --layers; without it the vital blocks if they are known, else all, with a note."""
    from ..hooks.layers import VITAL, layers_of

    if layers is None and request.name not in VITAL:
        note(f"no vital layers are known for {request.name}: keys and values are shared in all blocks")
    choice = layers or ("vital" if request.name in VITAL else "all")
    return layers_of(choice, request.name, request.variant.params)


def _draw(job: "Editing", photo: Image.Image | None, nudge: float, replay: str) -> list[Image.Image]:
    """The source and the edits, drawn with a progress bar."""
    with tqdm(total=job.request.num_forward_steps, desc="edits", unit="step", disable=no_bars()) as bar:

        def on_step(step: "Step") -> None:
            bar.update(step.index + 1 - bar.n)

        x = job.generated(on_step) if photo is None else job.of_photo(photo, nudge, replay, on_step)  # type: ignore
    return [job.picture(tokens, i) for i, tokens in enumerate(x)]


def _save(job: "Editing", pictures: list[Image.Image], folder: Path) -> list[Path]:
    """Save the strip and the pictures, print their paths and return them."""
    stem = f"{job.request.name}_seed{job.request.seed}"
    strip = save_picture(grid(pictures, len(pictures)), folder, f"{stem}_strip")
    named = zip(pictures, job.branches, strict=True)
    paths = [save_picture(picture, folder, f"{stem}_{branch}") for picture, branch in named]
    maps = job.pipeline.denoiser.maps.pictures(job.request, job.pipeline.given)
    for path in (strip, *paths, *(save_picture(map, folder, f"{stem}_{name}") for name, map in maps)):
        tell(str(path))
    return [strip, *paths]
