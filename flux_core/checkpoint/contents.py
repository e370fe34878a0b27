"""The tensors of one network in a file or folder, and whether they fit the network, by headers alone. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import FileError, UsageError
from .header import WEIGHT_DTYPES
from .identify import WHOLE, Identity, Part
from .names import renamed
from .scales import find_scales
from .shapes import Shape, Shapes
from .source import Source, find_source
from .stored import Storage

OTHERS = (*WHOLE.values(), "first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema.")
"""prefixes of other networks' names, which may be in the same file"""
TEXT_NAMES: dict[Part, tuple[str, ...]] = {
    "t5": ("shared.", "encoder.block.", "encoder.final_layer_norm."),
    "clip": ("embeddings.token_embedding.", "embeddings.position_embedding.", "encoder.", "final_layer_norm."),
}
"""prefixes of a text encoder's names. Files also have others: decoders, vision models, positions, projections"""


@dataclass(frozen=True)
class Contents:
    """The tensors of one network in a file that may hold others, too."""

    source: Source
    part: Part
    """the network that was looked for"""
    found: Identity
    storage: Storage
    """its weights in few bits"""
    names: Mapping[str, str]
    """a tensor's name in its layout (`names.RENAMES` applied) -> in the file"""

    @cached_property
    def shapes(self) -> Shapes:
        """By the layout's names."""
        return {name: self.source.weights[in_file] for name, in_file in self.names.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """By the layout's names."""
        return {name: self.source.dtypes[in_file] for name, in_file in self.names.items()}

    @property
    def is_exact(self) -> bool:
        """Whether the file has these tensors under these names, and no others."""
        return set(self.source.shapes) == set(self.names)


def find_contents(path: Path, part: Part) -> Contents:
    """The tensors of that network in a file or folder. FileError: no weights, or scales of an unknown kind."""
    source = find_source(path)
    found = source.identity(part)
    storage = find_storage(source, found.prefix)
    weights = (name for name in source.shapes if name.startswith(found.prefix) and name not in storage.names)
    names = renamed([name.removeprefix(found.prefix) for name in weights], part)
    kept = {name: found.prefix + bare for name, bare in names.items() if _belongs(name, part)}
    return Contents(source, part, found, storage, kept)


def find_storage(source: Source, prefix: str = "") -> Storage:
    """The weights in few bits under that prefix. FileError for an unknown kind."""
    scaled, stored = find_scales(source, prefix), source.stored
    of = {name: one for name, one in stored.of.items() if name.startswith(prefix)}
    return Storage({**scaled.of, **of}, scaled.names | stored.names)


def check_format(contents: Contents, format: str | None, flags: tuple[str, str] = ("--dtype", "--model")) -> None:
    """UsageError for a format that only files have, where this one is in another.

    flags: those that name the format and the file.
    """
    if format == "gguf" and format not in {one.format for one in contents.storage.of.values()}:
        (dtype, model), source = flags, contents.source
        finding = "has no weights in few bits" if any(header.is_gguf for header in source.headers) else "is none"
        raise UsageError(
            f"{dtype} gguf means as a GGUF file has it, and {source.path} {finding}. Next: give the file with "
            f"{model}, or another {dtype}."
        )


def _belongs(name: str, part: Part) -> bool:
    """Whether a name may be one of that network's."""
    if part in TEXT_NAMES:
        return name.startswith(TEXT_NAMES[part])
    return not name.startswith(OTHERS)


def check_fit(contents: Contents, expected: Mapping[str, Shape], advice: str) -> None:
    """FileError, with the advice as "Next:", if the file does not hold exactly these tensors in a readable dtype."""
    path = contents.source.path
    if findings := misfits(contents.shapes, expected):
        raise FileError(
            f"{path} does not hold the tensors of this model: {'; '.join(findings)}. "
            f"This is {contents.found.text}. Next: {advice}."
        )
    foreign = [
        f"{name} is {kind}"
        for name, kind in contents.dtypes.items()
        if kind not in WEIGHT_DTYPES and contents.names[name] not in contents.storage.of
    ]
    if foreign:
        found = listing("tensors that are no plain bf16, fp16, fp32 or fp8", foreign)
        raise FileError(f"{path}: {found}. Next: take it in bf16, or in a format of docs/weights.md.")


def misfits(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """The differences between a file's tensors and those expected, for people; empty if they are the same."""
    other = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    findings = [
        listing("missing", [name for name in expected if name not in shapes]),
        listing("unexpected", [name for name in shapes if name not in expected]),
        listing("of another shape", other),
    ]
    return [finding for finding in findings if finding]


def listing(what: str, names: list[str]) -> str:
    """The number of names, `what` they are, and the first five; empty for none."""
    return f"{len(names)} {what} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""
