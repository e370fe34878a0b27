"""What a forward keeps for its backward, and what is computed again instead (gradient checkpointing, Chen et al. 2016).

The less is kept, the less memory a step takes, and the more time. Frozen weights need no gradient, so a Linear without
factors keeps nothing of its own. Beside a block's inputs two things are worth keeping (selective checkpointing, arXiv
2205.05198): what attention returns, which is small and dear, and q, k and v as the Linears gave them, three times as
much. Without the latter all Linears are computed again, with them those of the MLPs.

In a single block an MLP's hidden features come out of `linear1` together with q, k and v. Those rows are computed
alone, so that only the others are computed again, where `linear2` reads them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..kernels import put
from ..kernels.attention import attention_for
from ..linears.contract import is_untouched
from ..linears.frozen import Frozen
from ..model import Flux, ops
from ..model.ops import Heads
from ..model.transformer import Fetch
from .adapter import AdaptedLinear, Factors


class Way(NamedTuple):
    """What blocks keep whose insides are computed again."""

    block: Callable[[int], bool]
    """which do so, by a block's number among those of its kind; the others keep all"""
    attention: bool = False
    """what attention returns, besides the inputs"""
    heads: bool = False
    """and q, k and v before their norms"""

    @property
    def sizes(self) -> int:
        """Of all that is kept, in those of the inputs."""
        return 1 + self.attention + 3 * self.heads


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "none": Way(lambda i: False),
        "mlp": Way(lambda i: True, attention=True, heads=True),
        "second": Way(lambda i: i % 2 == 1),
        "linears": Way(lambda i: True, attention=True),
        "blocks": Way(lambda i: True),
    }
)
"""by name: nothing is computed again, MLPs, every second block, all but attention, or all blocks"""
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is drawn


@torch.library.custom_op("flux_core::kept", mutates_args=())
def _kept(x: Tensor) -> Tensor:
    """x, marked as what is kept. A copy, since an alias is gone once a compiler has seen it."""
    return x.clone()


_kept.register_fake(torch.empty_like)
_kept.register_autograd(lambda ctx, grad: grad)
_KEPT = [
    torch.ops.flux_core.kept.default,
    *(
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
        for name in ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
    ),
]


def _keeping() -> Any:
    return create_selective_checkpoint_contexts(_KEPT)


def _forward(block: nn.Module, *args: Any) -> Any:
    """A block's forward, of which inputs and `_KEPT` are kept. Inside of what is compiled, where a compiler sees it.

    Where attention runs by another kernel (on MPS), it is computed again, too.
    """
    return _again(partial(type(block).forward, block), *args, context_fn=_keeping)


def _norm_rope_join(txt: Heads, img: Heads, *others: Any) -> Heads:
    txt, img = (tuple(map(_kept, heads)) for heads in (txt, img))  # type: ignore[assignment]
    return ops.norm_rope_join(txt, img, *others)


class Later(NamedTuple):
    """The hidden features of a single block's MLP, before they are computed: rows of a Linear from `start` on."""

    linear: nn.Linear
    x: Tensor
    start: int


def _linear1(linear: nn.Linear, x: Tensor, split: list[int]) -> tuple[Tensor, Later]:
    return _kept(multiply_rows(linear, x, 0, split[0])), Later(linear, x, split[0])


def _linear2(linear: nn.Linear, attn: Tensor, hidden: Later) -> Tensor:
    first, x, start = hidden
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
    if WAYS[way].heads:
        found = found._replace(norm_rope_join=_norm_rope_join, linear1=_linear1, linear2=_linear2)
    put(model, found)
    inside = (*model.double_blocks, *model.single_blocks) if WAYS[way].attention else ()
    for block in inside:
        block.forward = MethodType(_forward, block)
    try:
        yield
    finally:
        for block in inside:
            del block.forward
        for part, own in before:
            part.ops = own  # type: ignore[assignment]


def fetch_for(way: str) -> Fetch:
    """How a forward iterates over blocks, some of which keep only their inputs."""

    def fetch(blocks: Iterable[Any]) -> Iterator[Any]:
        for i, block in enumerate(blocks):
            yield partial(_again, block) if WAYS[way].block(i) and not WAYS[way].attention else block

    return fetch
