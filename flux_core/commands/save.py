"""`save`: a model's weights as a folder, in the official files or in the layout of diffusers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import check_files, with_files
from ..checkpoint.files import flow_path
from ..checkpoint.identify import identify
from ..checkpoint.source import find_source
from ..device.threads import set_threads
from ..errors import UsageError
from ..files import user_path
from ..request.generation import GenerationRequest
from ..request.prompt_lines import read_lines
from ..terminal import note, tell
from ..variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("official", "diffusers")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "bfloat16"}
"""what the weights become; of fp8, those that are not quantized"""


def save(
    name: str | None = None,
    format: str | None = None,
    dtype: str = "bf16",
    output: Path | str | None = None,
    calibrate: str | None = None,
    **files: str | Path | None,
) -> Path:
    """Write the model of that name to the folder `output`, which must be new or empty, and return its path.

    format: `official` (two safetensors files, and folders for the text encoders) or `diffusers` (what
    `FluxPipeline.from_pretrained` opens; the default, but for fp8, which it does not know); dtype: bf16, fp16, fp32, or
    fp8: the transformer's Linears as `linears/fp8.py` has them, all else in bf16; calibrate: a file of prompts, by
    whose pictures fp8 is rounded (`linears/gptq.py`). Without `output`: `output/NAME-FORMAT-DTYPE`. UsageError,
    FileError, AccessError or DiskError, and then no folder.
    """
    variant = with_files(name, **files)
    fp8 = dtype == "fp8"
    format = format or ("official" if fp8 else "diffusers")
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: there are {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}.")
    if fp8 and format == "diffusers":
        raise UsageError(
            "--format diffusers has no fp8 with a scale for each row. Next: use --format official, or --dtype bf16."
        )
    if calibrate is not None and not fp8:
        raise UsageError("--calibrate says how fp8 is rounded. Next: add --dtype fp8, or leave it out.")
    requests = _requests(variant, calibrate) if calibrate is not None else []
    folder = user_path(output) if output else Path("output") / f"{variant.name}-{format}-{dtype}"

    check_files(variant)
    if requests and _is_fp8(flow_path(variant)):
        raise UsageError(
            f"{flow_path(variant)} is in fp8 already, and --calibrate rounds what is not. Next: give the bf16 file."
        )
    if not variant.embedded:
        note(variant.licence_line)

    import torch  # only now: a wrong argument should not wait for it

    from ..checkpoint.files import text_files
    from ..checkpoint.layouts import write_diffusers, write_official
    from ..checkpoint.write import new_folder

    kind = getattr(torch, DTYPES[dtype])
    with new_folder(folder) as part:
        if format == "diffusers":
            write_diffusers(part, variant, text_files(variant), kind)
        else:
            codes, rounding = _calibrated(variant, requests), f"GPTQ (arXiv 2210.17323) on {len(requests)} pictures"
            write_official(part, variant, text_files(variant), kind, fp8, codes, rounding)
    return folder


def _requests(variant: Variant, file: str) -> list[GenerationRequest]:
    """The pictures to calibrate on: a line's own seed, or its place. UsageError names the line."""
    requests: list[GenerationRequest] = []
    for place, line in enumerate(read_lines(file)):
        try:
            request = GenerationRequest(**{"name": variant.name, "seed": place, **line.fields})
        except UsageError as error:
            raise UsageError(f"{line.where}: {error}") from None
        requests += request.images()
    return requests


def _is_fp8(path: Path) -> bool:
    """Whether the transformer in that file or folder has weights in fp8."""
    source = find_source(path)
    prefix = identify(source.shapes, "transformer").prefix
    return any(kind.startswith("F8") for name, kind in source.dtypes.items() if name.startswith(prefix))


def _calibrated(variant: Variant, requests: list[GenerationRequest]) -> dict[str, "Tensor"]:
    """The codes of its weights by these pictures, for which the model is loaded on the best device there is."""
    if not requests:
        return {}
    from ..methods.calibration import calibrated
    from ..pipeline import load_pipeline

    set_threads(None)
    return calibrated(load_pipeline(variant), requests)


def print_saved(**flags: Any) -> None:
    """`save`, and its folder on standard output."""
    tell(str(save(**flags)))
