"""LoRA factors that learn, beside the frozen Linears of a transformer: y = W x + alpha / rank * B A x (Hu et al. 2021).

Modules have diffusers' names, since files are saved by them: q, k and v are rows of one official Linear. They are
matched as PEFT does: a pattern is a whole name or its end behind a dot, so `to_q` hits single blocks, too.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
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
from ..files import disk_errors
from ..lora.dialects import Table, Target, flat
from ..lora.file import ADAPTER_METADATA, FILE_NAMES
from ..model import Flux
from ..params import FluxParams

PREFIX = "transformer."
"""before every key of a file"""
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
    """The factors of one module, in fp32: rows `start` to `stop` of a Linear change by scale * up @ down."""

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

    def forward(self, x: Tensor) -> Tensor:
        """What is added to these rows' outputs, in the dtype of x. [..., K] -> [..., N]"""
        return self.scale * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class AdaptedLinear(nn.Module):
    """A layer, and factors for some of its rows, in their order and apart."""

    def __init__(self, base: nn.Module, factors: Iterable[Factors]) -> None:
        super().__init__()
        self.base: Any = base
        in_order: list[Factors] = sorted(factors, key=lambda one: one.target.start)
        self.factors = nn.ModuleList(in_order)
        self.in_features, self.out_features = self.base.in_features, self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        y, pieces, done = self.base(x), [], 0
        for one in cast(Iterable[Factors], self.factors):
            start, stop = one.target.start, one.target.stop
            pieces += [y[..., done:start], y[..., start:stop] + one(x).to(y.dtype)]
            done = stop
        return torch.cat([*pieces, y[..., done:]], dim=-1) if len(pieces) > 2 or done < y.shape[-1] else pieces[1]


class Adapter:
    """The factors beside a model's Linears, by diffusers' names of modules. The model's own weights are frozen."""

    def __init__(self, model: Flux, factors: Mapping[str, Factors], alpha: float) -> None:
        self.model, self.factors, self.alpha = model, dict(factors), alpha

    def parameters(self) -> list[nn.Parameter]:
        """All that learns, in the order of names."""
        return [x for name in sorted(self.factors) for x in (self.factors[name].down, self.factors[name].up)]

    def state(self) -> dict[str, Tensor]:
        """The tensors of a file in PEFT's keys, fp32: `transformer.NAME.lora_A.weight` and `lora_B.weight`."""
        return self._in_file(lambda x: x.detach())

    def grads(self) -> dict[str, Tensor]:
        """The gradients, by the same keys."""
        return self._in_file(lambda x: cast(Tensor, x.grad))

    def _in_file(self, take: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, one in self.factors.items():
            down, up = take(one.down), take(one.up)
            up = swap_halves(up) if one.target.swapped else up
            found |= {f"{PREFIX}{name}.lora_A.weight": down, f"{PREFIX}{name}.lora_B.weight": up}
        return found

    def save(self, folder: Path) -> Path:
        """Write `pytorch_lora_weights.safetensors` as diffusers does, with PEFT's header. Returns its path. DiskError.

        The same numbers are the same bytes: there is no date, host or path in it.
        """
        rank = len(next(iter(self.factors.values())).down)
        config = {"lora_alpha": self.alpha, "peft_type": "LORA", "r": rank, "target_modules": sorted(self.factors)}
        header = json.dumps({f"{PREFIX}{key}": value for key, value in config.items()}, sort_keys=True)
        path = folder / f"{FILE_NAMES[0]}.safetensors"
        with disk_errors(folder, "folder"):
            folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, {name: x.cpu() for name, x in self.state().items()}, {ADAPTER_METADATA: header})
        return path

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the numbers of a file's tensors, of the same modules and ranks."""
        for name, one in self.factors.items():
            up = state[f"{PREFIX}{name}.lora_B.weight"]
            one.down.copy_(state[f"{PREFIX}{name}.lora_A.weight"])
            one.up.copy_(swap_halves(up) if one.target.swapped else up)

    def remove(self) -> None:
        """The model has its own layers again."""
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, AdaptedLinear):
                self.model.set_submodule(name, layer.base)


def adapt(
    model: Flux, patterns: Iterable[str], rank: int, alpha: float, generator: torch.Generator | None = None
) -> Adapter:
    """Factors of that rank beside every module that a pattern matches, on its device; the model is frozen. UsageError.

    patterns: as PEFT's `target_modules`, with `*` for any characters. generator: on the CPU, for the first numbers.
    """
    table = Table(model.params)
    model.requires_grad_(False)
    of: dict[str, dict[str, Factors]] = {}
    for name in matching(model.params, patterns):
        target = table.linears[flat(name)]
        layer: Any = model.get_submodule(target.module)
        device = next(x.device for x in (*layer.parameters(), *layer.buffers()))
        one = Factors(target, layer.in_features, rank, alpha / rank, device)
        one.reset(generator)
        of.setdefault(target.module, {})[name] = one
    for module, factors in of.items():
        model.set_submodule(module, AdaptedLinear(model.get_submodule(module), factors.values()))
    return Adapter(model, {name: one for factors in of.values() for name, one in factors.items()}, alpha)


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
            raise UsageError(f"no Linear of the transformer is named {pattern!r}.{nearest(pattern, [*ends, *names])}")
        found |= hits
    return [name for name in names if name in found]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
