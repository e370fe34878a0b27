"""Keep values: any sites, at chosen steps, in a dict or in a safetensors file.

A full capture of FLUX.1-dev at 1024x1024 is large (one `img.out` in bf16 is 25 MB), so name what you need. Values are
detached and moved to the CPU. The keys are `step.site`, and `step.call.site` for a second forward of the same step.
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


class Gathering(Intervention):
    """An intervention that gathers tensors: in the dict `into`, which Python gives, or for the file `to`."""

    to: Path | None = None
    """a new safetensors file"""
    into: Any = Field(default=None, exclude=True)
    """Python only: the dict that takes the tensors"""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if (self.to is None) == (self.into is None):
            raise ValueError('say where to: a file ("to"), or from Python a dict ("into")')
        return self

    @property
    def portable(self) -> bool:
        return False

    @property
    def changes_pixels(self) -> bool:
        return False

    def gather(self, sites: list[tuple[str, ...]], fn: "Callable[..., tuple[str, Tensor]]") -> list[Placed]:
        """Store what `fn(at, *values)` gives, (name, tensor), for each group of sites; write the file at the end."""
        store = {} if self.into is None else self.into

        def keep(at: At, *values: "Tensor") -> None:
            name, x = fn(at, *values)
            prefix = f"{at.step}." if at.call == 0 else f"{at.step}.{at.call}."
            store[prefix + name] = x.detach().to("cpu", copy=True)

        def write() -> None:
            if self.to is not None and store:
                write_tensors(self.to, store)

        return [*(Read(group, keep) for group in sites), End(write)]


class Capture(Gathering):
    """`{"kind": "capture", "sites": ["double_blocks.*.img.out"], "steps": [0], "to": "out.safetensors"}`"""

    kind: Literal["capture"] = "capture"
    sites: Patterns

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        return self.gather([(name,) for name in match_sites(self.sites, params)], lambda at, x: (at.name, x))
