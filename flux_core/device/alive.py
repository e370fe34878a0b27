"""How many bytes of tensors a computation holds at once, counted on the meta device, where none are really there."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model import AutoEncoder, Flux, strips
from ..model.shapes import without_weights
from ..params import AutoEncoderParams, FluxParams
from ..request.generation import PATCH
from .memory import Picture
from .on_meta import computed


def most_alive(compute: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """The most bytes that tensors made by `compute()` hold at once.

    known: weights, which come back as views of themselves. Attention keeps no table of all pairs, as the kernels on
    CUDA and the CPU.
    """
    with torch.no_grad(), torch.device("meta"), _Alive(known) as counted, _NoTable():
        compute()
    return counted.most


class _NoTable(TorchFunctionMode):
    """On the meta device torch would take attention apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return args[0].new_empty(args[0].shape)
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: a mode that is hidden from torch.compile imports it, which takes seconds."""
        return False

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = {x.untyped_storage()._cdata: 0 for x in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = computed(func, args, kwargs or {})
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.live:
                self.live[key] = x.untyped_storage().nbytes()
                self.now += self.live[key]
                self.most = max(self.most, self.now)
                finalize(x.untyped_storage(), self._gone, key)
        return found

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key)


def torch_dtype(precision: str) -> torch.dtype:
    """What everything but Linears in few bits computes in, on a card that has bfloat16."""
    return torch.float32 if precision == "float32" else torch.bfloat16


@cache
def transformer_at_work(params: FluxParams, text: int, picture: Picture, dtype: torch.dtype) -> int:
    """Bytes that a forward by plain functions holds beside weights, with so many text tokens."""
    rows, image = picture.rows, picture.tokens
    # a block of each kind: they come one after the other
    flux = without_weights(Flux, replace(params, depth=1, depth_single_blocks=1)).to(dtype)

    def forward() -> object:
        img, txt, y = (
            torch.empty(rows, *shape, dtype=dtype, device="meta")
            for shape in ((image, params.in_channels), (text, params.context_in_dim), (params.vec_in_dim,))
        )
        ids = (torch.empty(rows, count, 3, dtype=torch.float32, device="meta") for count in (image, text))
        img_ids, txt_ids = ids
        one = torch.empty(rows, dtype=dtype, device="meta")
        return flux(img, img_ids, txt, txt_ids, one, y, one)

    return most_alive(forward, flux.parameters())


@cache
def autoencoder_at_work(params: AutoEncoderParams, picture: Picture, dtype: torch.dtype) -> int:
    """Bytes that decoding holds beside weights, which encoding does not exceed."""
    ae = without_weights(AutoEncoder, params).to(dtype)
    decode = partial(strips.decode, ae) if picture.tiled else ae.decode
    shape = 1, params.z_channels, -(-picture.height // PATCH) * 2, -(-picture.width // PATCH) * 2
    return most_alive(lambda: decode(torch.empty(shape, dtype=dtype, device="meta")), ae.parameters())
