"""From files to a model: built on `meta`, filled tensor by tensor, each at once on its device and in its dtype.

So there is never a second copy of the model in memory; on the CPU, tensors that keep their dtype stay mapped from the
file until they are used. What becomes fp8 is quantized as it is read: the model is never there in bf16. Official names,
ComfyUI's prefix and all-in-one file, and diffusers' layout are all read; names and shapes are compared with the header
before a byte of weights is read.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, starmap
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..errors import FileError
from ..linears.fp8 import quantize
from ..model import AutoEncoder, Flux
from ..terminal import note
from ..variants import Variant
from .files import HOMES, ae_path, flow_path
from .identify import WHOLE, Identity, Part, Shapes, identify
from .keymaps import Params, diffusers_shapes, pairs_of, streamed_from_diffusers
from .scales import as_fp8, find_scales, widen
from .source import Source, Span, find_source
from .tensors import DTYPES, opened

M = TypeVar("M", bound=nn.Module)

OTHERS = (*WHOLE.values(), "first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema.")
"""beginnings of what a file may hold besides the network that is looked for"""


def load_flux(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, fp8: bool = False
) -> Flux:
    """The transformer of that name, weights loaded and frozen. FileError says what does not fit.

    fp8: most of its Linears as `linears.fp8` has them, the rest in `dtype`.
    """
    with torch.device("meta"), Undrawn():
        model = Flux(variant.params)
    return _fill(model, "transformer", variant.params, flow_path(variant), device, dtype, fp8)


def load_autoencoder(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """The autoencoder of that name, likewise."""
    with torch.device("meta"), Undrawn():
        model = AutoEncoder(variant.ae_params)
    return _fill(model, "autoencoder", variant.ae_params, ae_path(variant), device, dtype)


class Undrawn(TorchFunctionMode):
    """Modules made inside draw no first numbers: even on `meta` that is half of the time that making them takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _fill(
    model: M,
    part: Part,
    params: Params,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    fp8: bool = False,
) -> M:
    state = model.state_dict()
    coded = {f"{name}.weight" for name in quantize(model)} if fp8 else ()
    model.load_state_dict(dict(stream(path, part, state, params, device, dtype, coded)), assign=True)
    return model.eval().requires_grad_(False)


def stream(
    path: Path,
    part: Part,
    state: Mapping[str, Tensor],
    params: Params,
    device: torch.device | str,
    dtype: torch.dtype,
    coded: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network by their official names, on `device` and in `dtype`, once the headers fit.

    state: the network's, on `meta`. A file that holds other parts, too, is read for this one. coded: the weights that
    come as e4m3, with a `weight_scale` behind each. No more than one of them is there unquantized at a time. They come
    in the order in which they lie in the files, or their first parts do.
    """
    source, found = fitting(path, part, state, params)
    scales = find_scales(source, found.prefix)
    plain = (name for name in source.dtypes if name.startswith(found.prefix) and name not in scales.names)
    check_dtypes(path, {name: source.dtypes[name] for name in plain}, dtype, fp8=bool(coded))

    def place(name: str) -> Span:
        return source.spans[found.prefix + name]

    pairs = pairs_of(params) if found.layout == "diffusers" else []
    pairs.sort(key=lambda pair: place(pair.diffusers[0]))
    names = [name for pair in pairs for name in pair.diffusers] or sorted(state, key=place)
    order = scales.among(found.prefix + name for name in names)
    quiet = source.size < 10**9 or not sys.stderr.isatty()
    with (
        opened(source, device, order) as get,
        tqdm(total=source.size, unit="B", unit_scale=True, desc=f"reading {path.name}", disable=quiet) as bar,
    ):

        def take(name: str) -> tuple[Tensor, Tensor | None]:
            tensor = get(found.prefix + name)
            bar.update(tensor.nbytes)
            scale = scales.of.get(found.prefix + name)
            return tensor, None if scale is None else get(scale)

        def made(name: str, tensor: Tensor, scale: Tensor | None = None) -> list[tuple[str, Tensor]]:
            if name not in coded:
                return [(name, widen(tensor, scale, dtype))]
            weight, rows = as_fp8(tensor, scale)
            return [(name, weight), (f"{name}_scale", rows)]

        # Written without a loop variable, which would hold on to a tensor while the next is read.
        if found.layout == "diffusers":  # which cuts and joins weights: not as codes
            joined = streamed_from_diffusers(lambda name: widen(*take(name), dtype), pairs, params)
            yield from chain.from_iterable(starmap(made, joined))
        else:
            yield from chain.from_iterable(made(name, *take(name)) for name in names)


def fitting(path: Path, part: Part, state: Mapping[str, Tensor], params: Params) -> tuple[Source, Identity]:
    """The files of a network with what they are, once names and shapes are right. FileError says what is not."""
    source = find_source(path)
    found = identify(source.shapes, part)
    official = {name: tuple(x.shape) for name, x in state.items()}
    expected = diffusers_shapes(state, params) if found.layout == "diffusers" else official
    scales = find_scales(source, found.prefix).names
    mine = {
        name.removeprefix(found.prefix): shape
        for name, shape in source.shapes.items()
        if name.startswith(found.prefix) and name not in scales
    }
    _check(source, found, part, mine, expected)
    return source, found


def _check(source: Source, found: Identity, part: Part, shapes: Shapes, expected: Shapes) -> None:
    """FileError if the files do not hold just the tensors expected."""
    other = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    extra = [name for name in shapes if name not in expected and not name.startswith(OTHERS)]
    findings = [
        _listing("missing", [name for name in expected if name not in shapes]),
        _listing("unexpected", extra),
        _listing("of another shape", other),
    ]
    if any(findings):
        raise FileError(
            f"{source.path} does not hold the tensors of this model: {'; '.join(filter(None, findings))}. "
            f"This is {found.text}. Next: check --name and {HOMES[part].spelled}."
        )


def _listing(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""


def check_dtypes(path: Path, dtypes: Mapping[str, str], dtype: torch.dtype, fp8: bool = False) -> None:
    """FileError for tensors that are no plain weights; a line on stderr where they are read with fewer or more bits."""
    foreign = [f"{name} is {kind}" for name, kind in dtypes.items() if kind not in DTYPES]
    if foreign:
        raise FileError(f"{path}: {_listing('tensors that are no plain bf16, fp16, fp32 or fp8', foreign)}.")
    known = {dtype, torch.bfloat16} | ({torch.float8_e4m3fn} if fp8 else set())
    kinds = sorted({kind for kind in dtypes.values() if DTYPES[kind] not in known})
    if kinds:  # bf16 goes into fp32 without a loss
        word = "fp8" if fp8 else str(dtype).removeprefix("torch.")
        note(f"{path.name} holds {' and '.join(kinds)}; it is read as {word}")
