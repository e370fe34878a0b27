"""Change the value at a site: multiply it, add to it, or replace it.

The operand is a number or a tensor that broadcasts to the site's shape: a tensor from Python, or in a plan `{"file":
"direction.safetensors", "tensor": "smile", "times": 2}`. Numbers are passed as tensors too, so that other strengths,
blocks and steps use the same compiled graph.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..jsonfile import first_finding, in_words
from ..params import FluxParams
from .intervention import Intervention, Patterns
from .seam import Placed, Write, traceable
from .sites import match_sites
from .store import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


class Stored(BaseModel):
    """A tensor in a safetensors file, times a number."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: Path
    tensor: str
    times: float = Field(default=1.0, allow_inf_nan=False)

    @classmethod
    def of(cls, found: dict[str, Any]) -> "Stored":
        """From JSON. ValueError with the finding, in words."""
        try:
            return cls(**found)
        except ValidationError as error:
            first = first_finding(error)
            raise ValueError(in_words(first, "the value", str(first["loc"][0]), cls.model_fields)) from None

    def read(self) -> "Tensor":
        """The tensor, times the number. FileError."""
        x = read_tensor(self.file, self.tensor)
        return x if self.times == 1 else x * self.times


def tensor_or_stored(value: Any, other: str) -> Any:
    """A tensor as it is, or a Stored one, from JSON, too. ValueError, which says what else it might have been."""
    if isinstance(value, dict):
        return Stored.of(value)
    if isinstance(value, Stored) or hasattr(value, "broadcast_to"):
        return value
    raise ValueError(f'{value!r:.60} is neither a {other} nor {{"file": …, "tensor": …}}')


def read(value: Any) -> Any:
    """The tensor of a Stored one; anything else as it is. FileError."""
    return value.read() if isinstance(value, Stored) else value


class _Change(Intervention):
    sites: Patterns
    value: Any
    """a number, a Stored tensor, or (from Python) a tensor"""

    @field_validator("value", mode="before")
    @classmethod
    def _number_or_tensor(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
            return float(value)
        return tensor_or_stored(value, "number")

    @property
    def portable(self) -> bool:
        return isinstance(self.value, float)

    @property
    def label(self) -> str:
        what = "a number" if isinstance(self.value, float) else "a tensor"
        return f"{self.kind} {what} at {', '.join(self.sites)}"

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        import torch

        value = read(self.value)
        x = torch.tensor(value, dtype=torch.float32, device="cpu") if isinstance(value, float) else value
        return [Write(site, _FUNCTIONS[self.kind], (x,), traceable=True) for site in match_sites(self.sites, params)]


class Scale(_Change):
    """`{"kind": "scale", "sites": ["single_blocks.3.mod.gate"], "value": 0.5}`"""

    kind: Literal["scale"] = "scale"


class Add(_Change):
    """`{"kind": "add", "sites": ["vec"], "value": {"file": "direction.safetensors", "tensor": "smile"}}`"""

    kind: Literal["add"] = "add"


class Replace(_Change):
    """`{"kind": "replace", "sites": ["double_blocks.2.img.attn"], "value": 0}`"""

    kind: Literal["replace"] = "replace"


@traceable
def scale(x: "Tensor", value: "Tensor") -> "Tensor":
    return x * value.to(x.dtype)


@traceable
def add(x: "Tensor", value: "Tensor") -> "Tensor":
    return x + value.to(x.dtype)


@traceable
def replace(x: "Tensor", value: "Tensor") -> "Tensor":
    return value.to(x.dtype).expand_as(x)


_FUNCTIONS = {"scale": scale, "add": add, "replace": replace}
