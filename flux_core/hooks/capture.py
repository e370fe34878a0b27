"""Store the values at any sites and chosen steps, in a dict or in a safetensors file.

A capture sees what interventions that write left. A full one of FLUX.1-dev at 1024x1024 is large (one `img.out` in bf16
is 25 MB), so choose few sites, tokens, or their mean. `load_capture` reads a file (`store.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..errors import UsageError
from ..params import FluxParams
from .intervention import Intervention, Patterns, Tokens
from .seam import At, End, Placed, Read
from .sites import match_sites, token_axis
from .store import DTYPES, InDict, InFile, Store

if TYPE_CHECKING:
    from torch import Tensor

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _dtype_name(value: object) -> object:
    """`float32` from that text, from `fp32`, or from torch's object."""
    name = str(value).removeprefix("torch.")
    name = SHORT.get(name, name)
    if value is not None and name not in DTYPES:
        raise ValueError(f"{name[:40]!r} is no dtype; there are {', '.join(DTYPES)}")
    return None if value is None else name


class Collector(Intervention):
    """An intervention that stores tensors: in the dict `into`, from Python, or in the file `to`."""

    to: Path | None = None
    """the safetensors file to create"""
    into: Any = Field(default=None, exclude=True)
    """Python only: the dict to store the tensors in"""
    stream: bool = True
    """whether a file's tensors are written as they come; False: they stay in memory until the end"""

    @model_validator(mode="after")
    def _one_destination(self) -> Self:
        if (self.to is None) == (self.into is None):
            raise ValueError('give one destination: a file ("to") or, from Python, a dict ("into")')
        return self

    @property
    def portable(self) -> bool:
        return False

    @property
    def changes_pixels(self) -> bool:
        return False

    def collect(self, groups: "list[tuple[tuple[str, ...], Callable[..., tuple[str, Tensor]]]]") -> list[Placed]:
        """For each group of sites a Read that stores `fn(at, *values)`, (name, tensor); an End that writes the file."""
        store: Store = InFile(self.to, self.stream) if self.to is not None else InDict(self.into)

        def saving(fn: "Callable[..., tuple[str, Tensor]]") -> "Callable[..., None]":
            return lambda at, *values: store.put(at, *fn(at, *values))

        return [*(Read(sites, saving(fn)) for sites, fn in groups), End(store.finish, store.discard)]


class Capture(Collector):
    """`{"kind": "capture", "sites": ["double_blocks.*.img.out"], "steps": [0], "to": "out.safetensors"}`"""

    kind: Literal["capture"] = "capture"
    sites: Patterns
    tokens: Tokens | None = None
    """of sites that have tokens: `img` or `txt`, or indices, which count from the site's first; None: all"""
    reduce: Literal["mean"] | None = None
    """mean: over these tokens, in fp32"""
    detach: bool = True
    """False, from Python: values keep their graph, so that they can be differentiated"""
    device: str | None = "cpu"
    """where a dict's values go; None: they stay where they are"""
    dtype: Annotated[str | None, BeforeValidator(_dtype_name)] = None
    """of the stored values; None: as they are"""

    @model_validator(mode="after")
    def _of_a_dict(self) -> Self:
        if self.to is not None and not (self.detach and self.device == "cpu"):
            raise ValueError('a file holds values on the CPU without a graph: "detach" and "device" go with a dict')
        return self

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        sites = match_sites(self.sites, params)
        if self.tokens is not None or self.reduce is not None:
            for site in sites:
                self._check_tokens(site)
        return self.collect([((name,), lambda at, x: (at.name, self._kept(at, x))) for name in sites])

    def _check_tokens(self, site: str) -> None:
        """UsageError for a site without such tokens."""
        _, which = token_axis(site) or (0, "")
        if not which:
            raise UsageError(f"capture: {site} has no tokens. Next: leave tokens and reduce out for it")
        if self.tokens in ("img", "txt") and which not in (self.tokens, "all"):
            raise UsageError(f"capture: {site} has no {self.tokens} tokens. Next: name other sites or tokens")

    def _kept(self, at: At, x: "Tensor") -> "Tensor":
        import torch

        x = x.detach() if self.detach else x
        dtype = x.dtype if self.dtype is None else getattr(torch, self.dtype)
        if self.tokens is not None or self.reduce is not None:
            axis, which = token_axis(at.name) or (1, "all")
            if which == "all" and self.tokens in ("txt", "img"):
                first, length = (0, at.txt_len) if self.tokens == "txt" else (at.txt_len, x.shape[axis] - at.txt_len)
                x = x.narrow(axis, first, length)
            elif isinstance(self.tokens, tuple):
                if self.tokens[-1] >= x.shape[axis]:
                    raise UsageError(f"capture: {at.name} has {x.shape[axis]} tokens, so none is {self.tokens[-1]}")
                x = x.index_select(axis, torch.tensor(self.tokens, dtype=torch.int64, device=x.device))
            x = x.float().mean(axis) if self.reduce else x
        return x.to("cpu" if self.to is not None else self.device or x.device, dtype, copy=self.to is None)
