"""Attention by the fastest of PyTorch's kernels, found by trying them where the model is.

`F.scaled_dot_product_attention` decides by the card's generation and the library's version which of its kernels it
takes. Here each runs a few times on numbers of FLUX's shape when a model is loaded, some tens of milliseconds in all,
and the function that a block calls is the fastest one. Another than PyTorch's own choice only where it wins clearly,
so that the same machine chooses the same next time: the last bits of a picture hang on it.
"""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from ..model import Flux
from ..model.ops import attend

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SWITCH_BELOW = 0.9
"""of the time of PyTorch's own choice, below which another kernel takes its place"""
TOKENS = 4608
"""of a megapixel and its prompt: where attention counts most"""
CALLS = 3


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needs_grad(q, k, v)))


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v))


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, needs_grad(q, k, v)))


def joined(found: tuple[Tensor, ...]) -> Tensor:
    """Of what such a kernel returns: heads side by side."""
    return rearrange(found[0], "B H L D -> B L (H D)")


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward follows, which wants the sums of the softmax."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


BACKENDS: dict[str, Attend] = {"own": attend, "cudnn": cudnn, "flash": flash, "efficient": efficient}
"""`ops.attend`, [B, H, L, D] each -> [B, L, H*D], by PyTorch's own choice and by each of its kernels"""


def attention_for(model: Flux, device: torch.device) -> Attend:
    """The way to attend for a model there. For half precision on CUDA it is tried out; else it is PyTorch's choice."""
    weight, params = model.img_in.weight, model.params
    if device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16):
        return attend
    try:
        return fastest(device, weight.dtype, params.num_heads, params.head_dim)
    except torch.OutOfMemoryError:  # 0.2 GB are not free; whoever draws there will hear of it
        return attend


@cache
def fastest(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Attend:
    """The same by sizes; tried once in a process."""
    draw = torch.Generator(device).manual_seed(0)  # its own: nobody's seed shall depend on this
    q, k, v = (
        torch.randn(1, TOKENS, heads, head_dim, device=device, dtype=dtype, generator=draw).transpose(1, 2)
        for _ in range(3)
    )  # tokens outside heads in memory, as `norm_rope` leaves them
    with torch.cuda.device(device):
        ms = {name: milliseconds(way, q, k, v) for name, way in BACKENDS.items()}
    return BACKENDS[choice({name: time for name, time in ms.items() if time is not None})]


def milliseconds(way: Attend, q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """Of the fastest of a few calls; None where the kernel does not take such numbers."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    try:
        way(q, k, v)
        marks[0].record()
        for mark in marks[1:]:
            way(q, k, v)
            mark.record()
        marks[-1].synchronize()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return min(before.elapsed_time(after) for before, after in pairwise(marks))


def choice(ms: Mapping[str, float]) -> str:
    """The name of the way to take, from the milliseconds of each, `own` among them."""
    name = min(ms, key=ms.__getitem__)
    return name if ms[name] < SWITCH_BELOW * ms["own"] else "own"
