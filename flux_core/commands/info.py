"""`info FILE`: the record in a picture that flux_core made, or what a file of weights is and which models it fits."""

import json
from collections import Counter
from pathlib import Path

from ..checkpoint.check import fits
from ..checkpoint.identify import identify
from ..checkpoint.source import SUFFIXES, find_source
from ..errors import FileError
from ..images.metadata import KEY, found, printable, read_texts
from ..terminal import tell


def info(file: str) -> str:
    """A picture's request, as JSON in lines, and the text for other tools; or weights in a few lines. FileError."""
    path = Path(file)
    if path.suffix in SUFFIXES or path.is_dir():
        return _of_weights(path)
    texts = read_texts(path)
    if KEY not in texts:
        raise FileError(f"{file} was not made by flux_core: {found(texts)}")
    return printable(f"{_pretty(texts[KEY])}\n\n{texts.get('parameters', '')}".rstrip())


def _pretty(text: str) -> str:
    """JSON in lines. Other text stays as it is."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _of_weights(path: Path) -> str:
    """What a header says. Nothing of the weights is read."""
    source = find_source(path)
    kind, shapes = identify(source.shapes), source.shapes
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
