"""Selections of blocks, by keyword, patterns or a JSON file: written by the importance study, read by the editor."""

import json
from pathlib import Path

from ..errors import FileError, UsageError
from ..params import FluxParams
from .sites import block_names, match_blocks

VITAL = {
    "flux-dev": ("layer.0-1", "layer.17-18", "layer.25", "layer.28", "layer.53-54", "layer.56"),
    "flux-mini": ("layer.0", "layer.3"),
}
"""flux-dev: the blocks in which Stable Flow's released code injects (arXiv 2411.14430); flux-mini: the result of our
own study (`python cli.py importance --limit 24 --seeds 2`, README). flux-mini-fast has none: with those of flux-mini an
edit of four steps changes nothing"""
IMPORTANCE = {"flux-mini": (0.99, 0.53, 0.73, 0.98, 0.59, 0.29, 0.35, 0.10, 0.07, 0.22, 0.09, 0.16)}
"""of each block, by the same study: 1 - the similarity of what is drawn without it (docs/stable-flow.md)"""


def layers_of(choice: str, name: str, params: FluxParams) -> list[str]:
    """The chosen blocks. choice: all, none, vital, non-vital, patterns, or a JSON file with `{"model", "layers"}`.

    UsageError for blocks that the model does not have and for a file made for another model.
    """
    names = block_names(params)
    if choice in ("all", "none"):
        return names if choice == "all" else []
    if choice in ("vital", "non-vital"):
        if name not in VITAL:
            raise UsageError(f"no vital layers are known for {name}: give a file or blocks with --layers, or all")
        vital = match_blocks(VITAL[name], params)
        return vital if choice == "vital" else [block for block in names if block not in vital]
    if choice.endswith(".json"):
        return _from_file(Path(choice), name, params)
    return match_blocks(tuple(part.strip() for part in choice.split(",")), params)


def _from_file(path: Path, name: str, params: FluxParams) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model, layers = found["model"], tuple(map(str, found["layers"]))
    except OSError as error:
        raise FileError(f"{path}: the layers could not be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f'{path} holds no layers: it should be {{"model": "{name}", "layers": ["double_blocks.0", …]}}'
        ) from None
    if model != name:
        raise UsageError(f"{path} holds the layers of {model!a}, but {name} is loaded")
    return match_blocks(layers, params)
