"""`lora info`, `lora convert`, `lora merge`, `lora extract`: LoRA files without a picture."""

from pathlib import Path

from ..checkpoint.contents import listing
from ..errors import FileError, UsageError
from ..files import user_path
from ..images.metadata import printable
from ..lora.describe import best_fit, describe
from ..terminal import note, tell
from .table import LORA_CONVERT

_CONVERT = {field.name: field for field in LORA_CONVERT}


def print_info(file: str) -> None:
    """Print what a LoRA holds: dialect, ranks, alphas, modules, the models that it fits, metadata."""
    tell(printable("\n".join(describe(file))))


def convert(source: str | Path, target: str | Path, to: str | None = None, allow_partial: bool = False) -> Path:
    """Write the LoRA `source` to the new file `target` in the dialect official, diffusers or kohya; return its path.

    allow_partial: leave out what that dialect cannot say, with a note. UsageError, FileError, DiskError, and then no
    file is written.
    """
    if to is None:
        raise UsageError("--to is missing. Next: say --to official, diffusers or kohya.")
    to = _CONVERT["to"].parse(to)
    path = _new_file(target)
    lora, variants, reason = best_fit(source)
    if not variants:
        raise FileError(reason)

    from ..checkpoint.write import write_safetensors
    from ..lora.convert import convert as converted

    found = converted(lora, variants[0].params, to)  # type: ignore[arg-type]
    if found.left_out:
        what = listing(f"modules that the dialect {to} cannot say", found.left_out)
        if not found.tensors:
            raise UsageError(f"{source} has only {what}. Next: name another dialect with --to.")
        if not allow_partial:
            raise UsageError(
                f"{source} has {what}. Next: name another dialect, or leave them out with --allow-partial."
            )
        note(f"left out: {what}")
    write_safetensors(path, found.tensors, found.metadata)
    return path


def _new_file(path: str | Path) -> Path:
    """A path to write a file to. UsageError where something is there already, or its folder is not."""
    path = user_path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is no name of a LoRA. Next: end it with .safetensors.")
    if path.exists():
        raise UsageError(f"{path} exists already and is left as it is. Next: name another file.")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is no folder. Next: make it, or name a file in another one.")
    return path


def print_converted(source: str, target: str, **flags: object) -> None:
    """Run `convert` and print its file."""
    tell(str(convert(source, target, **flags)))  # type: ignore[arg-type]
