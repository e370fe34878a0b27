"""What a forward keeps for its backward, and what is computed again instead (gradient checkpointing, Chen et al. 2016).

The less is kept, the less memory a step takes, and the more time: whole blocks cost a forward more, MLPs a third of
one. Frozen weights need no gradient, so a Linear without factors keeps nothing of its own.

Of an MLP neither its hidden features nor their activation are kept. In a single block they come out of `linear1`
together with q, k and v: those rows are computed alone, and `linear2` computes the others where it reads them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import put
from ..kernels.attention import attention_for
from ..linears.contract import is_untouched
from ..linears.frozen import Frozen
from ..model import Flux, ops
from ..model.transformer import Fetch
from .adapter import AdaptedLinear, Factors


class Way(NamedTuple):
    """Which parts keep only their inputs."""

    block: Callable[[int], bool]
    """by a block's number among those of its kind"""
    mlp: bool = False


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "none": Way(lambda i: False),
        "mlp": Way(lambda i: False, mlp=True),
        "second": Way(lambda i: i % 2 == 1),
        "blocks": Way(lambda i: True),
    }
)
"""by name: nothing is computed again, the insides of MLPs, every second block, or all blocks"""
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is drawn


def _mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    return _again(ops.mlp, layers, x)


class Later(NamedTuple):
    """The hidden features of a single block's MLP, before they are computed: rows of a Linear from `start` on."""

    linear: nn.Linear
    x: Tensor
    start: int


def _linear1(linear: nn.Linear, x: Tensor, split: list[int]) -> tuple[Tensor, Later]:
    return multiply_rows(linear, x, 0, split[0]), Later(linear, x, split[0])


def _linear2(linear: nn.Linear, attn: Tensor, hidden: Later) -> Tensor:
    return _again(_linear2_of, linear, attn, *hidden)


def _linear2_of(linear: nn.Linear, attn: Tensor, first: nn.Linear, x: Tensor, start: int) -> Tensor:
    return ops.linear2(linear, attn, multiply_rows(first, x, start, first.out_features))


def multiply_rows(layer: Any, x: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a layer's forward: by its weight's if that can be, else of the whole.

    Factors lie inside of them, or outside. [..., K] -> [..., stop - start]
    """
    rows = slice(start, stop)
    if isinstance(layer, AdaptedLinear) and is_untouched(layer, AdaptedLinear):
        return _adapted_rows(layer, x, start, stop)
    if is_untouched(layer, nn.Linear):
        return F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
    if isinstance(layer, Frozen) and is_untouched(layer, type(layer)):
        return layer.multiply_rows(x, rows)
    return layer(x)[..., rows].clone()  # so that the rest of it is not kept


def _adapted_rows(layer: AdaptedLinear, x: Tensor, start: int, stop: int) -> Tensor:
    y, pieces, done = multiply_rows(layer.base, x, start, stop), [], 0
    for one in cast(Iterable[Factors], layer.factors):
        if start <= one.target.start and one.target.stop <= stop:
            first, last = one.target.start - start, one.target.stop - start
            pieces += [y[..., done:first], one(x, y[..., first:last], layer.base)]
            done = last
    pieces = [piece for piece in (*pieces, y[..., done:]) if piece.shape[-1]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


@contextmanager
def differentiable(model: Flux, way: str) -> Iterator[None]:
    """A context in which a model's blocks have functions with a backward, and keep for it what that way keeps."""
    before = [(part, part.ops) for part in model.modules() if isinstance(getattr(part, "ops", None), ops.Ops)]
    device = next(model.parameters()).device
    found = ops.PLAIN._replace(attend=attention_for(model, device))
    put(model, found._replace(mlp=_mlp, linear1=_linear1, linear2=_linear2) if WAYS[way].mlp else found)
    try:
        yield
    finally:
        for part, own in before:
            part.ops = own  # type: ignore[assignment]


def fetch_for(way: str) -> Fetch:
    """How a forward iterates over blocks, some of which keep only their inputs."""

    def fetch(blocks: Iterable[Any]) -> Iterator[Any]:
        for i, block in enumerate(blocks):
            yield partial(_again, block) if WAYS[way].block(i) else block

    return fetch
