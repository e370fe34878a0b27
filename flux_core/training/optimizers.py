"""Optimizers by name, what they remember as tensors by name, and the moving average of what learns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError

BETAS, EPS = (0.9, 0.999), 1e-8
"""of Adam, as in diffusers' script"""

Named = Mapping[str, nn.Parameter]
"""what learns, by name, as of `Adapter.named_parameters`"""


def adamw(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    """AdamW in one kernel where all is on a GPU."""
    fused = all(x.is_cuda for x in parameters)
    return torch.optim.AdamW(parameters, lr, BETAS, EPS, weight_decay, fused=fused)


def adamw8bit(parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> Optimizer:
    """AdamW with moments in 8 bits (Dettmers et al. 2022), but for tensors below 4096 numbers. UsageError."""
    found = bitsandbytes_optimizers().AdamW8bit(parameters, lr, BETAS, EPS, weight_decay)
    return cast(Optimizer, found)


def bitsandbytes_optimizers() -> Any:
    """The module. UsageError where it is not installed."""
    try:
        return import_module("bitsandbytes").optim
    except ModuleNotFoundError:
        raise UsageError("the optimizer adamw8bit needs bitsandbytes. Next: pip install bitsandbytes") from None


OPTIMIZERS: Mapping[str, Callable[[Sequence[nn.Parameter], float, float], Optimizer]] = MappingProxyType(
    {"adamw": adamw, "adamw8bit": adamw8bit}
)
"""by name: of parameters, rate and weight decay"""


# What an optimizer remembers ---------------------------------------------------------------------------


def state_of(optimizer: Optimizer, named: Named) -> dict[str, Tensor]:
    """What an optimizer remembers of parameters, by `NAME.KEY`: the tensors themselves, and its counts as int64."""
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64, device="cpu")
        for name, x in named.items()
        for key, value in optimizer.state[x].items()
    }


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


# The moving average ------------------------------------------------------------------------------------


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
        kept = {name: x.detach().clone() for name, x in self.named.items()}
        self._write(self.means)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, x in self.named.items():
            x.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """The averages by `ema.NAME`, the tensors themselves, and how many updates there were."""
        updates = torch.tensor(self.updates, dtype=torch.int64, device="cpu")
        return {f"ema.{name}": x for name, x in self.means.items()} | {"ema.updates": updates}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` gave; other tensors are passed over."""
        self.updates = int(tensors["ema.updates"])
        for name, x in self.means.items():
            x.copy_(tensors[f"ema.{name}"])
