"""Read a LoRA's header: which modules it trains, by which algebra, in which dialect; or what it is instead. No torch.

Everything that can be wrong with a file is found here, before a tensor is read or a model is touched, so that a refused
file leaves the model as it was.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.check import NOUNS
from ..checkpoint.contents import listing
from ..checkpoint.header import WEIGHT_DTYPES, Header
from ..checkpoint.shapes import Shape
from ..checkpoint.source import Source, file_in, find_source
from ..errors import FileError
from ..files import user_path
from ..jsonfile import read_json
from ..params import FluxParams
from ..variants import VARIANTS, Variant
from .dialects import (
    TOKENS,
    WORDS,
    Key,
    Network,
    Table,
    Target,
    flat,
    flat_text,
    other_algebra,
    other_model,
    split_key,
)
from .ranks import RankSchedule
from .tokens import KEYS, are_tokens, tokens_of

ADAPTER_METADATA = "lora_adapter_metadata"
"""a header's key under which diffusers keeps PEFT's configuration"""
WHOLE_ALPHAS = tuple(f".alpha is {kind}" for kind in ("I8", "U8", "I16", "I32", "I64"))
"""the numbers in files that may be whole, as the error would name them"""
BIASES = ("diff_b", "up_bias")
"""roles of differences to a bias"""
FILE_NAMES = ("pytorch_lora_weights", "adapter_model", "lora", "learned_embeds")
"""names of the file to use in a folder of several, the first that is there"""


class Misfit(FileError):
    """A LoRA for a model of other sizes."""


@dataclass(frozen=True)
class Module:
    """One trained module: where its difference goes, and the file's tensors that it is made of."""

    stem: str
    """its name in the file"""
    network: Network
    tool: str
    target: Target
    """of a text encoder: its module, `flat`, and no rows"""
    tensors: Mapping[str, str]
    """role (`adapters.ENDINGS`) -> the tensor's name in the file"""
    shapes: Mapping[str, Shape]
    """by role"""
    scale: float | None = None
    """what the header says alpha / rank is, without an alpha of its own"""
    schedule: RankSchedule | None = None
    """what the header says of its ranks at each noise level (T-LoRA)"""

    @property
    def algebra(self) -> str:
        """lora, lokr, loha, glora, diff, norm, or bias; with DoRA's magnitude "dora of ..."."""
        roles = set(self.tensors)
        found = next(iter(_algebras(roles)), "bias" if "diff_b" in roles else "norm")
        return f"dora of {found}" if "magnitude" in roles else found

    @property
    def rank(self) -> int | None:
        """Of its low-rank factor; None without one."""
        glora = [self.shapes.get(f"glora_{x}", ()) for x in ("a1", "a2", "b1", "b2")]
        if all(len(shape) > 1 for shape in glora):
            return glora[3][0] if glora_is_new(*glora) else glora[2][0]
        for role in ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
            if shape := self.shapes.get(role):
                return shape[0]
        return None


_ALGEBRAS = {"lokr_": "lokr", "hada_": "loha", "glora_": "glora", "down": "lora", "up": "lora", "diff": "diff"}


def _algebras(roles: Iterable[str]) -> list[str]:
    """What factors of a weight's difference there are, by what their roles begin with."""
    found = (kind for start, kind in _ALGEBRAS.items() for x in roles if x.startswith(start) and x not in BIASES)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's contents, by its header."""

    path: Path
    """as it was named"""
    source: Source
    modules: tuple[Module, ...]
    """of all networks"""
    norms: Mapping[str, str]
    """official norm scales that are replaced -> the tensor's name in the file"""
    unmatched: tuple[str, ...] = ()
    """modules that name nothing in the model"""
    tokens: tuple[str, ...] = ()
    """the tensors of trained tokens"""
    total: int = 0
    """trained Linears that a transformer of this size has"""
    notes: tuple[str, ...] = field(default=())

    @property
    def header(self) -> Header:
        return self.source.headers[0]

    @property
    def name(self) -> str:
        return self.header.path.name if self.path.is_dir() else self.path.name

    def of(self, network: Network) -> list[Module]:
        return [module for module in self.modules if module.network == network]

    @cached_property
    def schedule(self) -> RankSchedule | None:
        """T-LoRA's, if its header has one: it must be drawn by it."""
        return next((module.schedule for module in self.modules if module.schedule is not None), None)

    def active(self, sigma: float) -> dict[int, int]:
        """How many ranks count at a noise level, by the ranks that its modules have; none where all count."""
        schedule = self.schedule
        ranks = {module.rank for module in self.modules if module.schedule is not None and module.rank}
        return {} if schedule is None else {rank: schedule.active(rank, sigma) for rank in sorted(ranks)}

    @cached_property
    def named_tokens(self) -> Mapping[str, Mapping[Network, str]]:
        """Trained tokens that prompts can name: the word -> its vectors' tensor for an encoder."""
        return tokens_of(self.source.shapes, self.header.metadata, self.header.path.stem)

    @property
    def is_tokens(self) -> bool:
        """Whether there are vectors of trained tokens, and nothing else."""
        return bool(self.named_tokens) and not self.modules and not self.norms

    @property
    def unused_tokens(self) -> list[str]:
        """Tensors of trained tokens that nothing here uses."""
        used = {name for of in self.named_tokens.values() for name in of.values()}
        return [name for name in self.tokens if name not in used and name not in KEYS]

    @cached_property
    def dialect(self) -> str:
        """The tools whose names the transformer's keys have, and the algebras: "kohya, lora"."""
        mine = self.of("transformer") or list(self.modules)
        tools = " and ".join(tool for tool, _ in Counter(_tool(module) for module in mine).most_common())
        algebras = ", ".join(kind for kind, _ in Counter(module.algebra for module in mine).most_common())
        return f"{tools} ({algebras})"

    @property
    def words(self) -> str:
        """The words that it was trained with, by the header; empty if it has none."""
        metadata = self.header.metadata
        found = next((metadata[key].strip() for key in WORDS if metadata.get(key, "").strip()), "")
        return found or _frequent_tags(metadata.get("ss_tag_frequency", ""))

    @property
    def ranks(self) -> str:
        """Its ranks, as text: "16", or "2 to 6"."""
        ranks = sorted({module.rank for module in self.modules if module.rank is not None})
        if not ranks:
            return "no rank"
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _tool(module: Module) -> str:
    """The name of a module's dialect."""
    if ".processor." in module.stem:
        return "XLabs"
    known = {"diffusers": "diffusers/PEFT", "PEFT": "PEFT", "official": "official names"}
    if module.tool == "ComfyUI":
        return "ComfyUI" if re.search(r"(double|single)_blocks|_in\b|final_layer", module.stem) else "SimpleTuner"
    return known.get(module.tool, module.tool)


def _frequent_tags(text: str) -> str:
    """The most frequent tags of kohya's `ss_tag_frequency`, or nothing."""
    try:
        counts = Counter[str]()
        for folder in json.loads(text or "{}").values():
            counts.update({tag.strip(): int(count) for tag, count in folder.items()})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""
    return ", ".join(tag for tag, _ in counts.most_common(3))


def find_lora(path: str | Path) -> Path:
    """The file that a path means: itself, or a trainer's folder's. FileError."""
    return file_in(user_path(path), FILE_NAMES)


def read_lora(path: str | Path, params: FluxParams) -> LoraFile:
    """The contents of a LoRA for a transformer of these sizes. FileError for a file that is none, or is damaged.

    Modules that name nothing in the model are listed, not refused: `check_matched` does that.
    """
    found = read_names(path, params)
    check_shapes(found, params)
    return found


def read_names(path: str | Path, params: FluxParams) -> LoraFile:
    """`read_lora` for a transformer of as many blocks, whose sizes may differ."""
    file = find_lora(path)
    source = find_source(file)
    keys = {name: split_key(name) for name in source.shapes}
    _refuse_others(file, source)
    tokens = tuple(keys) if are_tokens(keys) else tuple(name for name in keys if name.startswith(TOKENS))
    if not tokens and not any(key.role for key in keys.values()):
        _refuse_model(file, source)
    _check_dtypes(file, source)
    table = Table(params)
    norms, rest = _norms(file, {name: key for name, key in keys.items() if name not in tokens}, table)
    configs = _peft_configs(file, source.headers[0].metadata)
    schedule = _schedule(file, source.headers[0].metadata)
    modules, unmatched = [], []
    for stem, tensors in _grouped(file, rest).items():
        key = split_key(next(iter(tensors.values())))
        target = _target(key, table)
        odd = not tensors.keys().isdisjoint({"", "set_weight"})
        if target is None or odd or (target.module.endswith(".scale") and set(tensors) != {"diff"}):
            unmatched.append(stem)
            continue
        shapes = {role: source.shapes[name] for role, name in tensors.items()}
        scale = _header_scale(key, shapes, configs)
        ranks = schedule if key.network == "transformer" else None  # a prompt has no noise level
        modules.append(Module(stem, key.network, key.tool, target, tensors, shapes, scale, ranks))
    return LoraFile(
        Path(path), source, tuple(modules), norms, tuple(unmatched), tokens,
        sum(len(shape) == 2 for shape in table.shapes.values()),
    )  # fmt: skip


def check_shapes(lora: LoraFile, params: FluxParams) -> None:
    """FileError where factors do not go together, or have not the sizes of the transformer."""
    table = Table(params)
    for parameter, name in lora.norms.items():
        if (found := lora.source.shapes[name]) != table.shapes[parameter]:
            raise Misfit(_misfit(lora.source.path, name, found, table.shapes[parameter]))
    changed = dict(lora.norms)
    for module in lora.of("transformer"):
        check_module(lora, module, table.shape(module.target))
        if module.schedule is not None and module.algebra != "lora":
            raise FileError(
                f"{lora.path}: its header has a T-LoRA's schedule of ranks, and {module.stem} is {module.algebra}, "
                "which has no ranks to leave out. Next: save it again."
            )
        if module.target.module.endswith(".scale"):
            name = module.tensors["diff"]
            if (other := changed.setdefault(module.target.module, name)) != name:
                raise FileError(_twice(lora.path, other, name))


def resolve_text(lora: LoraFile, linears: Mapping[Network, Mapping[str, Shape]]) -> LoraFile:
    """The file with its text encoders' modules by the names that the encoders have; others are unmatched. FileError.

    linears: of the encoders that are there, by name, with their shapes.
    """
    modules, unmatched = [], list(lora.unmatched)
    tables = {network: {flat_text(name): name for name in shapes} for network, shapes in linears.items()}
    for module in lora.modules:
        if module.network in tables:
            name = tables[module.network].get(flat_text(module.target.module))
            if name is None:
                unmatched.append(module.stem)
                continue
            shape = linears[module.network][name]
            check_module(lora, module, shape)
            module = replace(module, target=module.target._replace(module=name, stop=shape[0]))
        modules.append(module)
    return replace(lora, modules=tuple(modules), unmatched=tuple(unmatched))


def check_matched(lora: LoraFile, allow_partial: bool, flag: str = "--lora-allow-partial") -> None:
    """FileError for a file with nothing for the transformer, or with modules that name nothing in the model.

    flag: the one that allows the latter, for the error.
    """
    path = lora.path
    if not lora.of("transformer") and not lora.norms and not lora.named_tokens:
        text = lora.of("clip") + lora.of("t5")
        if lora.unmatched:
            found = f"none of its {len(lora.unmatched)} modules is in the transformer: {_first(lora.unmatched)}"
        elif text:
            found = f"it trains {len(text)} modules of the text encoders, and none of the transformer"
        else:
            found = "it trains nothing of the transformer"
        raise FileError(f"{path} is no LoRA for this model: {found}. Next: give a LoRA for FLUX.1.")
    if lora.unmatched and not allow_partial:
        matched = len(lora.modules) + len(lora.norms)
        raise FileError(
            f"{path}: {len(lora.unmatched)} of {len(lora.unmatched) + matched} modules name nothing in this model: "
            f"{_first(lora.unmatched)}. Next: check that it is for this model, or add {flag} "
            "to apply the others."
        )


def _first(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _refuse_model(file: Path, source: Source) -> None:
    """FileError for weights that are no LoRA at all."""
    found = source.identity()
    if found.part in NOUNS:
        raise FileError(f"{file} is {found.text}, and no LoRA. Next: give it with --model, --ae, --clip-l or --t5xxl.")
    if found.part == "controlnet":
        raise FileError(f"{file} is {found.text}, and no LoRA. Next: give it with --controlnet.")
    if found.part == "other" and not any("norm" in name for name in source.shapes):
        raise FileError(
            f"{file} is no LoRA: none of its {len(source.shapes)} tensors is a factor of a difference to a weight "
            f"({', '.join(list(source.shapes)[:3])}). Next: give a LoRA for FLUX.1."
        )


def _not_applied(file: Path, name: str, what: str) -> str:
    return (
        f"{file} is {what} (its tensor {name}), which turns or gates weights instead of adding to them, and is not "
        "supported. Next: train or convert it as LoRA, LoKr or LoHa."
    )


def _refuse_others(file: Path, source: Source) -> None:
    """FileError for a LoRA for another model, and for an algebra that is not supported."""
    if model := other_model(source.shapes, source.headers[0].metadata):
        raise FileError(f"{file} is a LoRA for {model}, not for FLUX.1. Next: give a LoRA for FLUX.1.")
    if other := other_algebra(source.shapes):
        raise FileError(_not_applied(file, *other))


def _check_dtypes(file: Path, source: Source) -> None:
    """FileError for dtypes that are no numbers."""
    kinds = {name: kind for name, kind in source.dtypes.items() if not name.endswith(".reshape_weight")}
    foreign = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in WEIGHT_DTYPES]
    if foreign := [x for x in foreign if not x.endswith(WHOLE_ALPHAS)]:
        found = listing("tensors that are no plain bf16, fp16, fp32 or fp8", foreign)
        raise FileError(f"{file}: {found}. Next: take it in bf16 or fp16.")


def _grouped(file: Path, keys: Mapping[str, Key]) -> dict[str, dict[str, str]]:
    """Stem -> role -> the tensor's name in the file. FileError for a factor in two spellings."""
    found: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        other = found.setdefault(key.stem, {}).setdefault(key.role, name)
        if other != name:
            raise FileError(_twice(file, other, name))
    return found


def _twice(file: Path, one: str, other: str) -> str:
    return f"{file}: {one} and {other} are the same factor of one module. Next: fetch the file again."


def _norms(file: Path, keys: Mapping[str, Key], table: Table) -> tuple[dict[str, str], dict[str, Key]]:
    """Norm scales that the file replaces, and the other keys. FileError for one that it replaces twice."""
    found: dict[str, str] = {}
    rest: dict[str, Key] = {}
    for name, key in keys.items():
        replaces = key.network == "transformer" and key.role in ("", "set_weight")
        parameter = table.norms.get(flat(key.module)) if replaces else None
        if parameter is None:
            rest[name] = key
            continue
        if (other := found.setdefault(parameter, name)) != name:
            raise FileError(_twice(file, other, name))
    return found, rest


def _target(key: Key, table: Table) -> Target | None:
    """Where a module's difference goes; of a text encoder the flat name, since only the loaded encoder has a table."""
    if key.network != "transformer":
        return Target(flat(key.module), 0, 0)
    if found := table.linears.get(flat(key.module)):
        return found
    norm = table.norms.get(flat(key.module))
    return None if norm is None else Target(norm, 0, table.shapes[norm][0])


# Shapes ------------------------------------------------------------------------------------------------------


def check_module(lora: LoraFile, module: Module, expected: Shape) -> None:
    """FileError where factors do not go together, or do not have the size of the rows that they train."""
    path, found = lora.path, check_factors(lora, module)
    wide = expected[0] + module.target.spare_rows, *(size + module.target.spare_columns for size in expected[1:])
    sizes = (expected,) if module.algebra.endswith("glora") else (expected, wide)  # GLoRA multiplies the weight itself
    if found is not None and found not in sizes and not _widens(module, found, expected):
        raise Misfit(_misfit(path, module.stem, found, expected))
    for role in ("diff_b", "up_bias", "magnitude"):
        if (shape := module.shapes.get(role)) is None:
            continue
        by_rows = math.prod(shape) in (expected[0], wide[0])
        if not (_magnitude_fits(shape, expected, wide) if role == "magnitude" else by_rows):
            raise Misfit(_misfit(path, f"{module.stem} ({role})", shape, expected[:1]))


def check_factors(lora: LoraFile, module: Module) -> Shape | None:
    """The shape of the difference that a module's factors make; None where they make none. FileError where they do not
    go together."""
    _check_pairs(lora.path, module)
    return _product_shape(lora.path, module, {role: _matrix(shape) for role, shape in module.shapes.items()})


def _magnitude_fits(shape: Shape, *weights: Shape) -> bool:
    """Whether DoRA's magnitudes are one for each row [N], [N, 1, ...], or one for each column [1, K]."""
    count = math.prod(shape)
    return any(count == (w[1] if len(shape) > 1 and shape[0] == 1 and w[0] != 1 else w[0]) for w in weights)


def _widens(module: Module, found: Shape, expected: Shape) -> bool:
    """Whether a module makes the model's input wider, as a control LoRA does."""
    wide = len(found) == len(expected) == 2 and found[0] == expected[0] and found[1] > expected[1]
    plain = module.algebra.removeprefix("dora of ") in ("lora", "diff")
    return wide and plain and module.target.module == "img_in"


def widened_input(lora: LoraFile, params: FluxParams) -> int:
    """Features of an image token that the model takes with this LoRA."""
    widths = [
        module.shapes[role][1]
        for module in lora.of("transformer")
        if module.target.module == "img_in"
        for role in ("down", "diff")
        if len(module.shapes.get(role, ())) > 1
    ]
    return max([params.in_channels, *widths])


def check_drawable(lora: LoraFile, params: FluxParams) -> None:
    """FileError for a control LoRA, which takes a second picture that a request does not have."""
    if (width := widened_input(lora, params)) != params.in_channels:
        beside = width - params.in_channels
        rows = [x for x in VARIANTS.values() if x.params == params and x.takes.features == beside and x.adapter]
        advice = f"FLUX_LORA=FILE and --name {' or '.join(row.name for row in rows)}" if rows else "take another"
        raise FileError(
            f"{lora.path} is a control LoRA: with it the model takes {width} features a token, {beside} of them from a "
            f"control picture. Next: {advice}"
        )


def check_own(path: Path, variant: Variant) -> None:
    """FileError for a file that is no LoRA, or that does not widen the input by what that model gives it to see."""
    lora, gives = read_lora(path, variant.params), variant.takes.features
    if (takes := widened_input(lora, variant.params) - variant.params.in_channels) != gives:
        kind = "a LoRA for another model" if takes else "no control LoRA"
        raise FileError(
            f"{path} is {kind}: with it a token takes {takes} features of a picture, and {variant.name} gives {gives}. "
            f"Next: give one for {variant.name}"
        )


def check_tokens(lora: LoraFile, params: FluxParams) -> None:
    """FileError where vectors of trained tokens have not the widths of the text encoders of a model of these sizes."""
    widths: dict[Network, int] = {"clip": params.vec_in_dim, "t5": params.context_in_dim}
    for word, of in lora.named_tokens.items():
        for network, name in of.items():
            if (shape := lora.source.shapes[name])[-1:] != (widths[network],):
                raise Misfit(
                    f"{lora.path}: {name}, of the token {word}, has the shape {list(shape)}, and the text encoder "
                    f"vectors of {widths[network]} numbers. Next: give a file for this model."
                )


def _matrix(shape: Shape) -> Shape:
    """A factor's shape as a matrix: 1x1 convolutions are flattened."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape


_NEEDS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("down", (("up",),)),
    ("up", (("down",),)),
    ("up_bias", (("up",),)),
    ("mid", (("down",),)),
    ("magnitude", (("down",), ("lokr_w1",), ("lokr_w1_a",), ("hada_w1_a",), ("diff",), ("glora_a1",))),
    ("lokr_w1", (("lokr_w2",), ("lokr_w2_a",))),
    ("lokr_w1_a", (("lokr_w1_b", "lokr_w2"), ("lokr_w1_b", "lokr_w2_a"))),
    ("lokr_w1_b", (("lokr_w1_a",),)),
    ("lokr_w2", (("lokr_w1",), ("lokr_w1_a",))),
    ("lokr_w2_a", (("lokr_w2_b", "lokr_w1"), ("lokr_w2_b", "lokr_w1_a"))),
    ("lokr_w2_b", (("lokr_w2_a",),)),
    *((f"hada_{x}", (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),)) for x in ("w1_a", "w1_b", "w2_a", "w2_b")),
    ("hada_t1", (("hada_t2",),)),
    ("hada_t2", (("hada_t1",),)),
    ("lokr_t2", (("lokr_w2_a",),)),
    ("reshape_weight", (("down",), ("diff",))),
    *((f"glora_{x}", (("glora_a1", "glora_a2", "glora_b1", "glora_b2"),)) for x in ("a1", "a2", "b1", "b2")),
    ("alpha", (("down",), ("lokr_w1",), ("lokr_w1_a",), ("hada_w1_a",), ("glora_a1",), ("diff",), ("diff_b",))),
)
"""role -> the sets of roles of which one has to be there, too"""


def _check_pairs(path: Path, module: Module) -> None:
    if len(kinds := _algebras(module.tensors)) > 1:
        raise FileError(
            f"{path}: {module.stem} has factors of {' and '.join(kinds)} at once, of which only one can be meant. "
            "Next: fetch the file again, or train it again."
        )
    if whole := next((x for x in ("lokr_w1", "lokr_w2") if {x, f"{x}_a"} <= module.tensors.keys()), None):
        raise FileError(_twice(path, module.tensors[whole], module.tensors[f"{whole}_a"]))
    for role, options in _NEEDS:
        if role in module.tensors and not any(set(option) <= set(module.tensors) for option in options):
            lacking = options[0][0]
            raise FileError(
                f"{path}: half of a pair: {module.tensors[role]} is there, and no {lacking} with it. "
                "Next: fetch the file again, or train it again."
            )


def _product_shape(path: Path, module: Module, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the difference that a module's factors make; None where they have none. FileError."""
    for role, shape in shapes.items():
        if 0 in shape:
            raise FileError(f"{path}: {module.tensors[role]} has the shape {list(shape)}: rank 0 trains nothing.")
        if role in ("alpha", "reshape_weight", "magnitude", "diff_b", "up_bias", "diff"):
            continue
        if len(shape) > 2 and role not in ("mid", "hada_t1", "hada_t2", "lokr_t2"):
            raise FileError(f"{path}: {module.tensors[role]} has the shape {list(module.shapes[role])}, and FLUX.1 has "
                            "no convolutions in its transformer.")  # fmt: skip
        if len(shape) < 2:
            raise FileError(f"{path}: {module.tensors[role]} is no matrix, its shape is {list(shape)}.")

    def product(left: str, right: str, core: str = "") -> Shape:
        a, b = shapes[left], shapes[right]
        if core in shapes:  # Tucker's form of LoHa and LoKr has its outer factors as [rank, size]
            if shapes[core] != (a[0], b[0]):
                raise FileError(_unlike(path, module, left, core))
            return a[1], b[1]
        middle = shapes["mid"] if left == "up" and "mid" in shapes else (a[1], a[1])
        if middle != (a[1], b[0]):
            raise FileError(_unlike(path, module, left, right))
        return a[0], b[1]

    if "down" in shapes:
        return product("up", "down")
    if "lokr_w1" in shapes or "lokr_w1_a" in shapes:
        w1 = shapes.get("lokr_w1") or product("lokr_w1_a", "lokr_w1_b")
        w2 = shapes.get("lokr_w2") or product("lokr_w2_a", "lokr_w2_b", "lokr_t2")
        return w1[0] * w2[0], w1[1] * w2[1]
    if "hada_w1_a" in shapes:
        first = product("hada_w1_a", "hada_w1_b", "hada_t1")
        if first != product("hada_w2_a", "hada_w2_b", "hada_t2"):
            raise FileError(_unlike(path, module, "hada_w1_a", "hada_w2_a"))
        return first
    if "glora_a1" in shapes:
        sizes = [shapes[f"glora_{x}"] for x in ("a1", "a2", "b1", "b2")]
        a1, a2, b1, b2 = sizes if glora_is_new(*sizes) else (sizes[i] for i in (1, 0, 3, 2))
        fits = {"a1 a2": a1[1] == a2[0], "b1 b2": b1[1] == b2[0], "a1 b2": a1[0] == a2[1] == b2[1]}
        if pair := next((pair.split() for pair, sound in fits.items() if not sound), None):  # W a1 a2 has W's shape
            raise FileError(_unlike(path, module, *(f"glora_{x}" for x in pair)))
        return b1[0], b2[1]
    return shapes.get("diff")


def glora_is_new(a1: Shape, a2: Shape, b1: Shape, b2: Shape) -> bool:
    """Whether GLoRA's factors are a1 [K, r], a2 [r, K], b1 [N, r], b2 [r, K]; older files have all of them turned."""
    return b2[0] == b1[1] == a1[1] == a2[0]


def _unlike(path: Path, module: Module, left: str, right: str) -> str:
    a, b = (list(module.shapes[role]) for role in (left, right))
    return (
        f"{path}: {module.tensors[left]} {a} and {module.tensors[right]} {b} cannot be multiplied. "
        "Next: fetch the file again."
    )


def _misfit(path: Path, name: str, found: Shape, expected: Shape) -> str:
    return (
        f"{path}: {name} is a difference of shape {list(found)}, and the model has {list(expected)} there. "
        "Next: give a LoRA for this model."
    )


# The scale in the header -------------------------------------------------------------------------------------


def _peft_configs(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configurations in the header, or in the folder, by the prefix of the keys they are for ("" for all)."""
    if ADAPTER_METADATA in metadata:
        try:
            found = json.loads(metadata[ADAPTER_METADATA])
            assert isinstance(found, dict)
        except (ValueError, AssertionError, RecursionError):
            finding = f"{ADAPTER_METADATA} in its header is no JSON object"
            raise FileError(f"{file}: {finding}. Next: save it again.") from None
        configs: dict[str, dict[str, Any]] = {}
        for key, value in found.items():
            part, dot, name = key.partition(".")
            known = part in ("transformer", "text_encoder", "text_encoder_2", "unet")
            configs.setdefault(part if dot and known else "", {})[name if dot and known else key] = value
        return configs
    beside = file.parent / "adapter_config.json"
    if file.stem == "adapter_model" and beside.is_file():
        found = read_json(beside, "PEFT's configuration")
        return {"": found} if isinstance(found, dict) else {}
    return {}


def _schedule(file: Path, metadata: Mapping[str, str]) -> RankSchedule | None:
    """T-LoRA's schedule in the header. FileError for one that is none."""
    try:
        return RankSchedule.of(metadata)
    except ValueError as error:
        finding = f"T-LoRA's schedule in its header is none ({error})"
        raise FileError(f"{file}: {finding}. Next: save it again.") from None


_CONFIG_OF = {"transformer": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"}


def _header_scale(key: Key, shapes: Mapping[str, Shape], configs: Mapping[str, Mapping[str, Any]]) -> float | None:
    """alpha / rank by PEFT's configuration, or alpha / sqrt(rank) (rsLoRA); None without a configuration."""
    config = configs.get(_CONFIG_OF[key.network], configs.get(""))
    if config is None or "down" not in shapes or "lora_alpha" not in config:
        return None
    try:
        alpha = float(_by_pattern(config.get("alpha_pattern"), key.module, config["lora_alpha"]))
        rank = shapes["down"][0]
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    except (TypeError, ValueError, ZeroDivisionError, IndexError):
        return math.nan


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or a dotted end of it, as PEFT finds it.

    Patterns are names, `\\.` for a dot or not, with `|` between them and `^` before a whole one; ValueError for
    others. A header is anybody's, and an expression in it could keep a search busy for ever.
    """
    for pattern, value in dict(patterns or {}).items():
        for name in pattern.replace("\\.", ".").split("|"):
            bare = name.removeprefix("^").removesuffix("$")
            if not re.fullmatch(r"[\w.-]*", bare):
                raise ValueError(f"{pattern} is no name")
            if module == bare or (bare == name.removesuffix("$") and module.endswith(f".{bare}")):
                return value
    return default
