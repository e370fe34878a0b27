"""What a forward keeps for its backward, and what is computed again instead (gradient checkpointing, Chen et al. 2016).

The less is kept, the less memory a step takes, and the more time: whole blocks cost a forward more, the activations of
the MLPs next to nothing. Frozen weights need no gradient, so a Linear without factors keeps nothing of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import put
from ..kernels.attention import attention_for
from ..model import Flux, ops
from ..model.transformer import Fetch


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
"""by name: nothing is computed again, activations inside MLPs, every second block, or all blocks"""
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is drawn


def _mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    return _again(ops.mlp, layers, x)


def _linear2(linear: nn.Linear, attn: Tensor, hidden: Tensor) -> Tensor:
    return _again(ops.linear2, linear, attn, hidden)


@contextmanager
def differentiable(model: Flux, way: str) -> Iterator[None]:
    """A context in which a model's blocks have functions with a backward, and keep for it what that way keeps."""
    before = [(part, part.ops) for part in model.modules() if isinstance(getattr(part, "ops", None), ops.Ops)]
    device = next(model.parameters()).device
    found = ops.PLAIN._replace(attend=attention_for(model, device))
    put(model, found._replace(mlp=_mlp, linear2=_linear2) if WAYS[way].mlp else found)
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
