"""Attach LoRA files to loaded networks: a branch beside each Linear that a file trains, taken off again to the bit.

All checks come first: a file that is refused leaves the model as it was. Its tensors are read once, onto the device
where each layer is. A layer gets one `BranchedLinear`, however many files are attached.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self, cast
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from ..checkpoint.shapes import Shape
from ..errors import UsageError
from ..hooks.lora import LARGEST
from ..linears.branch import BranchedLinear, Term, with_columns
from ..linears.contract import dense
from ..linears.frozen import Frozen
from ..model import MODULATION, Flux, FluxParams
from ..model.layers import RMSNorm
from ..terminal import one_line
from .delta import Delta
from .dialects import TEXT, Network
from .file import LoraFile, Module, check_drawable, check_matched, read_lora, resolve_text, widened_input
from .merged import MergedLayer, Written, check_mergeable
from .tensors import NUMBERS, alphas_of, read_factors, read_tokens

Scales = float | Mapping[str, float]
"""a scale for all layers, or for each by name"""
Networks = Mapping[str, nn.Module]
"""the loaded networks by `dialects.Network`: "transformer", and "clip" and "t5" where there are text encoders"""


class Handle:
    """A LoRA that is attached. `scale` may be set at any time; `remove` gives the networks back as they were.

    A context manager, too: it is removed at the end of the context.
    """

    def __init__(self, file: LoraFile, networks: Networks, merge: bool = False) -> None:
        self.file, self.is_merged = file, merge
        self._networks = {name: ref(network) for name, network in networks.items()}
        self.owner = object()
        """what layers know it by. A model that is dropped is freed at once: nothing here holds it, or is held by it"""
        self.places = _no_places(networks)
        """layers with a branch of this file, or with it in their weights, by network and name"""
        self.tokens: Mapping[Network, Mapping[str, Tensor]] = {}
        """trained tokens: words' vectors [n, D], on the CPU, for each encoder; prompts of a pipeline name them"""
        self.alphas: Mapping[str, float] = {}
        """of its modules, where the file has them"""
        self._scale = 1.0
        self._written: tuple[Scales, float | None] = (1.0, None)
        self._ranks: Mapping[int, int] = {}
        """what is in memory now"""
        self._is_whole = not merge
        """whether all of it is: branches begin at scale 1, weights have nothing in them yet"""

    @property
    def networks(self) -> Networks:
        """Those that it is attached to, as long as they are there."""
        return {name: network for name, found in self._networks.items() if (network := found()) is not None}

    @property
    def scale(self) -> float:
        """The factor of the whole file."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = checked_scale(value)
        self.write(self._scale)
        for network in self.networks.values():
            _changed(network, scales=True)

    def group(self, sigma: float) -> tuple[int, ...]:
        """What `set` hangs on (`model.Adapt`)."""
        return tuple(self.file.active(sigma).values())

    def set(self, sigma: float) -> None:
        """Let as many ranks count as at that noise level; of a file that is no T-LoRA always all (`model.Adapt`).

        Whoever calls the model without a pipeline calls this before.
        """
        scales, text = self._written
        self.write(scales, text, self.file.active(sigma))

    def write(self, scales: Scales, text: float | None = None, ranks: Mapping[int, int] | None = None) -> None:
        """Write a scale to all layers and norms, or to each of the transformer's by name, 0 for those without.

        text: that of the text encoders, where it is another. ranks: how many count, by the ranks that there are
        (`LoraFile.active`); without, as many as did. Nothing that was compiled or recorded changes: scales are
        numbers in memory, written where they differ from those there. Tables of modulation are not told
        (`model.Adapt`).
        """
        text = None if text == scales else text
        ranks = self._ranks if ranks is None else ranks
        if (scales, text, ranks) == (*self._written, self._ranks) and self._is_whole:
            return
        self._written, self._ranks, self._is_whole = (scales, text), ranks, False  # memory may run out in the middle
        by_value: dict[float, list[tuple[Tensor, Tensor]]] = {}
        branched: list[BranchedLinear] = []
        ranked: list[Tensor] = []
        for key, layers in self.places.items():
            for name, layer in layers.items():
                value = scales if isinstance(scales, float) else scales.get(name, 0.0)
                if key != "transformer" and text is not None:
                    value = text
                if isinstance(layer, MergedLayer):
                    layer.written[self.owner].scale = value
                    layer.write()
                    continue
                branched.append(layer)
                layer.scale_shifts(self.owner, value)
                numbers = layer.scales_of(self.owner)
                by_value.setdefault(value, []).extend(numbers)
                ranked += [place for place, _ in numbers] if key == "transformer" else []
        for value, numbers in by_value.items():
            if numbers:  # a layer may have a difference to its bias alone
                places, units = ([*x] for x in zip(*numbers, strict=True))
                torch._foreach_copy_(places, torch._foreach_mul(units, value))
        for place in ranked if ranks else ():
            place[ranks[len(place)] :] = 0
        for layer in branched:
            layer.refresh()
        for network in self.networks.values():
            _apply_norms(network)
        self._is_whole = True

    @property
    def text_scale(self) -> float:
        """The factor in the text encoders."""
        scales, text = self._written
        return text if text is not None else scales if isinstance(scales, float) else self._scale

    @property
    def is_attached(self) -> bool:
        return any(self in _state(network).handles for network in self.networks.values())

    def norm_scale(self, name: str) -> float:
        """The factor of the difference to a norm."""
        scales = self._written[0]
        return scales if isinstance(scales, float) else scales.get(name, 0.0)

    @property
    def names(self) -> list[str]:
        """The transformer's layers and norms that it changes."""
        norms = [_state(network).norms.get(self, {}) for network in self.networks.values()]
        return [*self.places["transformer"], *chain(*norms)]

    def remove(self) -> None:
        """Take the LoRA off: layers and weights are what they were before, to the bit. Does nothing the second time."""
        for key, network in self.networks.items():
            state = _state(network)
            if self not in state.handles:
                continue
            for name, layer in list(self.places[key].items()):
                if isinstance(layer, MergedLayer):
                    layer.written.pop(self.owner, None)
                    layer.write()
                    if not layer.written:
                        del state.merged[name]
                elif not layer.remove(self.owner):
                    network.set_submodule(name, layer.base)
            state.handles.remove(self)
            state.norms.pop(self)
            _apply_norms(network)
            _fit_input(network)
            _changed(network, scales=False)
        self.places = _no_places(self.networks)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """Of a network that is copied: a handle of the copy, and of no other network."""
        copied = {name: memo[id(x)] for name, x in self.networks.items() if id(x) in memo}
        found = memo[id(self)] = Handle(self.file, copied, self.is_merged)
        found.owner = deepcopy(self.owner, memo)
        for name in copied:
            found.places[name].update((x, deepcopy(layer, memo)) for x, layer in self.places[name].items())
        found.tokens, found.alphas, found._scale = self.tokens, self.alphas, self._scale
        found._written, found._ranks, found._is_whole = self._written, self._ranks, self._is_whole
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<LoRA {self.file.name} at scale {self._scale:g}>"

    @property
    def summary(self) -> str:
        """What was found and applied, in a line: dialect, rank, alpha, modules, text encoders, words."""
        text, layers = (
            summary(self.file, self.networks, self.alphas),
            chain(*(x.values() for x in self.places.values())),
        )
        dense = sum(isinstance(layer, BranchedLinear) and layer.is_dense(self.owner) for layer in layers)
        return f"{text}, {dense} computed dense" if dense else text


def summary(file: LoraFile, networks: Networks | None = None, alphas: Mapping[str, float] | None = None) -> str:
    """What a file holds, in a line.

    networks: those that it is attached to; without, its modules are not called left out. alphas: of its modules.
    """
    if file.is_tokens:
        return one_line(f"{file.name}: {_tokens(file)}")
    matched, all_modules = len(file.of("transformer")) + len(file.norms), len(file.unmatched)
    parts = [
        f"{file.name}: {file.dialect}",
        file.ranks,
        *([] if alphas is None else [_alpha(file, alphas)]),
        f"{matched} of {matched + all_modules} modules, {len(_weights(file))} of {file.total} Linears",
    ]
    for network, name in (("clip", "CLIP"), ("t5", "T5")):
        if count := len(file.of(network)):  # type: ignore[arg-type]
            left_out = networks is not None and network not in networks
            parts.append(f"{count} of {name}{' left out: no text encoder is loaded' if left_out else ''}")
    if file.schedule is not None:
        parts.append(f"T-LoRA from rank {file.schedule.least}, curve {file.schedule.curve:g}")
    if file.named_tokens:
        parts.append(_tokens(file))
    if file.unused_tokens:
        parts.append(f"{len(file.unused_tokens)} trained tokens not used")
    if file.unmatched:
        parts.append(f"without {', '.join(file.unmatched[:5])}{', …' if len(file.unmatched) > 5 else ''}")
    if file.words:
        parts.append(f"words: {file.words[:200]}")
    return one_line(", ".join(parts))


def _tokens(file: LoraFile) -> str:
    """Trained tokens, and of how many vectors they are."""
    counts = [
        max(math.prod(file.source.shapes[name][:-1]) for name in of.values()) for of in file.named_tokens.values()
    ]
    listed = ", ".join(f"{word} ({count})" for word, count in zip(file.named_tokens, counts, strict=True))
    return f"trained tokens of prompts: {listed}"


def _alpha(file: LoraFile, alphas: Mapping[str, float]) -> str:
    """The alphas that count, as text: "alpha 8", "alphas 1 to 4", "alpha / rank 2 by the header", or "no alpha"."""
    found = sorted({alphas[module.stem] for module in file.modules if module.stem in alphas and module.rank})
    if found:
        return f"alpha {found[0]:g}" if len(found) == 1 else f"alphas {found[0]:g} to {found[-1]:g}"
    units = sorted({module.scale for module in file.modules if module.scale is not None})
    return f"alpha / rank {units[0]:g} by the header" if units else "no alpha"


def _weights(file: LoraFile) -> set[str]:
    return {module.target.module for module in file.of("transformer")}


def attach(
    model: Flux,
    path: str | Path,
    scale: float = 1.0,
    allow_partial: bool = False,
    text: Mapping[str, nn.Module] | None = None,
    merge: bool = False,
) -> Handle:
    """Attach a LoRA file to a transformer, and to its text encoders, if given. Returns its handle.

    path: a safetensors file, or a folder that a trainer wrote. allow_partial: apply what matches where some modules
    name nothing in the model. text: the networks of the text encoders, "clip" and "t5". merge: write it into the
    weights, which are kept. FileError for a file that does not fit, NonFiniteError for NaN or infinity in it,
    UsageError for a scale that is no number; then nothing has changed.
    """
    scale = checked_scale(scale)
    file = read_lora(path, own_params(model))
    return attach_file(file, {"transformer": model, **(text or {})}, scale, allow_partial, merge)


def own_params(model: Flux) -> FluxParams:
    """A transformer's sizes without its LoRAs, of which one for control makes the input wider."""
    return _state(model).params(model)


def attach_file(
    file: LoraFile, networks: Networks, scale: float = 1.0, allow_partial: bool = False, merge: bool = False
) -> Handle:
    """`attach` of a file that was read already, to networks by name.

    merge: into their weights. UsageError if those cannot be written to.
    """
    file = resolve_text(file, _text_linears(networks))
    check_matched(file, allow_partial)
    if merge:
        _check_mergeable(file, networks)
    else:
        _check_input(file, networks["transformer"])
    handle, found = Handle(file, networks, merge), _read(file, networks)
    handle.tokens = read_tokens(file)
    try:
        _add(handle, found)
        handle.scale = scale
    except BaseException:  # memory may run out in the middle
        handle.remove()
        raise
    return handle


def _add(handle: Handle, found: "_Found") -> None:
    """Put a file's differences beside, or into, the layers of its networks."""
    handle.alphas = found.alphas
    for key, network in handle.networks.items():
        state = _state(network)
        state.handles.append(handle)
        state.norms[handle] = found.norms if key == "transformer" else {}
        _fit_input(network)
        for name in list(found.of.get(key, {})):
            deltas = found.of[key].pop(name)  # factors are freed once they are joined
            layer = _without_branch(network.get_submodule(name))
            if handle.is_merged:
                if name not in state.merged:
                    state.merged[name] = MergedLayer.of(layer)  # type: ignore[arg-type]
                merged = handle.places[key][name] = state.merged[name]
                merged.written[handle.owner] = Written.of(deltas)  # and summed when the scale is written
            else:
                pieces = _on_device(deltas, _dtype(network, layer), _device(layer))
                handle.places[key][name] = branched = _branched(network, name)
                branched.add(handle.owner, pieces)
        _apply_norms(network)
        _changed(network, scales=False)


def _check_mergeable(file: LoraFile, networks: Networks) -> None:
    state = _state(networks["transformer"])
    if state.narrow is not None and any(module.target.module == "img_in" for module in file.of("transformer")):
        raise UsageError(
            f"{file.name} cannot be merged into an input that a control LoRA made wider. Next: attach it without "
            "merging it"
        )
    check_drawable(file, state.params(networks["transformer"]))  # type: ignore[arg-type]
    if file.schedule is not None:
        raise UsageError(
            f"{file.name} is a T-LoRA, whose rank hangs on the noise level, which a weight does not know. Next: leave "
            "--lora-merge out"
        )
    if file.norms or any(module.target.module.endswith(".scale") for module in file.of("transformer")):
        raise UsageError(f"{file.name} changes norms, which --lora-merge does not write. Next: leave --lora-merge out")
    for module in file.modules:
        if module.network in networks and not module.target.module.endswith(".scale"):
            layer = _without_branch(networks[module.network].get_submodule(module.target.module))
            check_mergeable(module.target.module, layer)


def _check_input(file: LoraFile, network: Any) -> None:
    if "img_in" in _state(network).merged and widened_input(file, network.params) != network.params.in_channels:
        raise UsageError(
            f"{file.name} makes the input wider, and another LoRA is merged into it. Next: attach the other without "
            "merging it"
        )


def checked_scale(scale: float) -> float:
    """UsageError for a scale that is no number, or that no picture could record."""
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not abs(value) <= LARGEST:
        raise UsageError(f"a LoRA's scale is a number from -{LARGEST:g} to {LARGEST:g}, as in 0.8, not {scale!r}")
    return value


# What is attached to a network -------------------------------------------------------------------------------


@dataclass
class _State:
    """The files attached to a network, and what of it they replaced."""

    handles: list[Handle] = field(default_factory=list)
    norms: dict[Handle, dict[str, tuple[str, Tensor]]] = field(default_factory=dict)
    """of each file: a norm's parameter -> "set" or "add", and the tensor"""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """norms' parameters as they were"""
    merged: dict[str, MergedLayer] = field(default_factory=dict)
    """layers with files in their weights"""
    narrow: tuple[Any, nn.Module] | None = None
    """a transformer's params and `img_in` as they were, where a control LoRA made them wider"""

    def weight_of(self, name: str, layer: nn.Module) -> Callable[[], Tensor]:
        """A layer's own weight, without what is merged into it."""
        return lambda: self.merged[name].weight if name in self.merged else _dense_weight(layer)

    def params(self, model: Flux) -> Any:
        return model.params if self.narrow is None else self.narrow[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "_State":
        found = memo[id(self)] = _State()
        vars(found).update({x.name: deepcopy(getattr(self, x.name), memo) for x in fields(self)})
        return found

    def __reduce__(self) -> Any:
        """A network that is pickled has its branches, and no handles."""
        return _State, ()


def _state(network: nn.Module) -> _State:
    return vars(network).setdefault("_loras", _State())  # an attribute, which goes with the network, and is copied


def _no_places(networks: Networks) -> "dict[str, WeakValueDictionary[str, Any]]":
    return {name: WeakValueDictionary() for name in networks}


def attached(network: nn.Module) -> list[Handle]:
    """The files attached to a network, in order."""
    return list(_state(network).handles)


def _changed(network: nn.Module, scales: bool) -> None:
    """Tell the network that what was computed from its weights before is stale (`Flux.changes`)."""
    if isinstance(network, Flux):
        network.changes = network.changes.next(scales)


def _apply_norms(network: nn.Module) -> None:
    """Give norms the scales that the attached files make of the original ones, in place."""
    state = _state(network)
    parameters = dict(network.named_parameters()) if state.norms or state.originals else {}
    named = {name for handle in state.handles for name in state.norms.get(handle, {})}
    for name in named | set(state.originals):
        parameter = parameters[name]
        original = state.originals.setdefault(name, parameter.detach().clone())
        value = original.to(parameter.device).float()
        for handle in state.handles:
            how, tensor = state.norms.get(handle, {}).get(name, ("", original))
            if how == "set":
                value = tensor.to(value)
            elif how == "add":
                value = value + handle.norm_scale(name) * tensor.to(value)
        with torch.no_grad():
            parameter.copy_(original if name not in named else value)
        if name not in named:
            del state.originals[name]


def _fit_input(network: nn.Module) -> None:
    """Make `img_in` as wide as the attached files need it, with zeros; or as narrow as it was."""
    if not isinstance(network, Flux):
        return
    state = _state(network)
    params, own = state.narrow or (network.params, _without_branch(network.img_in))
    width = max([params.in_channels, *(widened_input(handle.file, params) for handle in state.handles)])
    layer = network.img_in
    if width == network.in_channels:
        return
    # `own` was apart while the network was moved or cast
    own = own.to(device=_device(_without_branch(layer)), dtype=_dtype(network, layer))
    wide = own if width == params.in_channels else widened(own, width)
    if isinstance(layer, BranchedLinear):
        layer.exchange(wide)
    else:
        network.img_in = wide  # type: ignore[assignment]
    state.narrow = None if wide is own else (params, own)
    network.params, network.in_channels = replace(params, in_channels=width), width


def _without_branch(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, BranchedLinear) else layer


def widened(linear: Any, width: int) -> nn.Linear:
    """A Linear with zero columns for more input features; dense, in whatever format the layer is."""
    own = linear.widen(cast(Tensor, linear.bias).dtype) if isinstance(linear, Frozen) else linear.weight.detach()
    wide = nn.Linear(width, linear.out_features, device="meta", dtype=own.dtype)
    wide.weight = nn.Parameter(with_columns(own, width), requires_grad=linear.weight.requires_grad)
    wide.bias = deepcopy(linear.bias)
    return wide.train(linear.training)


def _branched(network: nn.Module, name: str) -> BranchedLinear:
    """The layer of that name with a place for branches."""
    layer = network.get_submodule(name)
    if not isinstance(layer, BranchedLinear):
        joins = not name.endswith(MODULATION)  # a table of all steps computes those, by other kernels
        branched = BranchedLinear(layer, joins).train(layer.training)
        network.set_submodule(name, branched)
        layer = branched
    return layer


# From a file's tensors to branches ---------------------------------------------------------------------------


@dataclass
class _Found:
    """A file's differences: by network and layer, and those to norms."""

    of: dict[str, dict[str, list[Delta]]]
    alphas: dict[str, float]
    norms: dict[str, tuple[str, Tensor]]


def _text_linears(networks: Networks) -> dict[Network, dict[str, Shape]]:
    """The Linears of the text encoders that are loaded, by name, and their weights' shapes."""
    found: dict[Network, dict[str, Shape]] = {}
    for key in TEXT:
        if (network := networks.get(key)) is not None:
            layers: list[tuple[str, Any]] = [(x, y) for x, y in network.named_modules() if hasattr(y, "in_features")]
            found[key] = {name: (layer.out_features, layer.in_features) for name, layer in layers}
    return found


def _read(file: LoraFile, networks: Networks) -> _Found:
    """The differences of a file's modules, read onto the transformer's device. NonFiniteError, FileError."""
    alphas = alphas_of(file)
    found = _Found({key: {} for key in networks}, alphas, {})
    modules = [module for module in file.modules if module.network in networks]
    of_module = [{role: x for role, x in module.tensors.items() if role not in NUMBERS} for module in modules]
    names = chain(file.norms.values(), *(roles.values() for roles in of_module))
    read = read_factors(file, names, _device(networks["transformer"]))
    found.norms = {name: ("set", read[tensor]) for name, tensor in file.norms.items()}
    for module, roles in zip(modules, of_module, strict=True):
        tensors = {role: read.pop(name) for role, name in roles.items()}
        network, name = networks[module.network], module.target.module
        if module.network == "transformer" and name.endswith(".scale"):
            found.norms[name] = ("add", tensors["diff"])
            continue
        layer = _without_branch(network.get_submodule(name))
        delta = _delta(module, tensors, alphas.get(module.stem), layer, _state(network).weight_of(name, layer))
        found.of[module.network].setdefault(name, []).append(delta)
    return found


def _on_device(deltas: list[Delta], dtype: torch.dtype, device: torch.device) -> list[Any]:
    """The branches of a layer's differences, on its device."""
    pieces = [piece for delta in deltas for piece in delta.pieces(dtype)]
    return [x.to(device) if isinstance(x, Term) else type(x)(*(_moved(part, device) for part in x)) for x in pieces]


def _moved(part: Any, device: torch.device) -> Any:
    return part.to(device) if isinstance(part, Tensor) else part


def _delta(
    module: Module, tensors: Mapping[str, Tensor], alpha: float | None, layer: Any, weight: Callable[[], Tensor]
) -> Delta:
    start, stop, columns = module.target.start, module.target.stop, layer.in_features
    if module.network == "transformer" and module.target.module == "img_in":
        columns = max([columns, *(x.shape[1] for role, x in tensors.items() if role in ("down", "diff"))])

    def rows() -> Tensor:
        device = next(iter(tensors.values())).device
        return with_columns(weight()[start:stop].to(device).float(), columns)

    return Delta(module, tensors, alpha, stop - start, columns, rows)


def _dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight [N, K], whatever it is stored as: by its contract, else by its outputs of unit vectors."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    if isinstance(layer, Frozen):
        return layer.widen(torch.float32)
    device = _device(layer)
    if found := dense(layer, torch.empty(0, dtype=torch.float32, device=device)):
        return found[0].detach()
    size: Any = layer.in_features
    bias = getattr(layer, "bias", None)
    with torch.no_grad():
        rows = layer(torch.eye(size, dtype=torch.bfloat16, device=device))
    return (rows if bias is None else rows - bias).t()


def _device(module: nn.Module) -> torch.device:
    return next((x.device for x in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _dtype(network: nn.Module, layer: Any) -> torch.dtype:
    """The dtype that a layer's branch computes in: that of the network's norms, or of its own weight."""
    if isinstance(network, Flux):
        return next(part.scale.dtype for part in network.modules() if isinstance(part, RMSNorm))
    if isinstance(layer, Frozen):  # T5's embeddings stay as they are
        return next(x.dtype for x in network.parameters() if x.is_floating_point() and x.dtype.itemsize > 1)
    return layer.weight.dtype
