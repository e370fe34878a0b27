"""`info FILE`: what a picture that flux_core made says of itself."""

import json

from ..errors import FileError
from ..metadata import KEY, found, printable, read_texts


def info(file: str) -> str:
    """Its request, as JSON in lines, and the text for other tools. FileError for a picture not ours."""
    texts = read_texts(file)
    if KEY not in texts:
        raise FileError(f"{file} was not made by flux_core: {found(texts)}")
    return printable(f"{_pretty(texts[KEY])}\n\n{texts.get('parameters', '')}".rstrip())


def _pretty(text: str) -> str:
    """JSON in lines. What is no JSON stays as it is: this command shows, and believes nothing."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
