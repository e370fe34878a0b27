"""Load a model from files: built on `meta`, filled tensor by tensor, each directly on its device and in its dtype.

So there is never a second copy of the model in memory; on the CPU, tensors that keep their dtype stay mapped from the
file until they are used. fp8 weights are quantized as they are read: the whole model never exists in bf16. Official
names, ComfyUI's prefix and all-in-one file, and diffusers' layout are all read; names and shapes are compared with the
header before a tensor is read.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, starmap
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..linears.fp8 import Fp8Linear, quantize
from ..model import AutoEncoder, Flux
from ..params import AutoEncoderParams, FluxParams
from ..terminal import note
from ..variants import Variant
from .check import check_network
from .contents import Contents, find_contents
from .files import ae_path, flow_path
from .identify import Part
from .keymaps import streamed_from_diffusers
from .names import Pair, Params, pairs_of
from .scales import as_fp8, to_dense
from .tensors import DTYPES, opened, reserve

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", FluxParams, AutoEncoderParams)


def load_flux(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, fp8: bool = False
) -> Flux:
    """The transformer of that name, weights loaded and frozen. FileError says what does not fit.

    fp8: most of its Linears in the format of `linears.fp8`, the rest in `dtype`.
    """
    return _load(Flux, "transformer", variant.params, flow_path(variant), device, dtype, fp8)


def load_autoencoder(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """The autoencoder of that name, likewise."""
    return _load(AutoEncoder, "autoencoder", variant.ae_params, ae_path(variant), device, dtype)


class SkipInit(TorchFunctionMode):
    """Turns the functions of `torch.nn.init` into no-ops inside."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def skip_init() -> SkipInit:
    """A context in which modules are made without initial values: on `meta` those are half of the time it takes."""
    return SkipInit()


def _load(
    kind: Callable[[P], M],
    part: Part,
    params: P,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    fp8: bool = False,
) -> M:
    """A network of these sizes, filled from a file that may hold other parts, too. FileError.

    The header says what to read and in which order, so reading begins before there is a network.
    """
    contents = find_contents(path, part)
    check_network(contents, params)
    note_precision(contents, dtype, fp8)
    pairs = _in_order(contents, params)
    names = (contents.names[name] for pair in pairs for name in pair.diffusers)
    with opened(contents.source, device, contents.scales.among(names)) as get:
        with torch.device("meta"), skip_init():
            model = kind(params)
        state = model.state_dict()
        coded = {f"{name}.weight" for name in quantize(model)} if fp8 else set()
        reserve(device, _sizes(state, coded, dtype))
        modules = dict(model.eval().named_modules())
        for name, tensor in _tensors(contents, get, pairs, params, dtype, coded):
            owner, _, leaf = name.rpartition(".")
            _put(modules[owner], leaf, tensor)
    for module in modules.values():
        if isinstance(module, Fp8Linear):
            module.choose_matmul()
    return model


@contextmanager
def opened_official(contents: Contents, params: Params) -> Iterator[Callable[[str, torch.dtype], Tensor]]:
    """A context with a function that reads a network's tensor by its official name, in a dtype, on the CPU."""
    pairs = {pair.official: pair for pair in _in_order(contents, params)}
    names = contents.scales.among(contents.names.values())
    with opened(contents.source, "cpu", names) as get:

        def dense(name: str, dtype: torch.dtype) -> Tensor:
            in_file = contents.names[name]
            scale = contents.scales.of.get(in_file)
            return to_dense(get(in_file), None if scale is None else get(scale), dtype)

        def read(official: str, dtype: torch.dtype) -> Tensor:
            ((_, tensor),) = streamed_from_diffusers(lambda name: dense(name, dtype), [pairs[official]], params)
            return tensor

        yield read


def _in_order(contents: Contents, params: Params) -> list[Pair]:
    """Official tensors and the file's tensors they are made of, in the order of the first of these in the file."""
    if contents.found.layout == "diffusers":
        pairs = pairs_of(params)
    else:
        pairs = [Pair(name, (name,), "") for name in contents.names]
    return sorted(pairs, key=lambda pair: contents.source.spans[contents.names[pair.diffusers[0]]])


def _sizes(state: Mapping[str, Tensor], coded: Collection[str], dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor, and of the temporaries of the largest quantization: bf16 as read, absolute values, and
    quotients in fp32.
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

    coded: the weights to yield in e4m3, with a `weight_scale` after each. At most one of them exists unquantized at
    a time.
    """
    source = contents.source
    quiet = source.size < 10**9 or not sys.stderr.isatty()
    with tqdm(total=source.size, unit="B", unit_scale=True, desc=f"reading {source.path.name}", disable=quiet) as bar:

        def take(name: str) -> tuple[Tensor, Tensor | None]:
            tensor = get(contents.names[name])
            bar.update(tensor.nbytes)
            scale = contents.scales.of.get(contents.names[name])
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
    """Replace a parameter (frozen) or buffer on `meta` by that tensor."""
    is_parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def note_precision(contents: Contents, dtype: torch.dtype, fp8: bool = False) -> None:
    """A line on stderr where weights are read with fewer bits than the file has, or come in fp8."""
    known = {dtype, torch.bfloat16} | ({torch.float8_e4m3fn} if fp8 else set())
    kinds = sorted({kind for kind in contents.dtypes.values() if DTYPES[kind] not in known})
    if kinds:  # bf16 goes into fp32 without a loss
        word = "fp8" if fp8 else str(dtype).removeprefix("torch.")
        note(f"{contents.source.path.name} holds {' and '.join(kinds)}; it is read as {word}")
