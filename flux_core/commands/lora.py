"""`lora info`, `lora convert`, `lora merge`, `lora extract`: LoRA files without a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import check_files, with_files
from ..checkpoint.check import check_alone, check_network
from ..checkpoint.contents import Contents, find_contents, listing
from ..checkpoint.files import flow_path
from ..errors import FileError, UsageError
from ..files import user_path
from ..lora.describe import best_fit, describe
from ..lora.dialects import NETWORKS, TEXT
from ..lora.file import LoraFile, check_matched, read_lora, resolve_text, widened_input
from ..params import FluxParams
from ..terminal import note, tell
from ..variants import Variant
from .table import LORA_CONVERT, LORA_EXTRACT, LORA_MERGE, SAVED_DTYPES

if TYPE_CHECKING:
    from ..lora.convert import Dialect
    from ..lora.extract import Extracted

_CONVERT = {field.name: field for field in LORA_CONVERT}
_EXTRACT = {field.name: field for field in LORA_EXTRACT}
_MERGE = {field.name: field for field in LORA_MERGE}


def print_info(file: str) -> None:
    """Print what a LoRA holds: dialect, ranks, alphas, modules, the models that it fits, metadata."""
    tell("\n".join(describe(file)))


def convert(source: str | Path, target: str | Path, to: str | None = None, allow_partial: bool = False) -> Path:
    """Write the LoRA `source` to the new file `target` in the dialect official, diffusers or kohya; return its path.

    allow_partial: leave out what that dialect cannot say, with a note. UsageError, FileError, DiskError, and then no
    file is written.
    """
    if to is None:
        raise UsageError("--to is missing. Next: say --to official, diffusers or kohya.")
    dialect: Dialect = _CONVERT["to"].parse(to)
    path = _new_file(target)
    lora, variants, reason = best_fit(source)
    if not variants:
        raise FileError(reason)

    from ..checkpoint.write import write_safetensors
    from ..lora.convert import convert as converted

    found = converted(lora, variants[0].params, dialect)
    if found.left_out:
        what = listing(f"modules that the dialect {to} cannot say", found.left_out)
        if lora.is_tokens:
            raise UsageError(f"{source} has trained tokens alone, which have no dialects. Next: leave it as it is")
        if not found.tensors:
            raise UsageError(f"{source} has only {what}. Next: name another dialect with --to.")
        if not allow_partial:
            raise UsageError(
                f"{source} has {what}. Next: name another dialect, or leave them out with --allow-partial."
            )
        note(f"left out: {what}")
    write_safetensors(path, found.tensors, found.metadata)
    return path


def merge(
    loras: Sequence[str | Path],
    name: str | None = None,
    scale: float | Sequence[str | float] = 1.0,
    allow_partial: bool = False,
    format: str = _MERGE["format"].default,
    dtype: str = _MERGE["dtype"].default,
    output: str | Path | None = None,
    **files: str | Path | None,
) -> Path:
    """Write the model of that name with these LoRAs in its weights to the folder `output`, and return its path.

    scale: one for all, or one for each. allow_partial: merge what matches. The rest is as for `save`; text encoders'
    modules go into the text encoders that are written. UsageError, FileError, AccessError or DiskError, NonFiniteError,
    and then no folder is made.
    """
    variant, scales = with_files(name, **files), _scales(scale, len(loras))
    check_alone(variant)
    format, dtype = _MERGE["format"].parse(format), _MERGE["dtype"].parse(dtype)
    folder = user_path(output) if output else Path("output") / f"{variant.name}-{format}-{dtype}-merged"
    found = [_read_to_merge(path, variant) for path in loras]
    check_files(variant)
    if not variant.embedded:
        note(variant.licence_line)

    import torch  # only now, so that errors in arguments and headers appear at once

    from ..checkpoint.files import text_files
    from ..checkpoint.layouts import Changes, text_linears, write_diffusers, write_official
    from ..checkpoint.write import new_folder
    from ..lora.merge import merging

    text = text_files(variant)
    linears = text_linears(text)
    found = [resolve_text(lora, {network: linears[network] for network in TEXT}) for lora in found]
    for lora in found:
        check_matched(lora, allow_partial, "--allow-partial")
        if lora.unmatched:
            note(f"left out of {lora.name}: {listing('modules that name nothing in the model', list(lora.unmatched))}")
        if lora.tokens:
            note(f"left out of {lora.name}: {listing('trained tokens', list(lora.tokens))}")
    what = ", ".join(f"{lora.name} at {scale:g}" for lora, scale in zip(found, scales, strict=True))
    write = write_diffusers if format == "diffusers" else write_official
    with new_folder(folder) as part, merging(found, scales) as of:
        changes = Changes({network: of.get(network, {}) for network in NETWORKS}, what)
        write(part, variant, text, getattr(torch, SAVED_DTYPES[dtype]), changes=changes)
    return folder


def _scales(given: float | Sequence[str | float], count: int) -> list[float]:
    """A finite scale for each of so many files. UsageError."""
    values = [given] if isinstance(given, int | float) else given
    scales = [float(_MERGE["scale"].parse(str(value))) for value in values]
    if not all(math.isfinite(scale) for scale in scales):
        raise UsageError(f"--scale must be a number, as in 0.8, not {' '.join(map(str, values))}")
    if len(scales) not in (1, count):
        raise UsageError(f"--scale has {len(scales)} values for {count} files. Next: give one, or one for each.")
    return scales * count if len(scales) == 1 else scales


def _read_to_merge(path: str | Path, variant: Variant) -> LoraFile:
    """The file, which fits the model. FileError, UsageError."""
    lora = read_lora(path, variant.params)
    if lora.is_tokens:
        raise UsageError(f"{path} has trained tokens alone, which no weight has room for. Next: draw with --lora")
    if (width := widened_input(lora, variant.params)) > variant.params.in_channels:
        raise UsageError(
            f"{path} is for a control model: its img_in takes {width} features, and that of {variant.name} "
            f"{variant.params.in_channels}. Next: merge another LoRA."
        )
    return lora


def print_merged(**flags: Any) -> None:
    """Run `merge` and print its folder."""
    tell(str(merge(**flags)))


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


def print_converted(**flags: Any) -> None:
    """Run `convert` and print its file."""
    tell(str(convert(**flags)))


def extract(
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    rank: str | int | None = None,
    output: str | Path | None = None,
    to: str = _EXTRACT["to"].default,
    dtype: str = _EXTRACT["dtype"].default,
    device: str = "auto",
) -> list[str]:
    """Write what `tuned` is more than `base` as a LoRA of that rank to the new file `output`.

    Both are transformers of the same sizes: files, folders, or models' names. Returns lines: the file, and how much of
    the squared difference it holds. UsageError, FileError, DiskError, NonFiniteError, and then no file is written.
    """
    for flag, value in (("base", base), ("tuned", tuned), ("rank", rank), ("output", output)):
        if value is None:
            raise UsageError(f"--{flag} is missing: {_EXTRACT[flag].help}.")
    ranks, dialect = _EXTRACT["rank"].parse(str(rank)), _EXTRACT["to"].parse(to)
    dtype, path = SAVED_DTYPES[_EXTRACT["dtype"].parse(dtype)], _new_file(str(output))
    params, before = _transformer(base, "--base")
    _, after = _transformer(tuned, "--tuned")
    check_network(before, params)
    check_network(after, params)

    import torch

    from ..checkpoint.write import write_safetensors
    from ..device.choice import memory_errors, pick_device
    from ..lora.extract import extract as extracted
    from ..lora.extract import spelled

    kind, place = getattr(torch, dtype), pick_device(device)
    place = torch.device("cpu") if place.type == "mps" else place  # which has no SVD
    with memory_errors("extracting", place, "choose --device cpu"):
        found = extracted(before, after, params, ranks, kind, place)
    if not found.squares and not found.others:
        raise UsageError(f"{base} and {tuned} are the same. Next: name two models that differ.")
    file = spelled(found, params, dialect, kind)
    if not file.tensors:
        raise UsageError(f"{base} and {tuned} differ in biases and norms alone, which the dialect {to} cannot say.")
    lines = _shares(found, ranks, to)
    names = f"{after.source.path.name} less {before.source.path.name}"
    write_safetensors(path, file.tensors, {"extracted": "\n".join([names, *lines])})
    return [str(path), *lines]


def _transformer(path: str | Path | None, flag: str) -> tuple[FluxParams, Contents]:
    """The sizes and tensors of a transformer: of a file, a folder, or a model by its name. FileError, AccessError."""
    try:
        variant = with_files(model=path)
        return variant.params, find_contents(flow_path(variant), "transformer")
    except FileError as error:
        finding = str(error).partition(" Next:")[0].removeprefix("--model ")
        advice = "Next: give a transformer: a file, a folder, or a model's name."
        raise FileError(f"{flag} {finding} {advice}") from None


def _shares(found: "Extracted", rank: int, to: str) -> list[str]:
    """What of the difference is held, for people."""
    worst = ", ".join(f"{name} {share:.2%}" for name, share in found.worst())
    lines = [f"rank {rank} holds {found.share:.4%} of the squared difference of {len(found.squares)} Linears"]
    lines += [f"least of {worst}"] if worst else []
    if found.others:
        kept = "biases are in the file, norms are not" if to == "official" else "they are not in the file"
        lines.append(f"biases and norms are {found.share_of_others:.4%} of the whole: no rank holds them; {kept}")
    return lines


def print_extracted(**flags: Any) -> None:
    """Run `extract` and print its lines."""
    tell("\n".join(extract(**flags)))
