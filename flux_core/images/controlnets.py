"""The ControlNets that come with a request: as they are typed, which files are meant, and what fits these. No torch."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..checkpoint.controlnet import read_controlnet
from ..errors import UsageError, nearest
from ..lora.known import CONTROLNET, Known, locate, remember
from ..params import FluxParams
from ..request.fields import MODES, MOST_CONTROL
from ..request.pictures import ControlNetUse

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_SCALE = re.compile(rf"([+-]?{_NUMBER})(?:@({_NUMBER})-({_NUMBER}))?", re.ASCII)
_WORD = re.compile(r"[a-z][a-z_-]*", re.IGNORECASE | re.ASCII)


class Wanted(NamedTuple):
    """A ControlNet as Python code names it. None is a default, and values at the end may be left out."""

    file: str | Path
    """a safetensors file, a folder of diffusers, or a hub id"""
    control: Any
    """a map, or a photograph with the name of a map before it, as in `open_given`"""
    scale: float | None = None
    """of the residuals; 1 by default"""
    span: tuple[float, float] | None = None
    """the part of the steps that is steered; (0, 1) by default"""
    mode: str | int | None = None
    """the kind of condition, for a union: of `fields.MODES` or a number; the map's own by default"""

    @classmethod
    def of(cls, values: Any) -> Self:
        """From a sequence of two to five values. UsageError."""
        with suppress(TypeError, ValueError):
            if isinstance(values, list | tuple) and len(values) >= 2:
                wanted = cls(*values)
                scale = None if wanted.scale is None else float(wanted.scale)
                start, end = (0, 1) if wanted.span is None else map(float, wanted.span)
                return wanted._replace(scale=scale, span=wanted.span and (start, end))
        raise UsageError("a ControlNet is (file, picture, scale, (start, end), mode), of which two are needed")

    @classmethod
    def typed(cls, words: Sequence[str], before: ControlNetUse | None = None) -> Self:
        """From the words behind --controlnet. UsageError.

        before: the record in a picture that is repeated, whose settings hold where none are typed.
        """
        said = f"--controlnet {' '.join(words)[:200]}"
        if not 2 <= len(words) <= 4:
            raise UsageError(
                f"{said}: that is not a file and what to follow, and maybe a scale and a mode. Next: as in "
                "--controlnet union.safetensors canny:photo.png 0.7"
            )
        file, control, *rest = words
        found = _SCALE.fullmatch(rest[0]) if rest else None
        if rest and found is None and (rest[1:] or not _WORD.fullmatch(rest[0])):
            raise UsageError(f"{said}: {rest[0]!a} is no scale. Next: write it as 0.7, or 0.7@0-0.8 for some steps")
        groups = found.groups() if found else (None, None, None)
        scale, start, end = (None if text is None else float(text) for text in groups)
        span = None if start is None or end is None else (start, end)
        mode = next(iter(rest[1:] if found else rest), None)
        wanted = cls(file, control, scale, span, mode)
        return wanted if before is None else wanted.like(before)

    def like(self, before: ControlNetUse) -> Self:
        """With the settings of a record in the place of defaults; its mode where net and map are the same."""
        map, colon, _ = str(self.control).partition(":")
        same = (self.name, map if colon else "") == (before.net, before.map)
        return self._replace(
            scale=before.scale if self.scale is None else self.scale,
            span=self.span or (before.start, before.end),
            mode=before.mode if self.mode is None and same else self.mode,
        )

    @property
    def name(self) -> str:
        """The last part of what was named: most files of ControlNets are called as all others."""
        return Path(self.file).name.encode(errors="replace").decode()

    def found(self, map: str, params: FluxParams) -> tuple[Known, dict[str, Any]]:
        """The file, and what a `ControlNetUse` says of it and of the settings.

        map: what is made of the picture; params: of the transformer. UsageError, FileError, AccessError, DiskError.
        """
        scale, (start, end) = 1.0 if self.scale is None else self.scale, self.span or (0.0, 1.0)
        if not abs(scale) <= MOST_CONTROL:
            raise UsageError(f"{self.name}: a scale is from -{MOST_CONTROL} to {MOST_CONTROL}, not {scale:g}")
        if not 0 <= start < end <= 1:
            part = f"{start:g}-{end:g} is no part of the steps"
            raise UsageError(f"{self.name}: {part}. Next: two numbers from 0 to 1, the smaller first, as in 0.7@0-0.8")
        path = locate(str(self.file), CONTROLNET)
        _, sizes = read_controlnet(path, params)
        mode, known = self._mode(map, sizes.modes), remember(path)
        net = {"net": self.name or path.name, "net_sha256": known.sha256}
        return known, {**net, "scale": scale, "start": start, "end": end, "mode": mode}

    def _mode(self, map: str, count: int) -> int | None:
        """The number of the mode, of a union of so many kinds of conditions. UsageError."""
        said = "" if self.mode is None else str(self.mode).lower().replace("-", "_")
        if not count:
            if said:
                raise UsageError(f"{self.name} is for conditions of one kind. Next: leave the mode {said} out")
            return None
        names = MODES[:count]
        if (name := said or map) in names:
            return names.index(name)
        if name.isascii() and name.isdigit() and int(name) < count:
            return int(name)
        there = f"{', '.join(names)}, or a number from 0 to {count - 1}"
        if not name:
            raise UsageError(f"{self.name} is a union of {count} kinds. Next: add which one the map is: {there}")
        raise UsageError(f"{self.name} has no mode {name!a}. Next: one of {there}.{nearest(name, names)}")
