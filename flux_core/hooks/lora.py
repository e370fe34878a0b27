"""A LoRA as an entry of a plan: which file, how strong, in which blocks, at which steps.

It hooks into nothing: the pipeline attaches the file and sets its scale before each step (`pipeline/loras.py`). A
record of one, as pictures carry it, has the file's own name and its hash; nothing is opened by that name.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field

from ..errors import UsageError
from ..params import FluxParams
from ..terminal import one_line
from .intervention import Intervention, Patterns, parse_steps
from .seam import Placed
from .sites import match_blocks

LARGEST = 1000.0
"""the largest scale, of either sign"""


def _bounded(value: float) -> float:
    if not abs(value) <= LARGEST:
        raise ValueError(f"a scale is a number from -{LARGEST:g} to {LARGEST:g}")
    return value or 0.0  # -0 draws the same picture as 0, and is recorded as it


class Lora(Intervention):
    """`{"kind": "lora", "file": "style.safetensors", "scale": 0.8, "blocks": ["single_blocks.*"], "steps": ["0-13"]}`

    Two entries may name the same file: where both are active their scales add up.
    """

    kind: Literal["lora"] = "lora"
    in_forward: ClassVar[bool] = False
    file: Annotated[str, Field(min_length=1)]
    """a safetensors file, a folder that a trainer wrote, or a hub repository; in a record the file's own name"""
    scale: Annotated[float, Field(strict=True), AfterValidator(_bounded)] = 1.0
    blocks: Patterns | None = None
    """None: all layers, and the text encoders"""
    partial: bool = False
    """whether modules that name nothing in the model are left out, with a note"""
    merge: bool = False
    """whether it is written into the weights instead of computed beside them"""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """of the file. With it this is a record, and the file is found by this hash alone"""
    autov3: Annotated[str, Field(pattern="^[0-9a-f]{12}$")] | None = None
    """the hash by which other tools know the file: of its tensors without the header"""

    @property
    def portable(self) -> bool:
        return self.sha256 is not None and not re.search(r"[/\\]", self.file)

    @property
    def label(self) -> str:
        return f"the LoRA {one_line(Path(self.file).name)} at {self.scale:g}"

    @property
    def name(self) -> str:
        """The file's name as other tools write it, without its suffix."""
        return one_line(Path(self.file).stem)

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        """Nothing; checks that there are such blocks."""
        if self.blocks is not None:
            match_blocks(self.blocks, params)
        if self.merge and (self.blocks is not None or self.steps is not None):
            raise UsageError(
                f"a merged LoRA is in the weights at every step and in every block: {self.name} cannot be "
                "for some. Next: leave --lora-merge out"
            )
        return []

    def check_steps(self, num_steps: int) -> None:
        if self.steps is not None and self.steps[-1] >= num_steps:
            last, file = num_steps - 1, one_line(Path(self.file).name)
            raise UsageError(
                f"--lora {file} {self.scale:g}@{ranges(self.steps)}: there is no step {self.steps[-1]}, the last is "
                f"{last}. Next: name steps from 0 to {last}, as in {self.scale:g}@0-{last}, or more --num-steps"
            )

    def settings(self) -> str:
        """Name, scale and steps, for people."""
        steps = "" if self.steps is None else f"@{ranges(self.steps)}"
        return f"{self.name} {self.scale:g}{steps}{' in some blocks' if self.blocks else ''}"


def ranges(steps: tuple[int, ...]) -> str:
    """Sorted steps as text, as short as can be: 0-13,20."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


class Typed:
    """A LoRA as a user writes it: a file, and maybe a scale, as in `style.safetensors 0.8@0-13`."""

    def __init__(self, file: str, text: str | None = None) -> None:
        """text: the scale, and behind an @ the steps. UsageError."""
        self.file, self.text = file, text
        self.scale: float | None = None
        self.steps: str | None = None
        if text is not None:
            self.scale, self.steps = _scale_and_steps(file, text.strip())

    @classmethod
    def of(cls, words: Any) -> Self:
        """From the words behind --lora, or a text of both, as a scale needs that begins with a dash. UsageError."""
        if not isinstance(words, str) and len(words) == 1:
            words = str(words[0])
        parts = words.rsplit(maxsplit=1) if isinstance(words, str) else [str(word) for word in words]
        if isinstance(words, str) and len(parts) == 2 and not _SCALE.fullmatch(parts[1]):
            parts = [words]  # a space in the file's name
        if len(parts) > 2:
            raise UsageError(
                f"--lora takes a file and a scale, not {len(parts)} values ({' '.join(parts)[:60]!a}). "
                "Next: --lora FILE SCALE for each file"
            )
        if not parts or not parts[0].strip():
            raise UsageError("--lora names no file: its value is empty. Next: --lora FILE SCALE, or leave it out")
        return cls(parts[0].strip(), *parts[1:])

    def entry(self, default: float = 1.0, partial: bool = False, merge: bool = False) -> dict[str, Any]:
        """The entry of a plan. default: the scale where none was written."""
        scale = default if self.scale is None else self.scale
        entry: dict[str, Any] = {"kind": "lora", "file": self.file, "scale": scale}
        entry |= {"partial": True} if partial else {}
        entry |= {"merge": True} if merge else {}
        return entry if self.steps is None else entry | {"steps": self.steps}


_SCALE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:@(\d[\d,/-]*))?", re.ASCII)


def _scale_and_steps(file: str, text: str) -> tuple[float, str | None]:
    """The scale in a text, and the steps behind its @. UsageError."""
    found, start = _SCALE.fullmatch(text), f"--lora {file} {text}"
    if not found or not abs(float(found[1])) <= LARGEST:
        raise UsageError(
            f"{start}: a scale is a number from -{LARGEST:g} to {LARGEST:g}, with steps behind an @. "
            "Next: write it as 0.8 or 0.8@0-13"
        )
    try:
        parse_steps(found[2])
    except ValueError as error:
        raise UsageError(
            f"{start}: {error}. Next: write steps from the first to the last, as in {found[1]}@0-13, or no @ for all"
        ) from None
    return float(found[1]), found[2]
