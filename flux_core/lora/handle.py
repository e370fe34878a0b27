"""Attach LoRA files to loaded networks: a branch beside each Linear that a file trains, taken off again to the bit.

All checks come first: a file that is refused leaves the model as it was. Its tensors are read once, onto the device
where each layer is. A layer gets one `BranchedLinear`, however many files are attached.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.shapes import Shape
from ..errors import UsageError
from ..linears.branch import BranchedLinear, Term
from ..linears.contract import dense
from ..model import Flux
from ..model.layers import RMSNorm
from .delta import Delta
from .dialects import TEXT, Network
from .file import LoraFile, Module, check_matched, read_lora, resolve_text, widened_input
from .tensors import NUMBERS, alphas_of, reading

Networks = Mapping[str, nn.Module]
"""the loaded networks by `dialects.Network`: "transformer", and "clip" and "t5" where there are text encoders"""


class Handle:
    """A LoRA that is attached. `scale` may be set at any time; `remove` gives the networks back as they were.

    A context manager, too: it is removed at the end of the context.
    """

    def __init__(self, file: LoraFile, networks: Networks) -> None:
        self.file, self.networks = file, networks
        self.places: dict[str, dict[str, BranchedLinear]] = {name: {} for name in networks}
        """layers with a branch of this file, by network and name"""
        self._scale = 1.0
        self._scales: Mapping[str, float] | None = None

    @property
    def scale(self) -> float:
        """The factor of the whole file."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = checked_scale(value)
        self.set_scales(None)

    def set_scales(self, scales: Mapping[str, float] | None) -> None:
        """Write a scale for each of the transformer's layers, by names, 0 for those without; None: `scale` for all.

        Nothing that was compiled or recorded changes: the scales are numbers in memory.
        """
        self._scales = scales
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for key, layers in self.places.items():
            for name, layer in layers.items():
                value = self._scale if scales is None or key != "transformer" else scales.get(name, 0.0)
                layer.scale_shifts(self, value)
                for number, unit in layer.scales_of(self):
                    targets.append(number)
                    values.append(unit * value if isinstance(unit, Tensor) else torch.tensor(unit * value))
        if targets:
            torch._foreach_copy_(targets, [x.to(y.device) for x, y in zip(values, targets, strict=True)])
        for network in self.networks.values():
            _apply_norms(network)
            _changed(network, scales=True)

    def norm_scale(self) -> float:
        """The factor of differences to norms, which belong to no layer."""
        return self._scale

    def remove(self) -> None:
        """Take the LoRA off: layers and weights are what they were before, to the bit. Does nothing the second time."""
        for key, network in self.networks.items():
            state = _STATES.get(network)
            if state is None or self not in state.handles:
                continue
            for name, layer in self.places[key].items():
                if not layer.remove(self):
                    network.set_submodule(name, layer.base)
            state.handles.remove(self)
            _apply_norms(network)
            _fit_input(network)
            _changed(network, scales=False)
        self.places = {name: {} for name in self.networks}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<LoRA {self.file.name} at scale {self._scale:g}>"

    @property
    def summary(self) -> str:
        """What was found and applied, in a line: dialect, rank, alpha, modules, text encoders, words."""
        return summary(self.file, self.networks)


def summary(file: LoraFile, networks: Networks | None = None) -> str:
    """What a file holds, in a line. networks: those that it is attached to; without, its modules are not called left
    out."""
    matched, all_modules = len(file.of("transformer")) + len(file.norms), len(file.unmatched)
    parts = [
        f"{file.name}: {file.dialect}",
        file.ranks,
        f"{matched} of {matched + all_modules} modules, {len(_weights(file))} of {file.total} Linears",
    ]
    for network, name in (("clip", "CLIP"), ("t5", "T5")):
        if count := len(file.of(network)):  # type: ignore[arg-type]
            left_out = networks is not None and network not in networks
            parts.append(f"{count} of {name}{' left out: no text encoder is loaded' if left_out else ''}")
    if file.tokens:
        parts.append(f"{len(file.tokens)} trained tokens not used")
    if file.unmatched:
        parts.append(f"without {', '.join(file.unmatched[:5])}{', …' if len(file.unmatched) > 5 else ''}")
    if file.words:
        parts.append(f"words: {file.words[:200]}")
    return ", ".join(parts)


def _weights(file: LoraFile) -> set[str]:
    return {module.target.module for module in file.of("transformer")}


def attach(
    model: Flux,
    path: str | Path,
    scale: float = 1.0,
    allow_partial: bool = False,
    text: Mapping[str, nn.Module] | None = None,
) -> Handle:
    """Attach a LoRA file to a transformer, and to its text encoders, if given. Returns its handle.

    path: a safetensors file, or a folder that a trainer wrote. allow_partial: apply what matches where some modules
    name nothing in the model. text: the networks of the text encoders, "clip" and "t5". FileError for a file that does
    not fit, NonFiniteError for NaN or infinity in it, UsageError for a scale that is no number; then nothing has
    changed.
    """
    scale = checked_scale(scale)
    file = read_lora(path, _state(model).params(model))
    return attach_file(file, {"transformer": model, **(text or {})}, scale, allow_partial)


def attach_file(file: LoraFile, networks: Networks, scale: float = 1.0, allow_partial: bool = False) -> Handle:
    """`attach` of a file that was read already, to networks by name."""
    file = resolve_text(file, _text_linears(networks))
    check_matched(file, allow_partial)
    handle = Handle(file, networks)
    pieces = _pieces(file, networks)
    for key, network in networks.items():
        _state(network).handles.append(handle)
        _state(network).norms[handle] = pieces.norms if key == "transformer" else {}
        for name, found in pieces.of.get(key, {}).items():
            layer = _branched(network, name)
            layer.add(handle, found)
            handle.places[key][name] = layer
        _fit_input(network)
        _changed(network, scales=False)
    handle.scale = scale
    return handle


def checked_scale(scale: float) -> float:
    """UsageError for a scale that is no finite number."""
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"a LoRA's scale is a number, as in 0.8, not {scale!r}")
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
    narrow: tuple[Any, nn.Module] | None = None
    """a transformer's params and `img_in` as they were, where a control LoRA made them wider"""

    def params(self, model: Flux) -> Any:
        return model.params if self.narrow is None else self.narrow[0]


_STATES: "WeakKeyDictionary[nn.Module, _State]" = WeakKeyDictionary()


def _state(network: nn.Module) -> _State:
    return _STATES.setdefault(network, _State())


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
                value = value + handle.norm_scale() * tensor.to(value)
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
    wide = own if width == params.in_channels else _widened(own, width)
    if isinstance(layer, BranchedLinear):
        layer.base, layer.in_features = wide, width
        if layer.down is not None:
            layer.down = nn.Parameter(_columns(layer.down, width), requires_grad=False)
    else:
        network.img_in = wide  # type: ignore[assignment]
    state.narrow = None if wide is own else (params, own)
    network.params, network.in_channels = replace(params, in_channels=width), width


def _without_branch(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, BranchedLinear) else layer


def _widened(linear: nn.Module, width: int) -> nn.Linear:
    """A Linear with zero columns for more input features."""
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach()
    wide = nn.Linear(width, len(weight), linear.bias is not None, device="meta", dtype=weight.dtype)
    wide.weight = nn.Parameter(_columns(weight, width), requires_grad=linear.weight.requires_grad)
    wide.bias = linear.bias
    return wide.train(linear.training)


def _columns(x: Tensor, width: int) -> Tensor:
    """x [n, K] with zero columns behind, or without columns, up to `width`."""
    return F.pad(x.detach(), (0, width - x.shape[1])) if width > x.shape[1] else x.detach()[:, :width].contiguous()


def _branched(network: nn.Module, name: str) -> BranchedLinear:
    """The layer of that name with a place for branches."""
    layer = network.get_submodule(name)
    if not isinstance(layer, BranchedLinear):
        branched = BranchedLinear(layer).train(layer.training)
        network.set_submodule(name, branched)
        layer = branched
    return layer


# From a file's tensors to branches ---------------------------------------------------------------------------


@dataclass
class _Pieces:
    of: dict[str, dict[str, list[Any]]]
    """by network and layer"""
    norms: dict[str, tuple[str, Tensor]]


def _text_linears(networks: Networks) -> dict[Network, dict[str, Shape]]:
    """The Linears of the text encoders that are loaded, by name, and their weights' shapes."""
    found: dict[Network, dict[str, Shape]] = {}
    for key in TEXT:
        if (network := networks.get(key)) is not None:
            layers: list[tuple[str, Any]] = [(x, y) for x, y in network.named_modules() if hasattr(y, "in_features")]
            found[key] = {name: (layer.out_features, layer.in_features) for name, layer in layers}
    return found


def _pieces(file: LoraFile, networks: Networks) -> _Pieces:
    """The branches of a file's modules, on the devices of their layers. NonFiniteError, FileError."""
    alphas = alphas_of(file)
    found = _Pieces({key: {} for key in networks}, {})
    transformer = networks["transformer"]
    with reading(file, _device(transformer)) as get:
        for name, tensor_name in file.norms.items():
            found.norms[name] = ("set", get(tensor_name))
        for module in file.modules:
            if module.network not in networks:
                continue
            network = networks[module.network]
            tensors = {role: get(name) for role, name in module.tensors.items() if role not in NUMBERS}
            if module.network == "transformer" and module.target.module.endswith(".scale"):
                found.norms[module.target.module] = ("add", tensors["diff"])
                continue
            layer = _without_branch(network.get_submodule(module.target.module))
            delta = _delta(module, tensors, alphas.get(module.stem), layer, file)
            device = _device(layer)
            pieces = delta.pieces(module.target.start, _dtype(network, layer))
            of = found.of[module.network].setdefault(module.target.module, [])
            of += [x.to(device) if isinstance(x, Term) else type(x)(*map(_on(device), x)) for x in pieces]
    return found


def _on(device: torch.device) -> Callable[[Any], Any]:
    return lambda x: x.to(device) if isinstance(x, Tensor) else x


def _delta(module: Module, tensors: Mapping[str, Tensor], alpha: float | None, layer: Any, file: LoraFile) -> Delta:
    start, stop = module.target.start, module.target.stop
    columns = layer.in_features
    if module.target.module == "img_in" and module.network == "transformer":
        columns = max(columns, *(x.shape[1] for role, x in tensors.items() if role in ("down", "diff")), 0)

    def weight() -> Tensor:
        return _columns(_dense_weight(layer)[start:stop].float(), columns)

    return Delta(module, tensors, alpha, stop - start, columns, weight)


def _dense_weight(layer: nn.Module) -> Tensor:
    """A layer's weight [N, K], whatever it is stored as: by its contract, else by its outputs of unit vectors."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
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
    return layer.weight.dtype
