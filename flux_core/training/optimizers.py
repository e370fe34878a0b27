"""Optimizers by name, what they remember as tensors by name, and the moving average of what learns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError

BETAS, EPS = (0.9, 0.999), 1e-8
"""of Adam, as in diffusers' script"""

Named = Mapping[str, nn.Parameter]
"""what learns, by name, as of `Adapter.named_parameters`"""
Groups = Sequence[nn.Parameter] | Sequence[dict[str, Any]]
"""parameters, or groups of them: `params`, and `factor`, that of the rate"""
COUNTED = ("k", "d", "d_max", "d_numerator", "weight_sum", "lr_max")
"""what Prodigy and schedule-free optimizers count for a whole group"""


def adamw(groups: Groups, lr: float, weight_decay: float) -> Optimizer:
    """AdamW in one kernel where all is on a GPU."""
    fused = all(x.is_cuda for x in parameters_of(groups))
    return torch.optim.AdamW(groups, lr, BETAS, EPS, weight_decay, fused=fused)


def adamw8bit(groups: Groups, lr: float, weight_decay: float) -> Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2022), but for tensors below 4096 numbers. UsageError."""
    return cast(Optimizer, library("adamw8bit").optim.AdamW8bit(groups, lr, BETAS, EPS, weight_decay))


def prodigy(groups: Groups, lr: float, weight_decay: float) -> Optimizer:
    """AdamW that finds its rate, of which `lr` is a factor (Mishchenko and Defazio 2023, arXiv 2306.06101). UsageError.

    Its options are those of diffusers' script.
    """
    if any(isinstance(one, dict) for one in groups):
        raise UsageError(
            "prodigy finds one rate for all. Next: leave lora_plus and rates out, or take another optimizer"
        )
    with redirect_stdout(None):  # where it tells of its weight decay
        found = library("prodigy").Prodigy(
            groups, lr, BETAS, eps=EPS, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True
        )
    return cast(Optimizer, found)


def adamw_schedulefree(groups: Groups, lr: float, weight_decay: float) -> Optimizer:
    """AdamW with a mean of its own instead of a schedule (Defazio et al. 2024, arXiv 2405.15682). UsageError.

    Gradients are taken at one point and pictures drawn at another: see `ScheduleFreeMean`.
    """
    found = library("adamw_schedulefree").AdamWScheduleFree(groups, lr, BETAS, EPS, weight_decay)
    found.train()
    return cast(Optimizer, found)


OPTIMIZERS: Mapping[str, Callable[[Groups, float, float], Optimizer]] = MappingProxyType(
    {"adamw": adamw, "adamw8bit": adamw8bit, "prodigy": prodigy, "adamw_schedulefree": adamw_schedulefree}
)
"""by name: of parameters or groups of them, rate and weight decay"""
LIBRARIES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "adamw_schedulefree": "schedulefree"}
"""of the optimizers that are not torch's"""


def library(optimizer: str) -> Any:
    """The module that an optimizer is from, torch's own if none. UsageError where it is not installed."""
    name = LIBRARIES.get(optimizer, "torch")
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise UsageError(f"the optimizer {optimizer} needs {name}. Next: pip install {name}") from None


def parameters_of(groups: Groups) -> list[nn.Parameter]:
    """All parameters."""
    return [x for one in groups for x in (one["params"] if isinstance(one, dict) else [one])]


def grouped(named: Named, factors: Mapping[str, float]) -> Groups:
    """Parameters in groups of one factor of the rate each; without any, the parameters themselves.

    factors: by name, of those that have another than 1.
    """
    if not factors:
        return list(named.values())
    of: dict[float, list[nn.Parameter]] = {}
    for name, x in named.items():
        of.setdefault(factors.get(name, 1.0), []).append(x)
    return [{"params": every, "factor": factor} for factor, every in of.items()]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group its rate: its factor of this one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


# What an optimizer remembers ---------------------------------------------------------------------------


def state_of(optimizer: Optimizer, named: Named) -> dict[str, Tensor]:
    """What an optimizer remembers of parameters, by `NAME.KEY`: the tensors themselves, and its counts as int64; and of
    groups, by `group.NUMBER.KEY`: counts, and numbers as fp64."""
    found = {f"{name}.{key}": x for name, p in named.items() for key, x in optimizer.state[p].items()}
    for number, group in enumerate(optimizer.param_groups):
        found |= {f"group.{number}.{key}": group[key] for key in COUNTED if key in group}
    return {key: x if isinstance(x, Tensor) else _number(x) for key, x in found.items()}


def _number(x: float) -> Tensor:
    kind = torch.int64 if isinstance(x, int) else torch.float64
    return torch.tensor(x, dtype=kind, device="cpu")


def restore(optimizer: Optimizer, named: Named, tensors: Mapping[str, Tensor]) -> None:
    """Let an optimizer remember what `state_of` gave; other tensors are passed over. It goes on to the bit."""
    of: dict[str, dict[str, Tensor | int]] = {name: {} for name in named}
    for whole, value in tensors.items():
        name, _, key = whole.rpartition(".")
        if name in of:
            of[name][key] = int(value) if value.dtype == torch.int64 else value.clone()
    numbers = {x: number for number, x in enumerate(x for group in optimizer.param_groups for x in group["params"])}
    state = {numbers[x]: of[name] for name, x in named.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})  # which knows what is on which device
    for number, group in enumerate(optimizer.param_groups):
        group |= {key: tensors[f"group.{number}.{key}"].item() for key in COUNTED if key in group}


# Averages, which are sampled and saved -----------------------------------------------------------------


class Average(Protocol):
    """Other values of what learns than those at which gradients are taken."""

    def update(self) -> None:
        """Take in the parameters as they are now, behind a step."""

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the parameters have these values."""

    def state(self) -> dict[str, Tensor]:
        """What it knows that the optimizer does not, by name."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` gave; other tensors are passed over."""


@contextmanager
def kept(named: Named) -> Iterator[None]:
    """A context behind which the parameters have the values that they had before, to the bit."""
    before = {name: x.detach().clone() for name, x in named.items()}
    try:
        yield
    finally:
        _write(named, before)


@torch.no_grad()
def _write(named: Named, values: Mapping[str, Tensor]) -> None:
    for name, x in named.items():
        x.copy_(values[name])


class ScheduleFreeMean:
    """The mean x that a schedule-free optimizer has beside y, where gradients are taken: a part of its own state."""

    def __init__(self, named: Named, optimizer: Any) -> None:
        self.named, self.optimizer = dict(named), optimizer

    def update(self) -> None:
        """Nothing: the optimizer did."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters are x; behind it they are y to the bit, not as x gives it."""
        with kept(self.named):
            self.optimizer.eval()
            try:
                yield
            finally:
                for group in self.optimizer.param_groups:
                    group["train_mode"] = True

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""


class Ema:
    """The exponential moving average of what learns: m = d m + (1 - d) x, with d = min(decay, (1 + n) / (10 + n)).

    n: the updates before, so that the first numbers, which mean nothing, are soon forgotten.
    """

    def __init__(self, named: Named, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"the decay of an average must be at least 0 and less than 1, not {decay}")
        self.named, self.decay, self.updates = dict(named), decay, 0
        self.means = {name: x.detach().clone() for name, x in named.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.means.values()), [x.detach() for x in self.named.values()], 1 - decay)
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters have the averages as their values."""
        with kept(self.named):
            _write(self.named, self.means)
            yield

    def state(self) -> dict[str, Tensor]:
        """The averages by `ema.NAME`, the tensors themselves, and how many updates there were."""
        updates = torch.tensor(self.updates, dtype=torch.int64, device="cpu")
        return {f"ema.{name}": x for name, x in self.means.items()} | {"ema.updates": updates}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` gave; other tensors are passed over."""
        self.updates = int(tensors["ema.updates"])
        for name, x in self.means.items():
            x.copy_(tensors[f"ema.{name}"])


def average_of(optimizer: Optimizer, named: Named, decay: float) -> Average | None:
    """What is sampled and saved instead of the parameters, if anything. decay: of an `Ema`; 0: none."""
    if hasattr(optimizer, "eval"):
        return ScheduleFreeMean(named, optimizer)
    return Ema(named, decay) if decay else None
