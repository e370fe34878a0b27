"""Store the values at any sites and chosen steps, in a dict or in a safetensors file.

A full capture of FLUX.1-dev at 1024x1024 is large (one `img.out` in bf16 is 25 MB), so choose few sites. Values
are detached and copied to the CPU. The keys are `step.site`, or `step.call.site` for a second forward of the same step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from ..params import FluxParams
from .intervention import Intervention, Patterns
from .seam import At, End, Placed, Read
from .sites import match_sites
from .store import write_tensors

if TYPE_CHECKING:
    from torch import Tensor


class Collector(Intervention):
    """An intervention that stores tensors: in the dict `into`, from Python, or in the file `to`."""

    to: Path | None = None
    """the safetensors file to create"""
    into: Any = Field(default=None, exclude=True)
    """Python only: the dict to store the tensors in"""

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

    def collect(self, sites: list[tuple[str, ...]], fn: "Callable[..., tuple[str, Tensor]]") -> list[Placed]:
        """Reads that store `fn(at, *values)`, (name, tensor), for each group of sites; an End that writes the file."""
        store = {} if self.into is None else self.into

        def save(at: At, *values: "Tensor") -> None:
            name, x = fn(at, *values)
            prefix = f"{at.step}." if at.call == 0 else f"{at.step}.{at.call}."
            store[prefix + name] = x.detach().to("cpu", copy=True)

        def write() -> None:
            if self.to is not None and store:
                write_tensors(self.to, store)

        return [*(Read(group, save) for group in sites), End(write)]


class Capture(Collector):
    """`{"kind": "capture", "sites": ["double_blocks.*.img.out"], "steps": [0], "to": "out.safetensors"}`"""

    kind: Literal["capture"] = "capture"
    sites: Patterns

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        return self.collect([(name,) for name in match_sites(self.sites, params)], lambda at, x: (at.name, x))
