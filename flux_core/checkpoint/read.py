"""From files to a model: built on `meta`, filled tensor by tensor, each at once on its device and in its dtype.

So there is never a second copy of the model in memory; on the CPU, tensors that keep their dtype stay mapped from the
file until they are used. Official names, ComfyUI's prefix and all-in-one file, and diffusers' layout are all read;
names and shapes are compared with the header before a byte of weights is read.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import FileError
from ..model import AutoEncoder, Flux
from ..variants import Variant
from .files import ae_path, flow_path
from .identify import Identity, Part, Shapes, identify
from .keymaps import Params, diffusers_shapes, streamed_from_diffusers
from .source import Source, find_source
from .tensors import DTYPES, opened

M = TypeVar("M", bound=nn.Module)


def load_flux(variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Flux:
    """The transformer of that name, weights loaded and frozen. FileError says what does not fit."""
    with torch.device("meta"):
        model = Flux(variant.params)
    return _fill(model, "transformer", variant.params, flow_path(variant), device, dtype)


def load_autoencoder(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """The autoencoder of that name, likewise."""
    with torch.device("meta"):
        model = AutoEncoder(variant.ae_params)
    return _fill(model, "autoencoder", variant.ae_params, ae_path(variant), device, dtype)


def _fill(model: M, part: Part, params: Params, path: Path, device: torch.device | str, dtype: torch.dtype) -> M:
    model.load_state_dict(dict(stream(path, part, model.state_dict(), params, device, dtype)), assign=True)
    return model.eval().requires_grad_(False)


def stream(
    path: Path,
    part: Part,
    state: Mapping[str, Tensor],
    params: Params,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network by their official names, on `device` and in `dtype`, once the headers fit.

    state: the network's, on `meta`. A file that holds other parts, too, is read for this one.
    """
    source = find_source(path)
    found = identify(source.shapes, part)
    official = {name: tuple(x.shape) for name, x in state.items()}
    expected = diffusers_shapes(state, params) if found.layout == "diffusers" else official
    mine = {name: x for name, x in source.shapes.items() if name.startswith(found.prefix)}
    _check(source, found, part, {name.removeprefix(found.prefix): x for name, x in mine.items()}, expected)
    _check_dtypes(path, {name: dtype for name, dtype in source.dtypes.items() if name in mine})
    quiet = source.size < 10**9 or not sys.stderr.isatty()
    with (
        opened(source, device) as get,
        tqdm(total=source.size, unit="B", unit_scale=True, desc=f"reading {path.name}", disable=quiet) as bar,
    ):

        def take(name: str) -> Tensor:
            tensor = get(found.prefix + name)
            bar.update(tensor.nbytes)
            return tensor

        if found.layout == "diffusers":
            yield from ((name, x.to(dtype)) for name, x in streamed_from_diffusers(take, params))
        else:
            yield from ((name, take(name).to(dtype)) for name in official)


def _check(source: Source, found: Identity, part: Part, shapes: Shapes, expected: Shapes) -> None:
    """FileError if the files do not hold just the tensors expected."""
    other = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    findings = [
        _listing("missing", [name for name in expected if name not in shapes]),
        _listing("unexpected", [name for name in shapes if name not in expected]),
        _listing("of another shape", other),
    ]
    if any(findings):
        where = "FLUX_AE" if part == "autoencoder" else "FLUX_MODEL"
        raise FileError(
            f"{source.path} does not hold the tensors of this model: {'; '.join(filter(None, findings))}. "
            f"This is {found.text}. Next: check --name and {where}."
        )


def _listing(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    foreign = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]
    if foreign:
        raise FileError(f"{path}: {_listing('tensors that are no bf16, fp16 or fp32', foreign)}.")
