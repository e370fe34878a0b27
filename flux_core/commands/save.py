"""`save`: write a model's weights to a folder, as the official files or in the layout of diffusers."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import check_files, with_files
from ..checkpoint.check import check_alone
from ..checkpoint.files import flow_path
from ..checkpoint.source import find_source
from ..device.budget import bytes_of
from ..device.threads import set_threads
from ..errors import UsageError
from ..files import user_path
from ..request.fields import FORMATS
from ..request.generation import GenerationRequest
from ..request.prompt_lines import read_lines
from ..terminal import note, tell
from ..variants import Variant
from .table import GGUF_DTYPES, SAVE, SAVED_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

MIXED = "mixed"
MEASURED = 4
"""pictures of our own prompts by which blocks are measured"""
_FIELDS = {field.name: field for field in SAVE}


def save(
    name: str | None = None,
    format: str | None = None,
    dtype: str = _FIELDS["dtype"].default,
    output: Path | str | None = None,
    calibrate: str | None = None,
    budget: str | None = None,
    importance: str | None = None,
    **files: str | Path | None,
) -> Path:
    """Write the model of that name to the folder `output`, which must be new or empty, and return its path.

    format: `official` (two safetensors files, and folders for the text encoders), `diffusers` (what
    `FluxPipeline.from_pretrained` opens; the default, except for formats in few bits, which it cannot hold), or `gguf`
    (official, with the transformer as a GGUF file; the default for its types); dtype: bf16, fp16, fp32, or what most of
    the transformer's Linears get (fp8, int8, nf4, q8_0, …), with everything else in bf16; calibrate: a file of prompts,
    with whose pictures fp8 is rounded (`linears/gptq.py`), or blocks are measured for "mixed": a type of GGUF for each
    block, within a budget of bytes (`methods/mixing.py`), weighted by the importance.json of a study. Without `output`:
    `output/NAME-FORMAT-DTYPE`. UsageError, FileError, AccessError or DiskError, and then no folder is made.
    """
    variant = with_files(name, **files)
    check_alone(variant)
    packed = dtype if _FIELDS["dtype"].parse(dtype) in FORMATS else None
    blocks = dtype.upper() if dtype in (*GGUF_DTYPES, MIXED) else None
    format = _FIELDS["format"].parse(format, "gguf" if blocks else "official" if packed else "diffusers")
    if packed and format == "diffusers":
        raise UsageError(
            f"--format diffusers has no {packed} as it is here. Next: use --format official, or --dtype bf16."
        )
    if (format == "gguf") != bool(blocks):
        raise UsageError(
            f"--format gguf goes with --dtype {', '.join(GGUF_DTYPES)} or {MIXED}, and these with it. Next: give "
            "both or neither."
        )
    if calibrate is not None and dtype not in ("fp8", MIXED):
        raise UsageError("--calibrate says how fp8 is rounded. Next: add --dtype fp8, or leave it out.")
    if (dtype == MIXED) != (budget is not None) or (importance is not None and dtype != MIXED):
        raise UsageError(
            f"--dtype {MIXED} goes with --budget, as in --budget 7GB, and only it has --budget and --importance."
        )
    requests = _calibration_requests(variant, calibrate) if calibrate is not None else []
    mixture = None if budget is None else Mixture(variant, bytes_of(budget, "--budget"), requests, importance)
    folder = user_path(output) if output else Path("output") / f"{variant.name}-{format}-{dtype}"

    check_files(variant)
    if requests and packed and _is_fp8(flow_path(variant)):
        raise UsageError(
            f"{flow_path(variant)} is in fp8 already, which --calibrate cannot round. Next: give the bf16 file."
        )
    if not variant.embedded:
        note(variant.licence_line)

    import torch  # only now, so that errors in arguments appear at once

    from ..checkpoint.files import text_files
    from ..checkpoint.layouts import write_diffusers, write_gguf_model, write_official
    from ..checkpoint.write import new_folder

    kind = getattr(torch, SAVED_DTYPES[dtype])
    kinds = mixture.kinds() if mixture is not None else None
    with new_folder(folder) as part:
        if format == "diffusers":
            write_diffusers(part, variant, text_files(variant), kind)
        elif blocks:
            most = Counter(kinds.values()).most_common(1)[0][0] if kinds else blocks
            write_gguf_model(part, variant, text_files(variant), kind, most, kinds)
        else:
            codes, rounding = _calibrated(variant, requests), f"GPTQ (arXiv 2210.17323) on {len(requests)} pictures"
            write_official(part, variant, text_files(variant), kind, packed, codes, rounding)
    return folder


class Mixture:
    """What a mixed file is chosen by. UsageError where the budget is too small, before anything is loaded."""

    def __init__(
        self, variant: Variant, budget: int, requests: list[GenerationRequest], importance: str | None
    ) -> None:
        from ..methods.mixing import choose, read_importance, sizes_of

        self.variant, self.budget, self.requests = variant, budget, requests
        self.sizes, self.rest = sizes_of(variant.params)
        nothing = {block: dict.fromkeys(of, 0.0) for block, of in self.sizes.items()}
        choose(nothing, self.sizes, self.rest, budget)
        self.importance = importance and read_importance(user_path(importance), variant.name, variant.params)

    def kinds(self) -> Mapping[str, str]:
        """A type for each block, measured on the best device; the plan is printed."""
        from ..device.choice import dtype_name, pick_device, pick_dtype
        from ..methods.importance import PROMPTS
        from ..methods.mixing import choose, describe, measured, weighted
        from ..pipeline import load_pipeline

        set_threads(None)
        dense = dtype_name(pick_dtype(None, pick_device(None)))  # of a file in few bits, too
        pipeline = load_pipeline(self.variant, dtype=dense)
        requests = self.requests or _calibration_requests(self.variant, str(PROMPTS / "calibration.txt"))[:MEASURED]
        errors = measured(pipeline, [pipeline.complete(request) for request in requests])
        if self.importance:
            errors = weighted(errors, self.importance)
        mix = choose(errors, self.sizes, self.rest, self.budget)
        for line in describe(mix, errors, self.sizes):
            tell(line)
        return mix.kinds


def _calibration_requests(variant: Variant, file: str) -> list[GenerationRequest]:
    """The pictures to calibrate on. Seed: the line's own, or its position. UsageError with the line's number."""
    requests = [line.request({"name": variant.name, "seed": i}) for i, line in enumerate(read_lines(file))]
    return [picture for request in requests for picture in request.images()]


def _is_fp8(path: Path) -> bool:
    """Whether the transformer in that file or folder has weights in fp8."""
    source = find_source(path)
    prefix = source.identity().prefix
    return any(kind.startswith("F8") for name, kind in source.dtypes.items() if name.startswith(prefix))


def _calibrated(variant: Variant, requests: list[GenerationRequest]) -> dict[str, "Tensor"]:
    """The calibrated fp8 codes of the weights. Loads the model on the best device to draw these pictures."""
    if not requests:
        return {}
    from ..methods.calibration import calibrated
    from ..pipeline import load_pipeline

    set_threads(None)
    return calibrated(load_pipeline(variant), requests)


def print_saved(**flags: Any) -> None:
    """Run `save` and print its folder."""
    tell(str(save(**flags)))
