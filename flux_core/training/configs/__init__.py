"""Configs of other trainers: which tool a file is of, its settings here, and what became of each of its keys.

A tool has a module with a name, `recognises(document)` and `read(document, read_other)`, and a table of its keys.
"""

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ...errors import FileError, UsageError
from ...files import user_path
from ...jsonfile import MAX_BYTES
from ..settings import BY_NAME, parsed
from . import aitoolkit, kohya, simpletuner
from .keys import Fate, check_size

TOOLS: tuple[Any, ...] = (simpletuner, aitoolkit, kohya)
DOCUMENTS: Mapping[str, str] = MappingProxyType(
    {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML", ".json": "JSON", ".jsonc": "JSON"}
)
"""formats by a file's ending"""
PARSERS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {"TOML": tomllib.loads, "YAML": aitoolkit.parse, "JSON": json.loads}
)
"""of texts in them; ValueError and RecursionError for one that is none"""
KNOWN = "kohya's TOML, ai-toolkit's YAML, SimpleTuner's JSON"


class Config(NamedTuple):
    """What a tool's config says."""

    path: Path
    tool: str
    fates: list[Fate]
    """of its keys, in its order, and of the tool's defaults that differ from ours"""
    values: dict[str, Any]
    """settings, for `Settings`"""

    def lines(self) -> list[str]:
        """For people: a line for each key."""
        left = sum(fate.lacks for fate in self.fates)
        return [f"{self.path}: a config of {self.tool}, {left} of whose settings are left out", *map(str, self.fates)]


def read_config(path: str | Path) -> Config:
    """The config in a file of another trainer. FileError; UsageError for a file of none, or of another structure."""
    path = user_path(path)
    document = read_document(path)
    tool = next((one for one in TOOLS if one.recognises(document)), None)
    if tool is None:
        raise UsageError(f"{path} is none of {KNOWN}.{_hint(document, path)}")
    try:
        fates: list[Fate] = list(tool.read(document, read_document))
        values = {}
        for fate in fates:
            for name, value in fate.settings.items():
                values[name] = parsed(BY_NAME[name], value, fate.key)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise UsageError(
            f"{path} is not built as configs of {tool.NAME} that are known here ({type(error).__name__}: {error}): it "
            "may be of another version. Next: give what it says by flags"
        ) from error
    return Config(path, tool.NAME, fates, values)


def _hint(document: Any, path: Path) -> str:
    """What an unknown file may be."""
    if not isinstance(document, dict):
        return ""
    if "LoRA_type" in document:
        return " It is of kohya's GUI. Next: give the config_lora-….toml that the GUI writes when it trains"
    flat = {key for name, value in document.items() for key in (value if isinstance(value, dict) else [name])}
    ours = {str(key).replace("-", "_") for key in flat} & BY_NAME.keys()
    return f" It is of our own kind. Next: give it as `train {path}`" if ours and path.suffix == ".toml" else ""


def read_document(path: str | Path) -> Any:
    """What a file of TOML, YAML or JSON holds. FileError, UsageError."""
    path = user_path(path)
    kind = DOCUMENTS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"{path} ends with none of {', '.join(DOCUMENTS)}. Next: give one of {KNOWN}")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
        if len(text) > MAX_BYTES:
            raise UsageError(f"{path}: such a file has at most {MAX_BYTES:,} bytes")
        document = PARSERS[kind](text)
    except OSError as error:
        raise FileError(
            f"{path} cannot be read: {error.strerror or error}. Next: call from the folder that paths in the config "
            "are relative to"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is no {kind}: {error}. Next: mend it there") from None
    try:
        check_size(document)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return document
