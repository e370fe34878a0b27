"""Convert weights between Black Forest Labs' (our) layout and diffusers'.

The names are a table of rows for each network (`names.py`); both directions read the same rows. Almost all is renaming.
Besides:

- diffusers keeps q, k, v (and a single block's MLP input) as Linears of their own: official rows are cut;
- its last modulation gives (scale, shift) where the official one gives (shift, scale): halves are swapped;
- its autoencoder's attention has Linears [C, C] where the official one has 1x1 convolutions [C, C, 1, 1];
- its decoder counts levels from the coarsest, the official one from the finest;
- its MLPs are always 4 times as wide as the block. A narrower MLP is padded with zeros, which add nothing
  since GELU(0) = 0, and cut off in the other direction.

A round trip gives the same bytes. Tensors are views of the input where no values have to move.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FileError
from ..params import FluxParams
from .names import Pair, Params, added_width, pairs_of

State = Mapping[str, Tensor]


def to_diffusers(state: State, params: Params) -> dict[str, Tensor]:
    """Official names -> diffusers'. FileError if names or sizes are not those of `params`."""
    pairs = pairs_of(params)
    _same_names(state, [pair.official for pair in pairs])
    out: dict[str, Tensor] = {}
    for pair in pairs:
        parts = _cut(state[pair.official], len(pair.diffusers), params)
        parts[-1] = _diffusers_values(parts[-1], pair.how, params)
        out.update(zip(pair.diffusers, parts, strict=True))
    return out


def from_diffusers(state: State, params: Params) -> dict[str, Tensor]:
    """diffusers' names -> official ones. FileError likewise."""
    pairs = pairs_of(params)
    _same_names(state, [name for pair in pairs for name in pair.diffusers])
    return dict(streamed_from_diffusers(state.__getitem__, pairs, params))


def streamed_from_diffusers(
    get: Callable[[str], Tensor], pairs: Iterable[Pair], params: Params
) -> Iterator[tuple[str, Tensor]]:
    """Official names and tensors, one after the other, from a function that returns a tensor by its diffusers name."""
    for pair in pairs:
        yield pair.official, _joined([get(name) for name in pair.diffusers], pair.how, params)


def _same_names(state: State, names: list[str]) -> None:
    missing, extra = [x for x in names if x not in state], sorted(set(state) - set(names))
    if missing or extra:
        raise FileError(
            f"these are not the tensors of this model: {len(missing)} missing {missing[:5]}, "
            f"{len(extra)} unexpected {extra[:5]}."
        )


def _cut(x: Tensor, count: int, params: Params) -> list[Tensor]:
    """The rows of `x` in `count` pieces: q, k, v of the hidden size, and whatever is left."""
    if count == 1:
        return [x]
    assert isinstance(params, FluxParams)
    return list(x.tensor_split([params.hidden_size * n for n in range(1, count)]))


def _joined(parts: list[Tensor], how: str, params: Params) -> Tensor:
    """The official tensor, concatenated from its parts. A function, so that the parts are freed at its end."""
    parts[-1] = _official_values(parts[-1], how, params)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _diffusers_values(x: Tensor, how: str, params: Params) -> Tensor:
    match how:
        case "swap halves":
            return swap_halves(x)
        case "square":
            return x[:, :, 0, 0] if x.ndim == 4 else x
        case "widen rows" if zeros := added_width(params):
            return torch.cat((x, x.new_zeros(zeros, *x.shape[1:])))
        case "widen columns" if (zeros := added_width(params)) and x.ndim == 2:
            return F.pad(x, (0, zeros))
    return x


def _official_values(x: Tensor, how: str, params: Params) -> Tensor:
    match how:
        case "swap halves":
            return swap_halves(x)
        case "square":
            return x[:, :, None, None] if x.ndim == 2 else x
        case "widen rows" if zeros := added_width(params):
            return _narrow(x, 0, zeros)
        case "widen columns" if (zeros := added_width(params)) and x.ndim == 2:
            return _narrow(x, 1, zeros)
    return x


def joins_rows(how: str, params: Params) -> bool:
    """Whether an official tensor is the rows of its parts, one below the other, and nothing else."""
    return not how or (how.startswith("widen") and not added_width(params))


def swap_halves(x: Tensor) -> Tensor:
    """The halves of its rows in the other order: diffusers has scale before shift in the last layer's modulation."""
    return torch.cat(x.chunk(2)[::-1])


def _narrow(x: Tensor, dim: int, zeros: int) -> Tensor:
    size = x.shape[dim] - zeros
    if x.narrow(dim, size, zeros).any():
        raise FileError("an MLP of this file is wider than this model's, and the rest of it is not zero.")
    return x.narrow(dim, 0, size).contiguous()
