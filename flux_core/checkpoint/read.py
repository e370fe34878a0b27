"""From files to a model: built on `meta`, filled tensor by tensor, each at once on its device and in its dtype.

So there is never a second copy of the model in memory; on the CPU, tensors that keep their dtype stay mapped from the
file until they are used. What becomes fp8 is quantized as it is read: the model is never there in bf16. Official names,
ComfyUI's prefix and all-in-one file, and diffusers' layout are all read; names and shapes are compared with the header
before a tensor is taken.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, starmap
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..errors import FileError
from ..linears.fp8 import Fp8Linear, quantize
from ..model import AutoEncoder, Flux
from ..params import AutoEncoderParams, FluxParams
from ..terminal import note
from ..variants import Variant
from .files import PARTS, ae_path, flow_path
from .identify import WHOLE, Identity, Part, identify
from .keymaps import Pair, Params, diffusers_shapes, pairs_of, streamed_from_diffusers
from .scales import Scales, as_fp8, find_scales, to_dense
from .source import Source, find_source
from .tensors import DTYPES, opened, reserve

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", FluxParams, AutoEncoderParams)

OTHERS = (*WHOLE.values(), "first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema.")
"""beginnings of what a file may hold besides the network that is looked for"""


def load_flux(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, fp8: bool = False
) -> Flux:
    """The transformer of that name, weights loaded and frozen. FileError says what does not fit.

    fp8: most of its Linears as `linears.fp8` has them, the rest in `dtype`.
    """
    return _load(Flux, "transformer", variant.params, flow_path(variant), device, dtype, fp8)


def load_autoencoder(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """The autoencoder of that name, likewise."""
    return _load(AutoEncoder, "autoencoder", variant.ae_params, ae_path(variant), device, dtype)


class skip_init(TorchFunctionMode):
    """Modules made inside draw no first numbers: even on `meta` that is half of the time that making them takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _load(
    kind: Callable[[P], M],
    part: Part,
    params: P,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    fp8: bool = False,
) -> M:
    """A network of these sizes, filled from a file that may hold other parts, too.

    What to read, and in which order, is known from the header: so reading begins before there is a network.
    """
    contents = find_contents(path, part)
    pairs = _in_order(contents, params)
    names = (contents.prefix + name for pair in pairs for name in pair.diffusers)
    with opened(contents.source, device, contents.scales.among(names)) as get:
        with torch.device("meta"), skip_init():
            model = kind(params)
        state = model.state_dict()
        check_fit(contents, state, params)
        kinds = {name: contents.source.dtypes[contents.prefix + name] for name in contents.shapes}
        check_dtypes(path, kinds, dtype, fp8)
        coded = {f"{name}.weight" for name in quantize(model)} if fp8 else set()
        reserve(device, _sizes(state, coded, dtype))
        modules = dict(model.eval().named_modules())
        for name, tensor in _tensors(contents, get, pairs, params, dtype, coded):
            module, _, leaf = name.rpartition(".")
            _put(modules[module], leaf, tensor)
    for one in modules.values():
        if isinstance(one, Fp8Linear):
            one.choose_matmul()
    return model


class Contents(NamedTuple):
    """What a file or folder holds of one network, by its header alone."""

    source: Source
    part: Part
    """the one that was looked for"""
    found: Identity
    scales: Scales
    shapes: dict[str, tuple[int, ...]]
    """by names without a prefix"""

    @property
    def prefix(self) -> str:
        return self.found.prefix


def find_contents(path: Path, part: Part) -> Contents:
    """FileError where there are no weights, or scales of a kind that is not known."""
    source = find_source(path)
    found = identify(source.shapes, part)
    scales = find_scales(source, found.prefix)
    shapes = {
        name.removeprefix(found.prefix): shape
        for name, shape in source.shapes.items()
        if name.startswith(found.prefix) and name not in scales.names
    }
    return Contents(source, part, found, scales, shapes)


def _in_order(contents: Contents, params: Params) -> list[Pair]:
    """Our tensors and those in the file, in the order in which these lie there, or their first parts do.

    What is missing is left out here, and told by `check_fit`.
    """
    mine = [name for name in contents.shapes if not name.startswith(OTHERS)]
    pairs = [Pair(name, (name,), "") for name in mine]
    if contents.found.layout == "diffusers":
        pairs = [pair for pair in pairs_of(params) if set(pair.diffusers) <= set(mine)]
    return sorted(pairs, key=lambda pair: contents.source.spans[contents.prefix + pair.diffusers[0]])


def _sizes(state: Mapping[str, Tensor], coded: Collection[str], dtype: torch.dtype) -> list[int]:
    """Bytes of the tensors that will be there, and of what the largest takes while it is quantized.

    That is bf16 as read, its absolute values, and its quotients in fp32.
    """
    sizes = [x.numel() * (1 if name in coded else dtype.itemsize) for name, x in state.items()]
    return [*sizes, 8 * max(state[name].numel() for name in coded)] if coded else sizes


def _tensors(
    contents: Contents,
    get: Callable[[str], Tensor],
    pairs: list[Pair],
    params: Params,
    dtype: torch.dtype,
    coded: Collection[str],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network by their official names, in `dtype`.

    coded: the weights that come as e4m3, with a `weight_scale` behind each. No more than one of them is there
    unquantized at a time.
    """
    source = contents.source
    quiet = source.size < 10**9 or not sys.stderr.isatty()
    with tqdm(total=source.size, unit="B", unit_scale=True, desc=f"reading {source.path.name}", disable=quiet) as bar:

        def take(name: str) -> tuple[Tensor, Tensor | None]:
            tensor = get(contents.prefix + name)
            bar.update(tensor.nbytes)
            scale = contents.scales.of.get(contents.prefix + name)
            return tensor, None if scale is None else get(scale)

        def made(name: str, tensor: Tensor, scale: Tensor | None = None) -> list[tuple[str, Tensor]]:
            if name not in coded:
                return [(name, to_dense(tensor, scale, dtype))]
            weight, rows = as_fp8(tensor, scale)
            return [(name, weight), (f"{name}_scale", rows)]

        # Written without a loop variable, which would hold on to a tensor while the next is read.
        if contents.found.layout == "diffusers":  # which cuts and joins weights: not as codes
            joined = streamed_from_diffusers(lambda name: to_dense(*take(name), dtype), pairs, params)
            yield from chain.from_iterable(starmap(made, joined))
        else:
            yield from chain.from_iterable(made(pair.official, *take(pair.official)) for pair in pairs)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter, frozen, or a buffer, in the place of the one on `meta`."""
    is_parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def check_fit(contents: Contents, state: Mapping[str, Tensor], params: Params) -> None:
    """FileError if the files do not hold just the tensors of that network, which may be on `meta`."""
    official = {name: tuple(x.shape) for name, x in state.items()}
    expected = diffusers_shapes(state, params) if contents.found.layout == "diffusers" else official
    shapes = contents.shapes
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
            f"{contents.source.path} does not hold the tensors of this model: {'; '.join(filter(None, findings))}. "
            f"This is {contents.found.text}. Next: check --name and {PARTS[contents.part].spelled}."
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
