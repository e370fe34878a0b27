"""`info FILE`: print the record in a picture that flux_core made, or what weights are and which models they fit."""

import json
from collections import Counter
from pathlib import Path

from ..checkpoint.check import fits
from ..checkpoint.source import find_source, is_weights
from ..errors import FileError
from ..images.metadata import KEY, describe_foreign, read_texts
from ..lora.describe import describe
from ..terminal import printable, tell


def info(file: str) -> str:
    """A picture's request as indented JSON and its `parameters` text; or a few lines about weights. FileError."""
    path = Path(file)
    if is_weights(path) or path.is_dir():
        return _describe_weights(path)
    texts = read_texts(path)
    if KEY not in texts:
        raise FileError(f"{file} was not made by flux_core: {describe_foreign(texts)}")
    return printable(f"{_pretty(texts[KEY])}\n\n{texts.get('parameters', '')}".rstrip())


def _pretty(text: str) -> str:
    """JSON, indented. Other text is returned unchanged."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _describe_weights(path: Path) -> str:
    """Part, layout, tensors and metadata, from the headers alone; of a LoRA as `lora info` has it."""
    source = find_source(path)
    kind, shapes = source.identity(), source.shapes
    if kind.part == "lora":
        return printable("\n".join(describe(path)))
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in Counter(source.dtypes.values()).most_common())
    files = f" in {len(source.headers)} files" if len(source.headers) > 1 else ""
    lines = [
        f"{path}: {kind.text}",
        f"part: {kind.part}, layout: {kind.layout}{f', prefix: {kind.prefix}' if kind.prefix else ''}",
        f"tensors: {len(shapes):,} ({dtypes}), {source.size:,} bytes{files}",
        fits(path),
    ]
    for header in source.headers:
        lines += [f"{key}: {value[:200]}" for key, value in sorted(header.metadata.items())]
    return printable("\n".join(lines))


def print_info(file: str) -> None:
    """`info` on standard output."""
    tell(info(file))
