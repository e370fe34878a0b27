"""Write a LoRA in another dialect: the same factors under other names, cut or joined where modules differ.

| dialect | of the transformer | of CLIP, T5 | factors |
| --- | --- | --- | --- |
| official | `diffusion_model.single_blocks.0.linear1` | `text_encoders.clip_l.transformer.…` | `lora_down`, `lora_up` |
| kohya | `lora_unet_single_blocks_0_linear1` | `lora_te1_…`, `lora_te3_…` | `lora_down`, `lora_up` |
| diffusers | `transformer.single_transformer_blocks.0.attn.to_q` | `text_encoder.…`, no T5 | `lora_A`, `lora_B` |

each with `.alpha`. "official" is what ComfyUI reads without a table of names, biases (`.diff_b`), norms (`.set_weight`)
and a wider input (`.reshape_weight`) included. diffusers gets alphas and no configuration in the header, since the two
together make it raise, and ComfyUI reads alphas only.

LoKr, LoHa, GLoRA, whole differences and DoRA by columns belong to the Linear that they were trained for, so they go
only where the dialect has the same Linear.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.keymaps import swap_halves
from ..checkpoint.shapes import clip_shapes, t5_shapes
from ..errors import UsageError
from ..params import FluxParams
from ..variants import VARIANTS
from .dialects import Network, Table, Target, flat, flat_text
from .file import ADAPTER_METADATA, LoraFile, Module, check_factors
from .parts import CannotSay, Part, alpha_of, cut, join
from .tensors import read_all

Dialect = Literal["official", "diffusers", "kohya"]

PREFIXES: Mapping[Dialect, Mapping[Network, str]] = {
    "official": {
        "transformer": "diffusion_model.",
        "clip": "text_encoders.clip_l.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    },
    "diffusers": {"transformer": "transformer.", "clip": "text_encoder."},
    "kohya": {"transformer": "lora_unet_", "clip": "lora_te1_", "t5": "lora_te3_"},
}
_ENDS = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "alpha": ".alpha",
    "magnitude": ".dora_scale",
    "diff": ".diff",
    "diff_b": ".diff_b",
    "up_bias": ".diff_b",
    **{f"glora_{x}": f".{x}.weight" for x in ("a1", "a2", "b1", "b2")},
}
"""role -> ending in the official and in kohya's dialect; others are their own"""
_THIN = {"down", "up", "alpha", "magnitude", "up_bias", "diff_b", "reshape_weight"}
"""roles of a module that is low-rank, with whatever else may go with it"""
_STALE = (ADAPTER_METADATA, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "format")
"""a header's keys that are wrong once tensors have other names"""


@dataclass
class Converted:
    """A LoRA in a dialect, and what of it the dialect cannot say."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """modules by their names in the file, each with the reason"""


def convert(lora: LoraFile, params: FluxParams, to: Dialect) -> Converted:
    """The file in that dialect. params: the sizes of the transformer that it is for. FileError, NonFiniteError.

    UsageError for a T-LoRA.
    """
    if lora.schedule is not None:  # where modules are joined, their ranks are, too
        raise UsageError(
            f"{lora.name} is a T-LoRA: its modules' ranks count by the noise level, which other tools do not read from "
            "a file. Next: draw with it here"
        )
    given = read_all(lora)
    parts: dict[str, list[Part]] = {}
    found = Converted(metadata={k: v for k, v in lora.header.metadata.items() if k not in _STALE})
    words = Words(params, to)
    for module in lora.modules:
        tensors = {role: given[name] for role, name in module.tensors.items()}
        with _saying(found, module.stem):
            if module.network != "transformer":
                check_factors(lora, module)
                found.tensors |= words.text(module, tensors)
            elif _is_thin(module, tensors):
                part = _part(module, tensors, words.table.shape(module.target)[1])
                parts.setdefault(module.target.module, []).append(part)
            else:
                alone = sum(module.target.module == x.target.module for x in lora.of("transformer")) == 1
                found.tensors |= words.whole(module, tensors, alone)
    for linear, pieces in parts.items():
        spell(found, words, linear, pieces)
    for parameter, name in lora.norms.items():
        with _saying(found, name):
            found.tensors |= words.norm(parameter, given[name])
    found.left_out += [f"{stem} (names nothing in the model)" for stem in lora.unmatched]
    found.left_out += [f"{name} (a trained token)" for name in lora.tokens]
    return found


def spell(found: Converted, words: "Words", linear: str, pieces: Iterable[Part]) -> None:
    """Add one Linear's low-rank differences to what was converted."""
    targets = words.linears[linear]
    small = [x for part in pieces for x in cut(part, [(target.start, target.stop) for _, target in targets])]
    for name, target in targets:
        inside = [part for part in small if target.start <= part.start and part.stop <= target.stop]
        if inside:
            with _saying(found, " and ".join(dict.fromkeys(part.stem for part in inside))):
                found.tensors |= words.thin(name, target, join(inside, target.start, target.stop))


@contextmanager
def _saying(found: Converted, stem: str) -> Iterator[None]:
    """A context in which CannotSay is noted as the reason why a module is left out."""
    try:
        yield
    except CannotSay as reason:
        found.left_out.append(f"{stem} ({reason})")


# From a file to parts ----------------------------------------------------------------------------------------


def _is_thin(module: Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a module is low-rank, and DoRA, if any, is by rows."""
    if "down" not in tensors or not tensors.keys() <= _THIN or {"up_bias", "diff_b"} <= tensors.keys():
        return False
    magnitude = tensors.get("magnitude")
    return magnitude is None or not _by_columns(magnitude, tensors["up"])


def _by_columns(magnitude: Tensor, up: Tensor) -> bool:
    return magnitude.ndim > 1 and len(magnitude) == 1 and len(up) != 1


def _part(module: Module, tensors: Mapping[str, Tensor], columns: int | None = None) -> Part:
    """A low-rank module by the official order of rows, without what only diffusers' wider MLP has. columns: the
    official Linear's."""
    target = module.target
    rows = target.stop - target.start if target.stop else len(tensors["up"])
    down, up = (tensors[role].flatten(1) for role in ("down", "up"))
    if columns and target.spare_columns:
        down = _narrow(down.t(), columns).t()

    def official(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return _narrow(swap_halves(x) if target.swapped else x, rows)

    vectors = {role: tensors[role].flatten() for role in ("magnitude", "up_bias", "diff_b") if role in tensors}
    alpha = tensors.get("alpha")
    if alpha is None or not torch.isfinite(alpha.float()).all():
        like = torch.zeros((), dtype=down.dtype if down.dtype.itemsize > 1 else torch.float32, device="cpu")
        alpha = alpha_of((1.0 if module.scale is None else module.scale) * len(down), like)
    bias = official(vectors.get("up_bias", vectors.get("diff_b")))
    whole = official(up)
    assert whole is not None
    return Part(module.stem, target.start, down, whole, alpha, official(vectors.get("magnitude")), bias)


def _narrow(x: Tensor, size: int) -> Tensor:
    """The first `size` of x's rows. CannotSay where others are not zero."""
    if len(x) > size and x[size:].float().any():
        raise CannotSay("features that only diffusers' wider MLP has")
    return x[:size]


# From parts to a dialect -------------------------------------------------------------------------------------


class Words:
    """A dialect: names of modules, endings, and what it has no words for."""

    def __init__(self, params: FluxParams, to: Dialect) -> None:
        self.table, self.to = Table(params), to

    @cached_property
    def linears(self) -> dict[str, list[tuple[str, Target]]]:
        """Official Linear -> the dialect's modules for it, with their prefix, and the rows of each."""
        prefix = PREFIXES[self.to]["transformer"]
        if self.to == "diffusers":
            return {
                official: [(prefix + name, self.table.linears[flat(name)]) for name in names]
                for official, names in self.table.diffusers.items()
                if flat(official) in self.table.linears
            }
        names = [name.removesuffix(".weight") for name, shape in self.table.shapes.items() if len(shape) == 2]
        spelled = {name: flat(name) if self.to == "kohya" else name for name in names}
        return {name: [(prefix + spelled[name], self.table.linears[flat(name)])] for name in names}

    def thin(self, name: str, target: Target, part: Part) -> dict[str, Tensor]:
        """The tensors of a low-rank module. CannotSay."""
        wider = target.module == "img_in" and part.down.shape[1] > self.table.shapes["img_in.weight"][1]
        if wider and self.to == "kohya":
            raise CannotSay("an input that is wider than the model's")
        if part.magnitude is not None and target.spare_rows:
            raise CannotSay("DoRA of an MLP that is wider in diffusers")
        factors = {"down": F.pad(part.down, (0, target.spare_columns)) if target.spare_columns else part.down}
        rows = {"up": part.up, "magnitude": part.magnitude, "bias": part.bias}
        factors |= {role: self._own_rows(x, target) for role, x in rows.items() if x is not None}
        found = self._named(name, factors, part)
        if wider and self.to == "official":
            size = [len(part.up), part.down.shape[1]]
            found[f"{name}.reshape_weight"] = torch.tensor(size, dtype=torch.int64, device="cpu")
        return found

    def _own_rows(self, x: Tensor, target: Target) -> Tensor:
        x = swap_halves(x) if target.swapped else x
        return F.pad(x, (0,) * (2 * x.ndim - 1) + (target.spare_rows,)) if target.spare_rows else x

    def _named(self, name: str, factors: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
        """Factors down, up, magnitude and bias under the dialect's names: copies, since safetensors shares nothing."""
        found = {f"{name}.alpha": part.alpha.clone()}
        for role, x in ((role, x.clone(memory_format=torch.contiguous_format)) for role, x in factors.items()):
            if self.to != "diffusers":
                end = _ENDS["diff_b" if role == "bias" else role]
                found[name + end] = x[:, None] if role == "magnitude" else x
            elif role == "bias" and part.unit != 1:
                raise CannotSay("a bias beside an alpha that is not its rank")
            else:
                ends = {"down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias"}
                found[f"{name}.{ends.get(role, 'lora_magnitude_vector')}"] = x
        return found

    def whole(self, module: Module, tensors: Mapping[str, Tensor], alone: bool) -> dict[str, Tensor]:
        """The tensors of a module that is not low-rank, as they are. alone: on its Linear. CannotSay."""
        what, target = _kind(module), module.target
        if self.to == "diffusers" or target.module not in self.linears:
            raise CannotSay(what)
        ((name, own),) = self.linears[target.module]
        if target != own or not alone:
            raise CannotSay(f"{what} of rows of a Linear")
        if {"up_bias", "diff_b"} <= tensors.keys():
            raise CannotSay("two differences to a bias")
        return {name + _ENDS.get(role, f".{role}"): x for role, x in tensors.items()}

    def norm(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """The tensor that replaces a norm's scale. CannotSay."""
        if self.to == "kohya":
            raise CannotSay("a norm's scale")
        prefix = PREFIXES[self.to]["transformer"]
        if self.to == "official":
            return {f"{prefix}{parameter}.set_weight": value}
        (theirs,) = self.table.diffusers[parameter.removesuffix(".scale")]
        return {f"{prefix}{theirs}.weight": value}

    def text(self, module: Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a text encoder's module. CannotSay."""
        name = _TEXT[module.network].get(flat_text(module.target.module))
        if module.network not in PREFIXES[self.to]:
            raise CannotSay("of T5")
        if name is None:
            raise CannotSay("names nothing in the text encoder")
        name = PREFIXES[self.to][module.network] + (flat(name) if self.to == "kohya" else name)
        if _is_thin(module, tensors):
            part = _part(module, tensors)
            rows = {"down": part.down, "up": part.up, "magnitude": part.magnitude, "bias": part.bias}
            return self._named(name, {role: x for role, x in rows.items() if x is not None}, part)
        if self.to == "diffusers":
            raise CannotSay(_kind(module))
        return {name + _ENDS.get(role, f".{role}"): x for role, x in tensors.items()}


def _kind(module: Module) -> str:
    """An algebra, for people."""
    names = {"lokr": "LoKr", "loha": "LoHa", "glora": "GLoRA", "diff": "a whole difference", "bias": "a bias"}
    plain = module.algebra.removeprefix("dora of ")
    if plain == "lora":
        return "a Tucker core" if "mid" in module.tensors else "DoRA by columns"
    return names.get(plain, plain)


def _text_names() -> dict[Network, dict[str, str]]:
    """Names of the text encoders' Linears, `flat_text` -> with their dots; of CLIP's as transformers before 5 has them,
    which all tools read."""
    variant = next(variant for variant in VARIANTS.values() if variant.t5_config)
    clip, t5 = clip_shapes(variant.clip_config), t5_shapes(variant.t5_config)
    found = {name.removesuffix(".weight"): "text_model." for name in clip if name.endswith(".weight")}
    return {
        "clip": {flat_text(name): prefix + name for name, prefix in found.items()},
        "t5": {flat_text(name): name for name in (x.removesuffix(".weight") for x in t5)},
    }


_TEXT = _text_names()
