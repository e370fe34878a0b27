"""Read the tensors of a LoRA: its alphas, and its factors, of which each must be finite."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checkpoint.tensors import opened
from ..errors import FileError, NonFiniteError
from .dialects import TEXT, Network
from .file import LoraFile

NUMBERS = ("alpha", "reshape_weight")
"""roles of tensors that are no factors"""


def alphas_of(file: LoraFile) -> dict[str, float]:
    """Each module's alpha, by its stem. FileError for one that is no number."""
    named = {module.stem: module.tensors["alpha"] for module in file.modules if "alpha" in module.tensors}
    whole = {module.stem for module in file.modules if module.algebra.endswith("lokr") and module.rank is None}
    found: dict[str, float] = {}
    with opened(file.source, "cpu", named.values()) as get:
        for stem, name in named.items():
            x = get(name)
            value = float(x.reshape(-1)[0]) if x.numel() == 1 else math.nan
            if not math.isfinite(value) and stem not in whole:
                raise FileError(f"{file.path}: {name} is {value}: an alpha is a number. Next: train or save it again.")
            found[stem] = value
    bad = next((module.stem for module in file.modules if module.scale is not None and math.isnan(module.scale)), None)
    if bad is not None:
        finding = f"the header's lora_alpha or rank of {bad} is no number, or its alpha_pattern no name"
        raise FileError(f"{file.path}: {finding}. Next: save it again.")
    return found


def read_factors(file: LoraFile, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """The tensors of these names on a device, fp8 as fp32. NonFiniteError names the first that is not finite."""
    order = sorted(names, key=file.source.spans.__getitem__)
    with opened(file.source, device, order) as get:
        found = {name: x.float() if x.dtype.itemsize == 1 else x for name in order for x in [get(name)]}
    if found:
        sound = torch.stack(torch._foreach_norm(list(found.values()), ord=math.inf, dtype=torch.float32)).isfinite()
        if not sound.all():
            raise NonFiniteError(_not_finite(file, order[int(sound.int().argmin())]))
    return found


def read_tokens(file: LoraFile) -> dict[Network, dict[str, Tensor]]:
    """The vectors of trained tokens [n, D], by encoder and word. NonFiniteError."""
    names = [name for of in file.named_tokens.values() for name in of.values()]
    read = read_factors(file, names, torch.device("cpu")) if names else {}
    found = {network: dict[str, Tensor]() for network in TEXT}
    for word, of in file.named_tokens.items():
        for network, name in of.items():
            found[network][word] = read[name].reshape(-1, read[name].shape[-1])
    return found


def read_all(file: LoraFile) -> dict[str, Tensor]:
    """All tensors of a file, as they are, by their names. FileError, NonFiniteError."""
    alphas_of(file)
    with opened(file.source, "cpu", file.source.shapes) as get:
        found = {name: get(name) for name in file.source.shapes}
    for name, x in found.items():
        if x.is_floating_point() and not name.endswith(".alpha") and not x.float().isfinite().all():
            raise NonFiniteError(_not_finite(file, name))
    return found


def _not_finite(file: LoraFile, name: str) -> str:
    return f"{file.path}: NaN or infinity in {name}. Next: train or fetch the LoRA again."


@contextmanager
def reading(file: LoraFile) -> Iterator[Callable[[str], Tensor]]:
    """A context with a function that reads a tensor by its name, and checks at the end that all were finite."""
    names = list(file.norms.values()) + [
        name for module in file.modules for role, name in module.tensors.items() if role not in NUMBERS
    ]
    largest: dict[str, Tensor] = {}
    with opened(file.source, "cpu", names) as get:

        def read(name: str) -> Tensor:
            x = get(name)
            x = x.float() if x.dtype.itemsize == 1 else x
            largest[name] = torch.linalg.vector_norm(x, ord=math.inf, dtype=torch.float32)
            return x

        yield read
    if largest and not (sound := torch.stack(list(largest.values())).isfinite()).all():
        name = list(largest)[int(sound.int().argmin())]
        raise NonFiniteError(_not_finite(file, name))
