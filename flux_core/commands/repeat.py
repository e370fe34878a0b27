"""`repeat`: draw a recorded picture again, from a row of metadata.csv, from the picture itself, or from its latents.

The same request, weights and machine give the same pixels; a line says whether they are the same. Latents are only
decoded, and only the autoencoder is loaded.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import FileError, UsageError
from ..files import prepare_folder
from ..hooks import Intervention
from ..images.metadata import describe, differences, parse_request, read_request
from ..images.output import save_picture
from ..images.pictures import as_rgb, crop_centre, open_picture
from ..request.fields import DEVICE, FIELDS, FILES, LOADING, OUTPUT_DIR, PICTURE_FILES, THREADS, pop_fields
from ..request.generation import DRAWN_BY, GenerationRequest
from ..request.plans import load_again
from ..session.record import read_rows
from ..terminal import note, one_line, tell
from ..variants import Variant
from .loras import found_again
from .table import REPEAT

_FIELDS = {field.name: field for field in REPEAT}


@dataclass(frozen=True)
class Recorded:
    """A recorded picture: its file, which may be missing, its request (None: in the latents), its SHA-256."""

    picture: Path
    request: GenerationRequest | None = None
    sha256: str | None = None


def repeat(
    file: str,
    row: str | None = None,
    from_latents: bool = False,
    output_dir: str = OUTPUT_DIR.default,
    device: str = DEVICE.default,
    offload: bool = False,
    vae_tiling: bool = False,
    threads: str | None = None,
    force: bool = False,
    allow_empty_prompt: bool = False,
    **files: Any,
) -> Path:
    """Draw the picture that a file records. Returns the new picture's file.

    UsageError for wrong flags or records, FileError for files that cannot be read, DiskError.
    """
    recorded = _recorded(Path(file), _FIELDS["row"].parse(row))
    latents = recorded.picture.parent / (recorded.picture.name.removesuffix(".png") + ".safetensors")
    if from_latents and not latents.is_file():
        raise FileError(f"{latents} does not exist. Next: leave out --from-latents, and the picture is denoised again")
    request = recorded.request or _request_in(latents)
    for line in request.functions:
        note(f"an intervention that the picture's file cannot hold is missing: {one_line(line)}")
    if flags := [f"{FIELDS[x].flag} {FIELDS[x].metavar}" for x in PICTURE_FILES if getattr(request, x)]:
        raise UsageError(f"{file} was made from a picture: python cli.py --from-image {file} {' '.join(flags)}")
    loading = pop_fields(files, LOADING)
    looks = load_again(files, () if from_latents else request.hooks, "the picture")
    if others := [entry.kind for entry in looks if entry.changes_pixels]:
        raise UsageError(f"the picture has a plan of its own, and --plan adds {others[0]}. Next: --from-image {file}")
    variant, given = with_files(request.name, **pop_fields(files, FILES)), files.pop("lora", None)
    fields = request.model_dump(exclude=set(DRAWN_BY))
    if given or (request.loras and not from_latents):
        fields["plan"] = (*request.hooks, *found_again(request.loras, given or (), variant, "the picture"))
    new = GenerationRequest(**fields, force=force, allow_empty_prompt=allow_empty_prompt)  # no file may grant these
    folder, num_threads = prepare_folder(output_dir), THREADS.parse(threads)
    set_threads(num_threads)
    if from_latents or recorded.request is None:
        image = _decode(latents, variant, device, vae_tiling)
    else:
        if new.batch is not None:
            new.batch.check_again()
            note(new.batch.told)
        check_files(variant)
        image = _draw(new, request, variant, device, offload, vae_tiling, loading, looks)
    path = save_picture(image, folder, f"{request.name}_seed{request.seed}")
    tell(str(path))
    _compare(path, recorded)
    return path


def _recorded(file: Path, row: int | None) -> Recorded:
    """The picture that a table's row, a latents file or a PNG records. UsageError, FileError."""
    if file.suffix == ".csv":
        rows = read_rows(file)
        if row is None or row > len(rows):
            raise UsageError(f"{file} has {len(rows)} row(s): say which with --row, as in --row 1")
        cells = rows[row - 1]
        request = parse_request(cells["Request"], f"{file}, row {row}")
        return Recorded(file.parent / cells["File"], request, cells["SHA256"])
    if row is not None:
        raise UsageError(f"--row goes with a metadata.csv, and {file} is not a CSV file")
    if file.suffix == ".safetensors":
        return Recorded(file.parent / (file.name.removesuffix(".safetensors") + ".png"))
    return Recorded(file, read_request(file))


def _request_in(latents: Path) -> GenerationRequest:
    from ..session.latents import read_latents  # and with it torch

    return read_latents(latents)[1]


def _draw(
    request: GenerationRequest,
    old: GenerationRequest,
    variant: Variant,
    device: str,
    offload: bool,
    vae_tiling: bool,
    loading: dict[str, Any],
    looks: Sequence[Intervention] = (),
) -> Image.Image:
    """The picture of a request. Notes say why its pixels may differ from those of the `old` request.

    loading: the flags of `fields.LOADING`. looks: interventions that only read.
    """
    from ..pipeline import load_pipeline  # and with it torch

    if not variant.embedded:
        note(variant.licence_line)
    pipeline = load_pipeline(variant, device, request.dtype, offload, vae_tiling, t5_dtype=request.t5_dtype, **loading)
    request = pipeline.complete(request)
    for reason in differences(old, request):
        note(f"pixels may differ: {reason}")
    tell(f"{request.settings()}, seed {request.seed}, {request.dtype} on {pipeline.device}")
    pipeline.encode_ahead([request], last=True)
    return pipeline.draw(request, None, None, looks)


def _decode(file: Path, variant: Variant, device: str, vae_tiling: bool) -> Image.Image:
    """The picture that a latents file decodes to; loads only the autoencoder."""
    from ..device.choice import pick_device, pick_dtype
    from ..pipeline.load import load_codec
    from ..session.latents import read_latents

    x, request = read_latents(file)
    place = pick_device(device)
    codec = load_codec(variant, place, pick_dtype(request.dtype, place), vae_tiling)
    image = codec.decode(x.to(place, codec.dtype), *request.padded_size)
    return describe(crop_centre(image, request.width, request.height), request)


def _compare(path: Path, recorded: Recorded) -> None:
    """Print whether the new file has the bytes, or else the pixels, of the recorded picture."""
    old, data = recorded.picture, path.read_bytes()
    if recorded.sha256 == hashlib.sha256(data).hexdigest() or (old.is_file() and old.read_bytes() == data):
        tell("the same picture, byte for byte")
    elif not old.is_file():
        note("other bytes than the recorded file, which is missing, so that pixels cannot be compared")
    elif _pixels(old) == _pixels(path):
        tell(f"the same pixels as {old}")
    else:
        note(f"other pixels than {old}")


def _pixels(path: Path) -> bytes:
    return as_rgb(open_picture(path)[0], str(path)).tobytes()
