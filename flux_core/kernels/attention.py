"""Attention by the fastest of PyTorch's kernels, found by a trial on the model's device.

`F.scaled_dot_product_attention` chooses one of its kernels by the card's generation and the library's version.
Here each runs a few times on tensors of FLUX's shape when a model is loaded, some tens of milliseconds in all, and the
fastest becomes `ops.attend`. It replaces PyTorch's own choice only where it is clearly faster, so that the same machine
chooses the same next time: the last bits of a picture depend on it. Running out of memory in the trial is raised, and
nothing is chosen.

Attention in eight bits (`eight_bits.py`) takes its place where that is asked for, or where `AUTO` says so: it changes
pictures, and so a trial of its time alone decides nothing.
"""

from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..errors import UsageError, is_out_of_memory
from ..linears.contract import is_transformed, needs_grad
from ..model.layers import RMSNorm
from ..model.ops import Ops, attend
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


class Needs(NamedTuple):
    """What attention in eight bits needs of a machine."""

    capability: tuple[int, int]
    """the lowest"""
    package: str
    """of Python, by the name that is imported"""
    install: str
    """what pip installs"""


EIGHT: dict[str, Needs] = {
    "int8": Needs((8, 9), "triton", "triton"),
    "fp8": Needs((9, 0), "cudnn", "nvidia-cudnn-frontend"),
}
"""by the values of `--attention` that are in eight bits, which are the names of `eight_bits.FORMS`"""
HEAD_DIMS = (64, 128)
"""that their kernels have"""
AUTO: dict[tuple[str, int], str] = {}
"""what `--attention auto` is for a format and a major compute capability, where both its time and its error were
measured and are good; elsewhere exact"""


def pick_attention(asked: str | None, format: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """A key of `EIGHT`, or "exact". asked: the value of `--attention`. format: the model's precision, as requests name
    it. UsageError for eight bits that this machine cannot, or a model of that dtype and head size."""
    if asked in (None, "auto"):
        major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        found = AUTO.get((format, major), "exact")
        return "exact" if found == "exact" or _missing(found, device, dtype, head_dim) else found
    if asked != "exact" and (missing := _missing(str(asked), device, dtype, head_dim)):
        raise UsageError(f"--attention {asked}: {missing}, or leave --attention out")
    return str(asked)


def _missing(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What stands against attention in that form, and the next step; empty where nothing does."""
    least, package, install = EIGHT[name]
    if device.type != "cuda" or torch.version.hip:
        return f"{device} has no kernels for it. Next: --device cuda"
    if (has := torch.cuda.get_device_capability(device)) < least:
        needed = ".".join(map(str, least))
        return f"the card has compute capability {has[0]}.{has[1]}, it needs {needed}. Next: another card"
    if dtype not in (torch.bfloat16, torch.float16):
        return "it is for models that compute in bf16. Next: --dtype bf16, fp8 or int8"
    if head_dim not in HEAD_DIMS:
        return f"it has no kernels for heads of {head_dim} features. Next: another --name"
    if find_spec(package) is None:
        return f"it needs a package that is not installed. Next: pip install {install}"
    return ""


def in_eight_bits(ops: Ops, name: str) -> Ops:
    """These functions, with attention in that form of `EIGHT`."""
    if name == "fp8":
        from .cudnn_fp8 import attend as run
    else:
        from .flash import attend as run
    return ops._replace(attend=attend_by(run, ops.attend, name))


@cache
def attend_by(run: Callable[..., Tensor], exact: Attend, name: str) -> Callable[..., Tensor]:
    """`ops.attend` by that function. `exact` is there where a gradient is needed, and, as its attribute of that name,
    for plans that reach into attention. `way`: the name."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return exact(q, k, v) if needs_grad(q, k, v) else run(q, k, v)

    attend.exact, attend.way = exact, name  # type: ignore[attr-defined]
    return attend


def name_of(found: Callable[..., Tensor]) -> str:
    """The name of attention's function: a key of `BACKENDS` or `EIGHT`; "other" if it is not ours."""
    if way := getattr(found, "way", None):
        return way
    return next((name for name, backend in BACKENDS.items() if backend is found), "other")


def attention_for(model: Backbone, device: torch.device) -> Attend:
    """`ops.attend` for a model there: for half precision on CUDA the fastest, by a trial; else PyTorch's choice."""
    dtype = dtype_of(model)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return attend
    return fastest(device, dtype, model.params.num_heads, model.params.head_dim)


def dtype_of(model: Backbone) -> torch.dtype:
    """The dtype of its queries and keys."""
    return next(part.scale.dtype for part in model.modules() if isinstance(part, RMSNorm))


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
