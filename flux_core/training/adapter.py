"""Factors that learn, beside the frozen Linears of a transformer: y = W x + s B A x.

    LoRA    s = alpha / rank (Hu et al. 2021)
    rsLoRA  s = alpha / sqrt(rank), which does not fade with the rank (Kalajdzievski 2023, arXiv 2312.03732)
    DoRA    y = m V / |V| x with V = W + s B A: rows have a magnitude m and a direction (Liu et al. 2024, arXiv
            2402.09353); |V| is that of each row, and has no gradient, as in PEFT

Modules have diffusers' names, since files are saved by them: q, k and v are rows of one official Linear. They are
matched as PEFT does: a pattern is a whole name or its end behind a dot, so `to_q` hits single blocks, too.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.keymaps import swap_halves
from ..checkpoint.write import write_safetensors
from ..errors import UsageError, nearest
from ..files import disk_errors, expand_home
from ..hooks.layers import layers_of
from ..linears.frozen import Frozen
from ..lora.dialects import Table, Target, flat
from ..lora.file import ADAPTER_METADATA, FILE_NAMES
from ..model import Flux
from ..params import FluxParams
from .optimizers import Ema

PREFIX = "transformer."
"""before every key of a file"""
ENDINGS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""of a file's keys, by the parameter's name in `Factors`"""
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


class Factors(nn.Module):
    """LoRA's factors of one module, in fp32: rows `start` to `stop` of a Linear change by scale * up @ down."""

    def __init__(self, target: Target, columns: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        self.target, self.scale = target, scale
        rows = target.stop - target.start
        self.down = nn.Parameter(torch.empty(rank, columns, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=device))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Uniform numbers below sqrt(1 / columns) in `down`, as PEFT draws them, and zeros in `up`."""
        bound = 1 / math.sqrt(self.down.shape[1])
        drawn = torch.empty(self.down.shape, dtype=torch.float32, device="cpu").uniform_(
            -bound, bound, generator=generator
        )
        with torch.no_grad():
            self.down.copy_(drawn)
            self.up.zero_()

    def rows_of(self, x: Tensor) -> Tensor:
        """What of a layer's weight or bias is of these rows."""
        return x[self.target.start : self.target.stop]

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """These rows' outputs, of the layer's inputs and of its own outputs y. [..., K], [..., N] -> [..., N]"""
        return y + self.product(x, self.up).to(y.dtype)

    def product(self, x: Tensor, up: Tensor) -> Tensor:
        """scale * up @ down @ x, in the dtype of x."""
        return self.scale * F.linear(F.linear(x, self.down.to(x.dtype)), up.to(x.dtype))

    @torch.no_grad()
    def change(self, own: Tensor) -> Tensor:
        """The difference to these rows of the layer's weight, which are `own`, dense. [N, K] -> [N, K]"""
        return self.scale * self.up @ self.down


class DoraFactors(Factors):
    """DoRA's factors: those of LoRA, and a magnitude for each row. Before the first step the layer is as it was."""

    def __init__(
        self, target: Target, columns: int, rank: int, scale: float, device: torch.device, weight: Tensor
    ) -> None:
        super().__init__(target, columns, rank, scale, device)
        self.squares: Tensor
        """of the weight's rows, summed"""
        self.register_buffer("squares", self.rows_of(weight).square().sum(1), persistent=False)
        self.magnitude = nn.Parameter(_root(self.squares))

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """`Factors.forward`. A bias is no part of the direction."""
        gain = self.magnitude / self.norms(base, x.dtype)
        bias = cast(Tensor | None, base.bias)
        own = y if bias is None else y - self.rows_of(bias).to(y.dtype)
        return y + (gain - 1).to(y.dtype) * own + self.product(x, gain[:, None] * self.up).to(y.dtype)

    @torch.no_grad()
    def norms(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        """|V| by rows, fp32 [N], without V: |W|^2 + 2 B (s A W^T) + B (s^2 A A^T) B^T."""
        weight = self.rows_of(weight_of(base, dtype))
        mixed = F.linear(self.down.to(dtype), weight).t().float()
        inner = 2 * self.scale * mixed + self.scale**2 * self.up @ (self.down @ self.down.t())
        return _root(self.squares + (self.up * inner).sum(1))

    @torch.no_grad()
    def change(self, own: Tensor) -> Tensor:
        """`Factors.change`"""
        trained = own + super().change(own)
        return trained * (self.magnitude / _root(trained.square().sum(1)))[:, None] - own


def _root(x: Tensor) -> Tensor:
    """sqrt(x), above 0 where rounding leaves nothing."""
    return x.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A layer's weight [N, K] in that dtype, whatever format it is in. UsageError for a layer that cannot say."""
    if isinstance(layer, Frozen):
        return layer.widen(dtype)
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().to(dtype)
    raise UsageError(
        f"{type(layer).__name__} does not tell its weight, which DoRA and the table of changes need. Next: take off "
        "what is attached to the model, or train without them"
    )


class AdaptedLinear(nn.Module):
    """A layer, and factors for some of its rows, in their order and apart."""

    def __init__(self, base: nn.Module, factors: Iterable[Factors]) -> None:
        super().__init__()
        self.base: Any = base
        in_order: list[Factors] = sorted(factors, key=lambda one: one.target.start)
        self.factors = nn.ModuleList(in_order)
        self.is_on = True
        self.in_features, self.out_features = self.base.in_features, self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        y, pieces, done = self.base(x), [], 0
        if not self.is_on:
            return y
        for one in cast(Iterable[Factors], self.factors):
            start, stop = one.target.start, one.target.stop
            pieces += [y[..., done:start], one(x, y[..., start:stop], self.base)]
            done = stop
        pieces = [piece for piece in (*pieces, y[..., done:]) if piece.shape[-1]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


class Adapter:
    """The factors beside a model's Linears, by diffusers' names of modules. The model's own weights are frozen."""

    def __init__(self, model: Flux, factors: Mapping[str, Factors], alpha: float, rslora: bool = False) -> None:
        self.model, self.factors, self.alpha, self.rslora = model, dict(factors), alpha, rslora
        model.changes = model.changes.next(scales=False)
        self.average: Ema | None = None
        """of what learns, if one is kept: what is sampled and saved"""

    def parameters(self) -> list[nn.Parameter]:
        """All that learns, in the order of names."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All that learns, by the module's name and `down`, `up` or `magnitude`, in the order of modules' names."""
        return {
            f"{name}.{role}": x for name in sorted(self.factors) for role, x in self.factors[name].named_parameters()
        }

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the factors are their average, if one is kept."""
        return nullcontext() if self.average is None else self.average.averaged()

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context in which the model is as it was before it learned."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, AdaptedLinear)]
        for layer in layers:
            layer.is_on = False
        try:
            yield
        finally:
            for layer in layers:
                layer.is_on = True

    def config(self) -> dict[str, Any]:
        """What is not in the tensors, under the names of PEFT's LoraConfig."""
        some = next(iter(self.factors.values()))
        return {
            "lora_alpha": self.alpha,
            "peft_type": "LORA",
            "r": len(some.down),
            "target_modules": sorted(self.factors),
            "use_dora": isinstance(some, DoraFactors),
            "use_rslora": self.rslora,
        }

    def state(self) -> dict[str, Tensor]:
        """The tensors of a file in PEFT's keys, fp32, such as `transformer.NAME.lora_A.weight` (`ENDINGS`)."""
        return self._in_file(lambda x: x.detach())

    def grads(self) -> dict[str, Tensor]:
        """The gradients, by the same keys."""
        return self._in_file(lambda x: cast(Tensor, x.grad))

    def _in_file(self, take: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{name}.{ENDINGS[role]}": _to_diffusers(take(x), role, one.target)
            for name, one in self.factors.items()
            for role, x in one.named_parameters()
        }

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write `pytorch_lora_weights.safetensors` as diffusers does, with PEFT's header. Returns its path. DiskError.

        The same numbers are the same bytes: there is no date, host or path in it.
        """
        header = json.dumps({f"{PREFIX}{key}": value for key, value in self.config().items()}, sort_keys=True)
        path = folder / f"{FILE_NAMES[0]}.safetensors"
        with disk_errors(folder, "folder"):
            folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.to("cpu", dtype) for name, x in self.state().items()}
        write_safetensors(path, tensors, {ADAPTER_METADATA: header})
        return path

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the numbers of a file's tensors, of the same modules and ranks."""
        for name, one in self.factors.items():
            for role, x in one.named_parameters():
                found = state[f"{PREFIX}{name}.{ENDINGS[role]}"]
                found = swap_halves(found) if one.target.swapped and role != "down" else found
                x.copy_(found[tuple(map(slice, x.shape))])  # what only diffusers' wider MLP has meets zeros there

    def changes(self) -> list[tuple[str, float]]:
        """How much each module's weight changed, as |difference| / |weight| (Frobenius), the most first. UsageError."""
        found = []
        for name, one in self.factors.items():
            layer = cast(AdaptedLinear, self.model.get_submodule(one.target.module))
            own = one.rows_of(weight_of(layer.base, torch.float32))
            found.append((name, float(one.change(own).norm() / _root(own.square().sum()))))
        return sorted(found, key=lambda item: (-item[1], item[0]))

    def remove(self) -> None:
        """The model has its own layers again."""
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, AdaptedLinear):
                self.model.set_submodule(name, layer.base)
        self.model.changes = self.model.changes.next(scales=False)


def _to_diffusers(x: Tensor, role: str, target: Target) -> Tensor:
    """A parameter, or its gradient, by diffusers' order of rows, with zeros for what only its wider MLP has."""
    if role == "down":
        return F.pad(x, (0, target.spare_columns))
    x = swap_halves(x) if target.swapped else x
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, target.spare_rows))


def adapt(
    model: Flux,
    patterns: Iterable[str],
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
    rslora: bool = False,
    dora: bool = False,
) -> Adapter:
    """Factors of that rank beside every module that a pattern matches, on its device; the model is frozen. UsageError.

    patterns: as PEFT's `target_modules`, with `*` for any characters. generator: on the CPU, for the first numbers.
    """
    table, scale = Table(model.params), alpha / (math.sqrt(rank) if rslora else rank)
    model.requires_grad_(False)
    of: dict[str, dict[str, Factors]] = {}
    for name in matching(model.params, patterns):
        target = table.linears[flat(name)]
        layer: Any = model.get_submodule(target.module)
        device = next(x.device for x in (*layer.parameters(), *layer.buffers()))
        sizes = target, layer.in_features, rank, scale, device
        if dora and target.spare_rows:
            raise UsageError(
                f"{name} has more rows in diffusers than in this model, all zeros, and DoRA divides by their norms. "
                "Next: leave DoRA out, or name other targets"
            )
        one = DoraFactors(*sizes, weight_of(layer, torch.float32)) if dora else Factors(*sizes)
        one.reset(generator)
        of.setdefault(target.module, {})[name] = one
    for module, factors in of.items():
        model.set_submodule(module, AdaptedLinear(model.get_submodule(module), factors.values()))
    return Adapter(model, {name: one for factors in of.values() for name, one in factors.items()}, alpha, rslora)


def patterns_of(text: str, name: str, params: FluxParams) -> list[str]:
    """The patterns that a text means, with commas between its parts. UsageError, FileError.

    A part is a pattern, a preset's name, `vital` for the vital blocks that are known of the model of that name, or
    `vital:FILE` for those in the `vital.json` that `importance` wrote: all Linears of those blocks.
    """
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
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


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
