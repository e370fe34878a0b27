"""All that learns of a model: factors beside its frozen Linears, by patterns of names; and the file that they are.

Modules have diffusers' names, since files are saved by them: q, k and v are rows of one official Linear. They are
matched as PEFT does: a pattern is a whole name or its end behind a dot, so `to_q` hits single blocks, too.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checkpoint.write import write_safetensors
from ..errors import UsageError, nearest
from ..files import disk_errors, expand_home
from ..hooks.layers import layers_of
from ..lora.dialects import Table, Target, flat
from ..lora.file import ADAPTER_METADATA, FILE_NAMES
from ..lora.ranks import LYCORIS_CONFIG, RankSchedule
from ..model import Flux
from ..params import FluxParams
from .factors import PREFIX, DoraFactors, Factors, Learned, root, weight_of
from .lokr import LokrFactors, shapes
from .optimizers import Average
from .sharding import gathered

T = TypeVar("T")
BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
"""official name -> diffusers'"""
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ATTENTION,
        "blocks": (
            *(f"attn.{name}" for name in (*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
            *("norm1.linear", "norm1_context.linear", "norm.linear"),
            *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
        ),
    }
)
"""patterns by name. `attention`: the notebook's four; `blocks`: all Linears of the blocks"""


class AdaptedLinear(nn.Module):
    """A layer, and factors for some of its rows, in their order and apart."""

    def __init__(self, base: nn.Module, factors: Iterable[Learned]) -> None:
        super().__init__()
        self.base: Any = base
        in_order: list[Learned] = sorted(factors, key=lambda one: one.target.start)
        self.factors = nn.ModuleList(in_order)
        self.is_on = True
        self.in_features, self.out_features = self.base.in_features, self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        y, pieces, done = self.base(x), [], 0
        if not self.is_on:
            return y
        for one in cast(Iterable[Learned], self.factors):
            start, stop = one.target.start, one.target.stop
            pieces += [y[..., done:start], one(x, y[..., start:stop], self.base)]
            done = stop
        pieces = [piece for piece in (*pieces, y[..., done:]) if piece.shape[-1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


@dataclass(frozen=True)
class Form:
    """What learns beside each Linear."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    lokr: int = 0
    """LoKr's factor, -1 for the largest; 0: no LoKr"""
    schedule: RankSchedule | None = None
    """of T-LoRA"""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """of modules that have another, by name"""

    def __post_init__(self) -> None:
        """UsageError for what does not go together."""
        if self.schedule is not None and self.schedule.least > self.rank:
            raise UsageError(f"T-LoRA's least rank is {self.schedule.least}, more than the rank {self.rank}")
        chosen = {"DoRA": self.dora, "LoKr": self.lokr, "T-LoRA": self.schedule}
        if len(several := [name for name, value in chosen.items() if value]) > 1:
            raise UsageError(f"{' and '.join(several)} do not go together. Next: leave one out")
        if self.lokr and self.rslora:
            raise UsageError("rsLoRA is a scale of LoRA's, and none of LoKr's. Next: leave one out")

    def rank_of(self, name: str) -> int:
        return self.ranks.get(name, self.rank)

    def alpha_of(self, name: str) -> float:
        """As much more as its rank, so that alpha / rank is that of all; rsLoRA's scale is by the rank itself."""
        return self.alpha if self.rslora else self.alpha * (self.rank_of(name) / self.rank)

    def numbers(self, name: str, rows: int, columns: int) -> int:
        """How many learn beside a Linear of these sizes, but for DoRA's magnitudes."""
        rank = self.rank_of(name)
        if not self.lokr:
            return rank * (rows + columns)
        return sum(math.prod(size) for size in shapes(rows, columns, rank, self.lokr).values())

    def beside(self, name: str, target: Target, layer: Any) -> Learned:
        """What learns of that module, on the device of its layer. UsageError."""
        device = next(x.device for x in (*layer.parameters(), *layer.buffers()))
        rank, alpha, columns = self.rank_of(name), self.alpha_of(name), layer.in_features
        if self.lokr:
            return LokrFactors(target, columns, rank, alpha, self.lokr, device)
        sizes = target, columns, rank, alpha / (math.sqrt(rank) if self.rslora else rank), device
        if not self.dora:
            return Factors(*sizes)
        if target.spare_rows:
            raise UsageError(
                f"{name} has more rows in diffusers than in this model, all zeros, and DoRA divides by their norms. "
                "Next: leave DoRA out, or name other targets"
            )
        return DoraFactors(*sizes, weight_of(layer, torch.float32))

    def config(self, names: Sequence[str]) -> dict[str, Any]:
        """What is not in the tensors, under the names of PEFT's configurations; patterns only where ranks differ."""
        if self.lokr:
            found = {"alpha": self.alpha, "decompose_factor": self.lokr, "peft_type": "LOKR"}
        else:
            found = {"lora_alpha": self.alpha, "peft_type": "LORA", "use_dora": self.dora, "use_rslora": self.rslora}
        found |= {"r": self.rank, "target_modules": sorted(names)}
        if others := [name for name in sorted(names) if self.rank_of(name) != self.rank]:
            found["rank_pattern"] = {f"^{name}": self.rank_of(name) for name in others}
            found["alpha_pattern"] = {f"^{name}": self.alpha_of(name) for name in others if not self.rslora}
        return found

    def lycoris(self) -> dict[str, Any]:
        """The configuration for LyCORIS of LoKr and T-LoRA; none for others."""
        if self.schedule is None and not self.lokr:
            return {}
        own = {"algo": "lokr", "factor": self.lokr} if self.schedule is None else self.schedule.config()
        return {**own, "linear_alpha": self.alpha, "linear_dim": self.rank}


class Adapter:
    """The factors beside a model's Linears, by diffusers' names of modules. The model's own weights are frozen."""

    def __init__(self, model: Flux, factors: Mapping[str, Learned], form: Form) -> None:
        self.model, self.factors, self.form = model, dict(factors), form
        model.changes = model.changes.next(scales=False)
        self.average: Average | None = None
        """of what learns, if one is kept: what is sampled and saved"""
        self.rates: dict[str, float] = {}
        """learning rates of modules that have their own, by name"""
        self._drawn: dict[int, Tensor] = {}
        """masks of the step that is drawn, by rank"""

    def parameters(self) -> list[nn.Parameter]:
        """All that learns, in the order of names."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All that learns, by the module's name and `down`, `up` or `magnitude`, or LoKr's `w1` …; in the order of
        modules' names."""
        return {
            f"{name}.{role}": x for name in sorted(self.factors) for role, x in self.factors[name].named_parameters()
        }

    def factors_of_rate(self, lr: float, lora_plus: float = 1.0) -> dict[str, float]:
        """What the rate `lr` is multiplied by, of the parameters where that is not 1, by name.

        lora_plus: that of the factors that begin at zero.
        """
        found: dict[str, float] = {}
        for name, one in self.factors.items():
            own = self.rates[name] / lr if name in self.rates and lr else 1.0
            for role, _ in one.named_parameters():
                found[f"{name}.{role}"] = own * (lora_plus if role == one.later else 1.0)
        return {name: factor for name, factor in found.items() if factor != 1}

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the factors are their average, if one is kept."""
        return nullcontext() if self.average is None else self.average.averaged()

    @property
    def networks(self) -> list[nn.Module]:
        """All that learns: the transformer."""
        return [self.model]

    def encoded(self, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """The texts of a batch as the model takes them: T5's tokens [B, T, D] and CLIP's vectors [B, V]."""
        return txt, vec

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context in which the model is as it was before it learned."""
        layers = [layer for one in self.networks for layer in one.modules() if isinstance(layer, AdaptedLinear)]
        for layer in layers:
            layer.is_on = False
        try:
            yield
        finally:
            for layer in layers:
                layer.is_on = True

    # The noise level, by which ranks are active (T-LoRA) ---------------------------------------------------

    def at(self, sigma: Tensor) -> None:
        """Tell the noise levels [B] of a batch, before its forward; its backward ends before the next are told."""
        masks = self._masks(sigma)
        for one in self.factors.values() if masks else ():
            one.mask = masks[one.rank]

    def set(self, sigma: float) -> None:
        """Tell the noise level of a step that is drawn: always in the same memory (`model.Adapt`)."""
        masks = self._masks(torch.tensor([sigma], dtype=torch.float64, device="cpu"))
        for rank, mask in masks.items():
            self._drawn.setdefault(rank, mask).copy_(mask)
        for one in self.factors.values() if masks else ():
            one.mask = self._drawn[one.rank]

    def group(self, sigma: float) -> tuple[int, ...]:
        """How many ranks are active at a level, of each rank that there is (`model.Adapt`)."""
        schedule = self.form.schedule
        return () if schedule is None else tuple(schedule.active(rank, sigma) for rank in self._ranks)

    @property
    def _ranks(self) -> list[int]:
        return sorted({one.rank for one in self.factors.values()})

    def _masks(self, sigma: Tensor) -> dict[int, Tensor]:
        """The active ranks at these levels as ones [B, rank], by rank; none where all are."""
        if self.form.schedule is None:
            return {}
        active = torch.tensor([self.group(x) for x in sigma.tolist()], dtype=torch.int64, device="cpu")
        device = self.parameters()[0].device
        return {
            rank: (torch.arange(rank, dtype=torch.int64, device="cpu") < of[:, None]).float().to(device)
            for rank, of in zip(self._ranks, active.t(), strict=True)
        }

    # Its file ----------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """What is not in the tensors, under the names of PEFT's configurations."""
        return self.form.config(list(self.factors))

    def configs(self) -> dict[str, Any]:
        """PEFT's configurations of a file's networks, each under its prefix; LoKr has none."""
        return {} if self.form.lokr else {f"{PREFIX}{key}": value for key, value in self.config().items()}

    def identity(self) -> dict[str, Any]:
        """All that it is but for its numbers; of what is left out, nothing."""
        found = self.config() | self.form.lycoris()
        return found | ({"rates": self.rates} if self.rates else {})

    def state(self) -> dict[str, Tensor]:
        """The tensors of a file, fp32, in PEFT's keys such as `transformer.NAME.lora_A.weight`, or in LyCORIS'."""
        beside = {key: x for name, one in self.factors.items() for key, x in one.beside(name).items()}
        return self._in_file(lambda x: x.detach()) | beside

    def grads(self) -> dict[str, Tensor]:
        """The gradients, by the same keys."""
        return self._in_file(lambda x: cast(Tensor, x.grad))

    def _in_file(self, take: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return {
            one.key(name, role): one.to_file(role, take(x))
            for name, one in self.factors.items()
            for role, x in one.named_parameters()
        }

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write `pytorch_lora_weights.safetensors`, and return its path. DiskError.

        It is as diffusers writes it, with PEFT's header; T-LoRA with SimpleTuner's, too; LoKr as SimpleTuner does.

        The same numbers are the same bytes: there is no date, host or path in it.
        """
        configs = self.configs()
        header = {ADAPTER_METADATA: json.dumps(configs, sort_keys=True)} if configs else {}
        if lycoris := self.form.lycoris():
            header[LYCORIS_CONFIG] = json.dumps(lycoris, sort_keys=True)
        path = folder / f"{FILE_NAMES[0]}.safetensors"
        with disk_errors(folder, "folder"):
            folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.to("cpu", dtype) for name, x in self.state().items()}
        write_safetensors(path, tensors, header)
        return path

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the numbers of a file's tensors, of the same modules and ranks."""
        for name, one in self.factors.items():
            for role, x in one.named_parameters():
                found = one.from_file(role, state[one.key(name, role)])
                x.copy_(found[tuple(map(slice, x.shape))])  # what only diffusers' wider MLP has meets zeros there

    def changes(self) -> list[tuple[str, float]]:
        """How much each module's weight changed, as |difference| / |weight| (Frobenius), the most first. UsageError."""
        found = []
        for name, one in self.factors.items():
            layer = cast(AdaptedLinear, self.model.get_submodule(one.target.module))
            with gathered(self.model, one.target.module):
                own = one.rows_of(weight_of(layer.base, torch.float32))
                found.append((name, float(one.change(own).norm() / root(own.square().sum()))))
        return sorted(found, key=lambda item: (-item[1], item[0]))

    def remove(self) -> None:
        """The model has its own layers again."""
        for network in self.networks:
            for name, layer in list(network.named_modules()):
                if isinstance(layer, AdaptedLinear):
                    network.set_submodule(name, layer.base)
        self.model.changes = self.model.changes.next(scales=False)


def adapt(
    model: Flux,
    patterns: Iterable[str],
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
    rslora: bool = False,
    dora: bool = False,
    lokr: int = 0,
    schedule: RankSchedule | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Adapter:
    """Factors of that rank beside every module that a pattern matches, on its device; the model is frozen. UsageError.

    patterns: as PEFT's `target_modules`, with `*` for any characters. generator: on the CPU, for the first numbers.
    lokr, schedule, ranks: as in `Form`.
    """
    table, form = Table(model.params), Form(rank, alpha, rslora, dora, lokr, schedule, dict(ranks or {}))
    model.requires_grad_(False)
    of: dict[str, dict[str, Learned]] = {}
    for name in matching(model.params, patterns):
        target = table.linears[flat(name)]
        one = form.beside(name, target, model.get_submodule(target.module))
        one.reset(generator)
        of.setdefault(target.module, {})[name] = one
    for module, factors in of.items():
        model.set_submodule(module, AdaptedLinear(model.get_submodule(module), factors.values()))
    return Adapter(model, {name: one for factors in of.values() for name, one in factors.items()}, form)


def patterns_of(text: str, name: str, params: FluxParams) -> list[str]:
    """The patterns that a text means, with commas between its parts; none of "none". UsageError, FileError.

    A part is a pattern, a preset's name, `vital` for the vital blocks that are known of the model of that name, or
    `vital:FILE` for those in the `vital.json` that `importance` wrote: all Linears of those blocks.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",") if text != "none"):
        if part == "vital" or part.startswith("vital:"):
            blocks = layers_of(expand_home(part.removeprefix("vital:")), name, params)
            found += [f"{BLOCKS[kind]}.{number}.*" for kind, _, number in (x.partition(".") for x in blocks)]
        else:
            found += PRESETS.get(part, (part,))
    return found


def matching(params: FluxParams, patterns: Iterable[str]) -> list[str]:
    """The diffusers' names of Linears that patterns match, in the model's order.

    UsageError for a pattern that matches none.
    """
    table = Table(params)
    linears = {official for official, shape in table.shapes.items() if len(shape) == 2}
    names = [name for official, all in table.diffusers.items() if f"{official}.weight" in linears for name in all]
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if _matches(name, pattern)}
        if not hits:
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise UsageError(
                f"no Linear of the transformer is named {pattern!r}.{nearest(pattern, [*PRESETS, *ends, *names])}"
            )
        found |= hits
    return [name for name in names if name in found]


def by_pattern(
    text: str, kind: Callable[[str], T], name: str, params: FluxParams, learns: Iterable[str]
) -> dict[str, T]:
    """The values of modules that learn, by name, of "PATTERN=VALUE,…", each over those before. UsageError, FileError.

    A pattern is a part of what `patterns_of` reads. UsageError, too, where it is of nothing that learns.
    """
    found: dict[str, T] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, _, value = part.rpartition("=")
        if not pattern:
            raise UsageError(f"{part!a} has no value. Next: NAME=VALUE, as in --ranks to_q=4 or --rates to_q=1e-5")
        hits = set(matching(params, patterns_of(pattern.strip(), name, params))).intersection(learns)
        if not hits:
            raise UsageError(f"{part}: nothing that learns is named {pattern}. Next: leave it out, or add --targets")
        found |= dict.fromkeys(sorted(hits), kind(value))
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
