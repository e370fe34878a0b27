"""`save`: a model's weights as a folder, in the official files or in the layout of diffusers."""

from pathlib import Path

from ..checkpoint import check_files, with_files
from ..errors import UsageError
from ..terminal import note

FORMATS = ("official", "diffusers")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "bfloat16"}
"""what the weights become; of fp8, those that are not quantized"""


def save(
    name: str | None = None,
    format: str | None = None,
    dtype: str = "bf16",
    output: Path | str | None = None,
    **files: str | Path | None,
) -> Path:
    """Write the model of that name to the folder `output`, which must be new or empty, and return its path.

    format: `official` (two safetensors files, and folders for the text encoders) or `diffusers` (what
    `FluxPipeline.from_pretrained` opens; the default, but for fp8, which it does not know); dtype: bf16, fp16, fp32, or
    fp8: the transformer's Linears as `linears/fp8.py` has them, all else in bf16. Without `output`:
    `output/NAME-FORMAT-DTYPE`. UsageError, FileError, AccessError or DiskError, and then no folder.
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
    folder = Path(output).expanduser() if output else Path("output") / f"{variant.name}-{format}-{dtype}"

    check_files(variant)
    if not variant.embedded:
        note(variant.licence_line)

    import torch  # only now: a wrong argument should not wait for it

    from ..checkpoint.files import text_files
    from ..checkpoint.layouts import write_diffusers, write_official
    from ..checkpoint.write import new_folder

    kind = getattr(torch, DTYPES[dtype])
    with new_folder(folder) as part:
        if format == "official":
            write_official(part, variant, text_files(variant), kind, fp8)
        else:
            write_diffusers(part, variant, text_files(variant), kind)
    return folder
