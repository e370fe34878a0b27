"""Merge LoRAs into weights: what becomes of each tensor that they change, for whoever writes the model.

A weight is asked for in fp32 and given back in fp32, so that it is rounded once, when it is written. Each file's
difference is to the weight as it was, as with LoRAs that are attached.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from ..errors import UsageError
from .delta import Delta
from .dialects import Network
from .file import BIASES, LoraFile, Module
from .tensors import NUMBERS, alphas_of, reading

Change = Callable[[Tensor], Tensor]
"""of a tensor in fp32 to its successor in fp32"""
_Add = Callable[[Tensor, Tensor], Tensor]
"""of the tensor as it was, and as the files before have made it"""


@contextmanager
def merging(files: Sequence[LoraFile], scales: Sequence[float]) -> Iterator[Mapping[Network, Mapping[str, Change]]]:
    """A context with a change for each tensor that the files train, by network and name; each file at its scale.

    Text encoders' modules have the encoders' names (`file.resolve_text`). NonFiniteError at the end, for factors that
    are not finite; UsageError for a T-LoRA.
    """
    if ranked := next((file.name for file in files if file.schedule is not None), None):
        raise UsageError(
            f"{ranked} is a T-LoRA, whose rank hangs on the noise level, which a weight does not know. Next: draw with "
            "--lora"
        )
    steps: dict[Network, dict[str, list[_Add]]] = {}
    with ExitStack() as stack:
        for file, scale in zip(files, scales, strict=True):
            get = stack.enter_context(reading(file))
            alphas = alphas_of(file)
            for module in file.modules:
                found = steps.setdefault(module.network, {})
                for name, step in _steps(module, get, alphas.get(module.stem), scale):
                    found.setdefault(name, []).append(step)
            for name, given in file.norms.items():
                steps.setdefault("transformer", {}).setdefault(name, []).append(partial(_set, get, given))
        yield {
            network: {name: partial(_changed, tuple(all_steps)) for name, all_steps in found.items()}
            for network, found in steps.items()
        }


def _changed(steps: Sequence[_Add], before: Tensor) -> Tensor:
    now = before.clone()
    for step in steps:
        now = step(before, now)
    return now


def _set(get: Callable[[str], Tensor], name: str, before: Tensor, now: Tensor) -> Tensor:
    return get(name).to(now)


def _steps(
    module: Module, get: Callable[[str], Tensor], alpha: float | None, scale: float
) -> Iterator[tuple[str, _Add]]:
    """The tensors that a module changes, and how."""
    target, algebra = module.target, module.algebra

    def delta(before: Tensor) -> Delta:
        tensors = {role: get(name) for role, name in module.tensors.items() if role not in NUMBERS}
        rows = before[target.start : target.stop]
        return Delta(module, tensors, alpha, len(rows), rows.shape[-1], lambda: rows)

    def weight(before: Tensor, now: Tensor) -> Tensor:
        now[target.start : target.stop] += scale * delta(before).dense()
        return now

    def bias(before: Tensor, now: Tensor) -> Tensor:
        for shift in delta(before).shifts():
            now[target.start : target.stop] += scale * shift
        return now

    def norm(before: Tensor, now: Tensor) -> Tensor:
        return now + scale * get(module.tensors["diff"]).to(now)

    if target.module.endswith(".scale"):
        yield target.module, norm
        return
    if algebra != "bias":
        yield f"{target.module}.weight", weight
    if not module.tensors.keys().isdisjoint(BIASES):
        yield f"{target.module}.bias", bias
