"""`save`: a model's weights as a folder, in the official files or in the layout of diffusers."""

from pathlib import Path

from ..checkpoint import check_files
from ..errors import UsageError
from ..variants import get_variant

FORMATS = ("official", "diffusers")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def save(name: str, format: str = "diffusers", dtype: str = "bf16", output: Path | str | None = None) -> Path:
    """Write the model of that name to the folder `output`, which must be new or empty, and return its path.

    format: `official` (two safetensors files, and folders for the text encoders) or `diffusers` (what
    `FluxPipeline.from_pretrained` opens); dtype: bf16, fp16 or fp32. Without `output`:
    `output/NAME-FORMAT-DTYPE`. UsageError, FileError, AccessError or DiskError, and then no folder.
    """
    variant = get_variant(name)
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: there are {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}.")
    folder = Path(output).expanduser() if output else Path("output") / f"{name}-{format}-{dtype}"

    check_files(variant)

    import torch  # only now: a wrong argument should not wait for it

    from ..checkpoint.layouts import write_diffusers, write_official
    from ..checkpoint.read import load_autoencoder, load_flux
    from ..checkpoint.write import new_folder
    from ..places import text_folders

    kind = getattr(torch, DTYPES[dtype])
    write = write_official if format == "official" else write_diffusers
    with new_folder(folder) as part:
        flux, ae = load_flux(variant, "cpu", kind), load_autoencoder(variant, "cpu", kind)
        write(part, variant, flux.state_dict(), ae.state_dict(), text_folders(variant), kind)
    return folder
