"""What enters a block: the functions to apply inside it, and how what they return is looked at.

A `Taps` holds no block's index and no step, so blocks whose taps hold the same functions share one compiled graph.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.tap import Tap
from .sites import ATTEND

INTO_ATTENTION = frozenset((ATTEND, "q", "k", "v"))
"""last words of the sites where a function changes attention, which is exact there, not in eight bits"""

BoundFunction = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""a function and its arguments after the value"""


class Misfit(Exception):
    """What a function returned does not fit its place."""

    def __init__(self, fn: Callable[..., Any], site: str, text: str) -> None:
        super().__init__(text)
        self.fn, self.site, self.text = fn, site, text


def fitting(new: Any, shape: Sequence[int], old: Tensor, fn: Callable[..., Any], site: str) -> Tensor:
    """`new`, if it is a tensor of that shape, and of the dtype and device of `old`. Misfit."""
    if isinstance(new, Tensor) and new.shape == shape and new.dtype == old.dtype and new.device == old.device:
        return new
    raise Misfit(fn, site, f"returned {described(new, old)}; expected {_sizes(shape)} {_name_of(old.dtype)}")


def described(x: Any, old: Tensor) -> str:
    """What a function returned, for an error."""
    if not isinstance(x, Tensor):
        return "None" if x is None else f"a {type(x).__name__}"
    place = "" if x.device == old.device else f" on {x.device}"
    return f"{_sizes(x.shape)} {_name_of(x.dtype)}{place}"


def _sizes(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Taps(Tap):
    """The functions to apply inside a block, by site, and the values to return to readers."""

    def __init__(self, txt_len: int, functions: dict[str, tuple[BoundFunction, ...]], reads: frozenset[str]) -> None:
        self.txt_len, self.functions, self.reads = txt_len, functions, reads
        self.heads = tuple(sorted({site for site in (*functions, *reads) if site.startswith("head.")}))
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor) -> Tensor:
        for fn, args in self.functions.get(site, ()):
            x = fitting(fn(x, *args), x.shape, x, fn, site)
        if site in self.reads:
            self.values[site] = x
        return x

    def joined(self, site: str, x: Tensor, dim: int) -> Tensor:
        txt_site, img_site = f"txt.{site}", f"img.{site}"
        names = (txt_site, img_site)
        if not any(name in self.functions or name in self.reads for name in names):
            return x
        txt, img = x.split([self.txt_len, x.shape[dim] - self.txt_len], dim)
        changed = self(txt_site, txt), self(img_site, img)
        return torch.cat(changed, dim) if any(name in self.functions for name in names) else x

    def attend(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if any(site.split(".")[-1] in INTO_ATTENTION for site in self.functions):
            attend = getattr(attend, "exact", attend)
        for fn, args in self.functions.get(ATTEND, ()):
            attend = _wrap_attention(fn, attend, args)
        out = attend(q, k, v)
        out = self._each_head(out, q.shape[1]) if self.heads else out
        if ATTEND in self.reads:
            self.values[ATTEND] = out
        return out

    def _each_head(self, out: Tensor, num_heads: int) -> Tensor:
        """Apply `head.N` to each head's part of attention's output [B, T+L, D]."""
        parts = list(out.unflatten(-1, (num_heads, -1)).unbind(2))
        for site in self.heads:
            i = int(site.removeprefix("head."))
            parts[i] = self(site, parts[i])
        return torch.stack(parts, 2).flatten(2) if any(site in self.functions for site in self.heads) else out


def _wrap_attention(
    fn: Callable[..., Tensor], attend: Callable[..., Tensor], args: tuple[Any, ...]
) -> Callable[..., Tensor]:
    def wrapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape[0], q.shape[2], q.shape[1] * q.shape[3]
        return fitting(fn(attend, q, k, v, *args), shape, q, fn, ATTEND)

    return wrapped
