"""Load a model from files: built on `meta`, filled tensor by tensor, each directly on its device and in its dtype.

So there is never a second copy of the model in memory; on the CPU, tensors that keep their dtype stay mapped from the
file until they are used. Weights are quantized as they are read, and those that a file has in few bits may stay so: the
whole model never exists in bf16. Official names, ComfyUI's prefix and all-in-one file, and diffusers' layout are all
read, from safetensors and GGUF; names and shapes are compared with the header before a tensor is read.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import FileError
from ..linears.formats import FORMATS, to_dense
from ..linears.mapped import MappedLinear
from ..model import AutoEncoder, Flux
from ..model.shapes import without_weights
from ..params import AutoEncoderParams, ControlNetParams, FluxParams
from ..terminal import note
from ..variants import Variant
from .check import check_network
from .contents import Contents, check_format, find_contents, find_storage
from .files import PARTS, ae_path, flow_path
from .identify import WHOLE, Part
from .keymaps import joins_rows, streamed_from_diffusers
from .names import Pair, Params, pairs_of
from .source import Source, find_source
from .stored import Storage, Stored
from .tensors import DTYPES, SMALL, opened, reserve
from .tensors import mapped as in_file

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", FluxParams, AutoEncoderParams, ControlNetParams)


def load_flux(
    variant: Variant,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    format: str | None = None,
    mapped: bool = False,
) -> Flux:
    """The transformer of that name, weights loaded and frozen. FileError says what does not fit.

    format: of `linears.formats`, which most of its Linears get; the rest is in `dtype`. A file that has weights in that
    format is taken as it is. mapped: on the CPU, what of Linears would have to be copied stays in the file
    (`linears/mapped.py`).
    """
    return _load(Flux, "transformer", variant.params, flow_path(variant), device, dtype, format, mapped)


def load_into(model: Flux, path: str | Path) -> None:
    """Fill a transformer from any file or folder of its sizes, on its device and in its dtype, frozen. FileError.

    Linears that the file has in few bits become layers of that format; nothing else is quantized. On an error the model
    stays as it was.
    """
    path, like = Path(path), model.img_in.bias
    inside = path / PARTS["transformer"].folders[0]
    device = torch.device("cpu") if like.is_meta else like.device
    loaded = _load(
        Flux, "transformer", model.params, inside if inside.is_dir() else path, device, like.dtype, AS_STORED
    )
    for name, part in loaded.named_children():
        setattr(model, name, part)
    model.eval()


def dequantized(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a file or folder: its name in the file without a wrapping prefix, and its numbers, fp32.

    The file need not hold a whole model. FileError, also for a weight in few bits that is not finite.
    """
    source = find_source(Path(path))
    storage = find_storage(source)
    names = [name for name in source.shapes if name not in storage.names]
    with opened(source, "cpu", storage.among(names)) as get:
        for name in names:
            x = dense(get, name, storage, torch.float32)
            if name in storage.of:
                check_finite(x, name, source.path)
            yield _bare(name), x


def check_finite(x: Tensor, name: str, path: Path) -> None:
    """FileError for a file's tensor that is not finite."""
    if not x.isfinite().all():
        raise FileError(f"{path}: {name} holds NaN or infinity. Next: fetch the file again.")


def _bare(name: str) -> str:
    return name.removeprefix(next((prefix for prefix in WHOLE.values() if name.startswith(prefix)), ""))


def load_autoencoder(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """The autoencoder of that name, likewise."""
    return _load(AutoEncoder, "autoencoder", variant.ae_params, ae_path(variant), device, dtype)


Choice = Callable[[str, list[Stored | None]], str | None]
Get = Callable[[str], Tensor]
"""a file's tensor by its name"""
AS_STORED = "as stored"
"""in place of a format's name: whatever the file has"""


def _load(
    kind: Callable[[P], M],
    part: Part,
    params: P,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    format: str | None = None,
    mapped: bool = False,
) -> M:
    """A network of these sizes, filled from a file that may hold other parts, too. FileError."""
    contents = find_contents(path, part)
    check_network(contents, params)
    return filled(kind, contents, params, device, dtype, format, mapped)


def filled(
    kind: Callable[[P], M],
    contents: Contents,
    params: P,
    device: torch.device | str,
    dtype: torch.dtype,
    format: str | None = None,
    mapped: bool = False,
) -> M:
    """A network of these sizes, filled from a file that was found to hold its tensors. FileError.

    The header says what to read and in which order, so reading begins before there is a network.
    """
    choice = _format_of_linears(contents, format)
    note_precision(contents, dtype, format)
    pairs, storage = _in_order(contents, params), contents.storage
    names = (contents.names[name] for pair in pairs for name in pair.diffusers)
    reading = in_file(contents.source) if mapped else opened(contents.source, device, storage.among(names))
    with reading as get, _progress(contents.source, get) as take:
        model = without_weights(kind, params)
        filling = Filling(contents, params, dtype, *choice, mapped)
        reserve(device, filling.sizes(model, pairs))
        for pair in pairs:
            filling.fill(model, pair, take)
    return model.eval()


@contextmanager
def _progress(source: Source, get: Get) -> Iterator[Get]:
    """The same function with a bar, where reading takes time and somebody looks."""
    quiet = source.size < 10**9 or not sys.stderr.isatty()
    with tqdm(total=source.size, unit="B", unit_scale=True, desc=f"reading {source.path.name}", disable=quiet) as bar:

        def take(name: str) -> Tensor:
            tensor = get(name)
            bar.update(tensor.nbytes)
            return tensor

        yield take


def _format_of_linears(contents: Contents, format: str | None) -> tuple[Choice, bool]:
    """A function from a Linear's name, and how the file has its weight, to the format that it gets; and whether others
    are quantized to it. UsageError for a format that can only be read where the file has none of it.
    """
    of = contents.storage.of
    stored = {of[name].format for name in contents.names.values() if name in of}
    if format == AS_STORED or (format in stored and format != "fp8"):  # an fp8 file may have more in fp8 than is good
        only = None if format == AS_STORED else format
        return lambda name, found: _shared(found) if only in (None, _shared(found)) else None, False
    if format is None:
        return lambda name, found: None, False
    check_format(contents, format)
    stays = FORMATS[format].stays
    return lambda name, found: None if stays(name) else format, True


def _shared(found: list[Stored | None]) -> str | None:
    """The format that all parts of a weight are in."""
    formats = {None if one is None else one.format for one in found}
    return formats.pop() if len(formats) == 1 else None


@dataclass(frozen=True)
class Filling:
    """What becomes of a file's tensors in a network."""

    contents: Contents
    params: Params
    dtype: torch.dtype
    choose: Choice
    quantizes: bool = False
    mapped: bool = False

    def fill(self, model: nn.Module, pair: Pair, get: Get) -> None:
        """Put one tensor in its place; for a weight that is to be in few bits, a layer in the place of its Linear.

        A function of its own, so that nothing of a tensor is left while the next is read.
        """
        owner, _, leaf = pair.official.rpartition(".")
        module, format = model.get_submodule(owner), self.format_of(model, pair)
        names = [self.contents.names[name] for name in pair.diffusers]
        if format is None and self.mapped and not is_view(self.contents, names, self.dtype):
            read = held_in_file(get, self.contents.storage, names, partial(self.dense, pair))
            if leaf == "weight" and isinstance(module, nn.Linear):
                model.set_submodule(owner, MappedLinear(read, module.weight.shape, module.bias))
            else:
                _put(module, leaf, read(self.dtype))
        elif format is None:
            _put(module, leaf, self.dense(pair, get, self.dtype))
        elif (layer := self.layer(module, pair, format, get)) is not None:
            model.set_submodule(owner, layer)

    def format_of(self, model: nn.Module, pair: Pair) -> str | None:
        """The format that a tensor gets."""
        owner, _, leaf = pair.official.rpartition(".")
        is_weight = leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
        format = self.choose(owner, self.stored(pair)) if is_weight else None
        return format if format is None or self.quantizes or self.is_kept(pair, format) else None

    def stored(self, pair: Pair) -> list[Stored | None]:
        return [self.contents.storage.of.get(self.contents.names[name]) for name in pair.diffusers]

    def is_kept(self, pair: Pair, format: str) -> bool:
        """Whether the file has the codes that a layer needs."""
        found = self.stored(pair)
        keeps = all(one is not None and one.keeps for one in found)
        return keeps and _shared(found) == format and joins_rows(pair.how, self.params)

    def layer(self, linear: Any, pair: Pair, format: str, get: Get) -> nn.Module | None:
        """The layer for a Linear; None where codes can't be joined, and the Linear got its dense weight."""
        kind, bias = FORMATS[format].kind, None if linear.bias is None else linear.bias.detach()
        if not self.is_kept(pair, format):
            _put(linear, "weight", self.dense(pair, get, torch.bfloat16))  # so all files of a model give the same codes
            return kind.of(linear)
        names = [self.contents.names[name] for name in pair.diffusers]
        parts = [kept(get, self.contents.storage.of[name], None if names[1:] else bias) for name in names]
        if (layer := kind.joined(parts, bias) if names[1:] else parts[0]) is None:
            _put(linear, "weight", torch.cat([part.widen(self.dtype) for part in parts]))
        return layer

    def dense(self, pair: Pair, get: Get, dtype: torch.dtype) -> Tensor:
        """The official tensor in that dtype."""
        names = self.contents.names

        def read(name: str) -> Tensor:
            return dense(get, names.get(name, name), self.contents.storage, dtype)

        if self.contents.found.layout == "diffusers":
            ((_, tensor),) = streamed_from_diffusers(read, [pair], self.params)
            return tensor
        return read(pair.official)

    def sizes(self, model: nn.Module, pairs: list[Pair]) -> list[int]:
        """Bytes of each tensor, and of the temporaries of the largest quantization: bf16 as read, absolute values, and
        quotients in fp32.
        """
        state, found, largest = model.state_dict(), [], 0
        for pair in pairs:
            numel, format = state[pair.official].numel(), self.format_of(model, pair)
            found.append(numel * self.dtype.itemsize if format is None else round(numel * FORMATS[format].bits / 8))
            if format is not None and not self.is_kept(pair, format):
                largest = max(largest, numel)
        return [*found, 8 * largest] if largest else found


def is_view(contents: Contents, names: Sequence[str], dtype: torch.dtype) -> bool:
    """Whether a tensor made of these of a file is loaded in that dtype as it lies there, on the CPU."""
    name, *others = names
    source = contents.source
    is_plain = not others and name not in contents.storage.of
    return is_plain and DTYPES.get(source.dtypes[name]) == dtype and source.headers_of[name].size >= SMALL


def held_in_file(
    get: Get, storage: Storage, names: Iterable[str], read: Callable[[Get, torch.dtype], Tensor]
) -> Callable[[torch.dtype], Tensor]:
    """`read` of these tensors of a file at any later time, from where they lie, into new memory."""
    tensors = {name: get(name) for name in storage.among(names)}

    def read_anew(dtype: torch.dtype) -> Tensor:
        found = read(tensors.__getitem__, dtype)
        mine = found.untyped_storage()._cdata
        return found.clone() if any(x.untyped_storage()._cdata == mine for x in tensors.values()) else found

    return read_anew


def kept(get: Get, stored: Stored, bias: Tensor | None) -> Any:
    """The layer of the codes in a file."""
    tensors = {role: get(name) for role, name in stored.parts.items()}
    return FORMATS[stored.format].kind.read(tensors, stored.shape, stored.details, bias)


def dense(get: Get, name: str, storage: Storage, dtype: torch.dtype) -> Tensor:
    """A tensor of the file in that dtype."""
    if (stored := storage.of.get(name)) is None:
        return get(name).to(dtype)
    tensors = {role: get(part) for role, part in stored.parts.items()}
    return to_dense(stored.format, tensors, stored.shape, stored.details, dtype=dtype)


@contextmanager
def opened_official(contents: Contents, params: Params) -> Iterator[Callable[[str, torch.dtype], Tensor]]:
    """A context with a function that reads a network's tensor by its official name, in a dtype, on the CPU."""
    pairs = {pair.official: pair for pair in _in_order(contents, params)}
    names = contents.storage.among(contents.names.values())
    filling = Filling(contents, params, torch.float32, lambda name, found: None)
    with opened(contents.source, "cpu", names) as get:
        yield lambda official, dtype: filling.dense(pairs[official], get, dtype)


def _in_order(contents: Contents, params: Params) -> list[Pair]:
    """Official tensors and the file's tensors they are made of, in the order of the first of these in the file."""
    if contents.found.layout == "diffusers":
        pairs = pairs_of(params)
    else:
        pairs = [Pair(name, (name,), "") for name in contents.names]
    return sorted(pairs, key=lambda pair: contents.source.spans[contents.names[pair.diffusers[0]]])


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter (frozen) or buffer on `meta` by that tensor."""
    is_parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def note_precision(contents: Contents, dtype: torch.dtype, format: str | None = None) -> None:
    """A line on stderr where weights are read with fewer bits than the file has, or rounded a second time."""
    of, kinds, stored = contents.storage.of, set(), set()
    for name, kind in contents.dtypes.items():
        one = of.get(contents.names[name])
        if one is None:
            plain = DTYPES[kind]
            if plain not in (dtype, torch.bfloat16) and plain.itemsize >= dtype.itemsize:
                kinds.add(kind)
        elif format != AS_STORED and (one.format != format or not one.keeps):
            stored.add(kind if one.format in ("fp8", "gguf") else one.format)
    word = str(dtype).removeprefix("torch.") if format in (None, AS_STORED) else format
    if held := sorted(kinds | stored):
        twice = f", and what was {' and '.join(sorted(stored))} is rounded a second time" if stored and format else ""
        note(f"{contents.source.path.name} holds {' and '.join(held)}; it is read as {word}{twice}")
