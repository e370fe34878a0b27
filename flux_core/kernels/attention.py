"""Attention by the fastest of PyTorch's kernels, found by a trial on the model's device.

`F.scaled_dot_product_attention` chooses one of its kernels by the card's generation and the library's version.
Here each runs a few times on tensors of FLUX's shape when a model is loaded, some tens of milliseconds in all, and the
fastest becomes `ops.attend`. It replaces PyTorch's own choice only where it is clearly faster, so that the same machine
chooses the same next time: the last bits of a picture depend on it. Running out of memory in the trial is raised, and
nothing is chosen.
"""

from collections.abc import Callable, Mapping
from functools import cache, wraps
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from ..errors import is_out_of_memory
from ..linears.contract import is_transformed, needs_grad
from ..model.layers import RMSNorm
from ..model.ops import attend
from ..model.transformer import Backbone

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

SWITCH_BELOW = 0.9
"""of the time of PyTorch's own choice, below which another kernel replaces it"""
TOKENS = 4608
"""of a megapixel and its prompt: where attention counts most"""
CALLS = 3


def transformable(backend: Attend) -> Attend:
    """That backend, or inside a transform of `torch.func`, which none of them takes, PyTorch's choice."""

    @wraps(backend)
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) if is_transformed() else backend(q, k, v)

    return call


@transformable
def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, needs_grad(q, k, v)))


@transformable
def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v))


@transformable
def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, needs_grad(q, k, v)))


def joined(found: tuple[Tensor, ...]) -> Tensor:
    """The output of such a kernel with heads concatenated: [B, H, L, D] -> [B, L, H*D]."""
    return rearrange(found[0], "B H L D -> B L (H D)")


BACKENDS: dict[str, Attend] = {"own": attend, "cudnn": cudnn, "flash": flash, "efficient": efficient}
"""`ops.attend`, [B, H, L, D] each -> [B, L, H*D], by PyTorch's own choice and by each of its kernels"""


def attention_for(model: Backbone, device: torch.device) -> Attend:
    """`ops.attend` for a model there: for half precision on CUDA the fastest, by a trial; else PyTorch's choice."""
    dtype = next(part.scale.dtype for part in model.modules() if isinstance(part, RMSNorm))  # of q and k
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return attend
    return fastest(device, dtype, model.params.num_heads, model.params.head_dim)


@cache
def fastest(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Attend:
    """The fastest backend for these sizes; tried once in a process, and again after running out of memory."""
    draw = torch.Generator(device).manual_seed(0)  # leaves global seeds alone
    q, k, v = (
        torch.randn(1, TOKENS, heads, head_dim, device=device, dtype=dtype, generator=draw).transpose(1, 2)
        for _ in range(3)
    )  # tokens outside heads in memory, as `norm_rope` leaves them
    with torch.cuda.device(device):
        ms = {name: milliseconds(backend, q, k, v) for name, backend in BACKENDS.items()}
    return BACKENDS[choice({name: time for name, time in ms.items() if time is not None})]


def milliseconds(backend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """The time of the fastest of a few calls; None if the kernel does not support such tensors."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    try:
        backend(q, k, v)
        marks[0].record()
        for mark in marks[1:]:
            backend(q, k, v)
            mark.record()
        marks[-1].synchronize()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return min(before.elapsed_time(after) for before, after in pairwise(marks))


def choice(ms: Mapping[str, float]) -> str:
    """The name of the backend to use, from the milliseconds of each, `own` among them."""
    name = min(ms, key=ms.__getitem__)
    return name if ms[name] < SWITCH_BELOW * ms["own"] else "own"
