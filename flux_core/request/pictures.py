"""What a request records of its pictures: names without folders, SHA-256, and how each is used. No file is opened."""

import re
from typing import Annotated

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict

from ..terminal import one_line
from .fields import MODES, MOST_CONTROL, MOST_WEIGHT


def _no_folder(file: str) -> str:
    if "/" in file:
        raise ValueError(f"{file[:60]!a} names a folder; only a file's own name is kept")
    return file


class InitImage(BaseModel):
    """The record of an init image: its file's name without a folder, and its SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: Annotated[str, AfterValidator(_no_folder)]
    sha256: str


class Control(InitImage):
    """The record of a control picture."""

    map: str = ""
    """what was made of it, of `request.fields.MAPS`; empty: it is a map itself"""


class ControlNetUse(Control):
    """The record of a ControlNet, and of the control picture that is followed by it."""

    net: Annotated[str, AfterValidator(_no_folder)]
    """its file's name, without a folder"""
    net_sha256: str
    scale: Annotated[float, pydantic.Field(ge=-MOST_CONTROL, le=MOST_CONTROL, allow_inf_nan=False)] = 1.0
    start: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    """a step is steered if all of it lies between these fractions of the steps"""
    mode: Annotated[int, pydantic.Field(ge=0)] | None = None
    """the kind of condition, for a union"""

    def settings(self) -> str:
        """For people: by which file, how closely, in which steps, along what."""
        steps = "" if (self.start, self.end) == (0, 1) else f"@{self.start:g}-{self.end:g}"
        mode = "" if self.mode is None else f" ({dict(enumerate(MODES)).get(self.mode, f'mode {self.mode}')})"
        seen = f"{self.map} of {one_line(self.file)}" if self.map else one_line(self.file)
        return f"ControlNet {one_line(self.net)} {self.scale:g}{steps}{mode} along {seen}"


class Reference(InitImage):
    """The record of a reference."""

    weight: Annotated[float, pydantic.Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT, allow_inf_nan=False)] = 1.0


def read_pad(value: object) -> tuple[int, int, int, int] | None:
    """Four numbers of pixels, of a text or a list; None if all are 0. ValueError."""
    if value is None:
        return None
    given = re.split(r"\s*,\s*", value.strip()) if isinstance(value, str) else value
    parts = [str(x) for x in given] if isinstance(given, list | tuple) else []
    if len(parts) != 4 or not all(re.fullmatch(r"\d{1,4}", x) for x in parts):
        raise ValueError("give pixels for left, top, right and bottom, as in 128,0,128,0")
    left, top, right, bottom = (int(x) for x in parts)
    return (left, top, right, bottom) if any((left, top, right, bottom)) else None
