"""`save`: a model's weights as a folder, in the official files or in the layout of diffusers."""

from pathlib import Path

from ..checkpoint import check_files, with_files
from ..errors import UsageError
from ..terminal import note

FORMATS = ("official", "diffusers")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def save(
    name: str | None = None,
    format: str = "diffusers",
    dtype: str = "bf16",
    output: Path | str | None = None,
    **files: str | Path | None,
) -> Path:
    """Write the model of that name to the folder `output`, which must be new or empty, and return its path.

    format: `official` (two safetensors files, and folders for the text encoders) or `diffusers` (what
    `FluxPipeline.from_pretrained` opens); dtype: bf16, fp16 or fp32. Without `output`:
    `output/NAME-FORMAT-DTYPE`. UsageError, FileError, AccessError or DiskError, and then no folder.
    """
    variant = with_files(name, **files)
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: there are {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}.")
    folder = Path(output).expanduser() if output else Path("output") / f"{variant.name}-{format}-{dtype}"

    check_files(variant)
    if not variant.embedded:
        note(variant.licence_line)

    import torch  # only now: a wrong argument should not wait for it

    from ..checkpoint.files import text_files
    from ..checkpoint.layouts import write_diffusers, write_official
    from ..checkpoint.write import new_folder

    kind = getattr(torch, DTYPES[dtype])
    write = write_official if format == "official" else write_diffusers
    with new_folder(folder) as part:
        write(part, variant, text_files(variant), kind)
    return folder
