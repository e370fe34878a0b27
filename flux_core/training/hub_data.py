"""Data sets of the hub, written as a folder of pictures with captions, where what is trained on can be looked at."""

from pathlib import Path
from typing import Any

from ..errors import AccessError, UsageError
from ..files import prepare_folder, write_whole
from .data import CAPTIONS

ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"BM": ".bmp"}
"""by a file's first bytes"""
DONE = "complete"
"""a file that is there when all pictures are"""


def from_hub(name: str, folder: Path) -> Path:
    """The folder with a data set's pictures, fetched once. name: as `user/name`, whose split `train` is taken.

    UsageError without the library `datasets`, or where there are no pictures; AccessError, DiskError.
    """
    if (folder / DONE).is_file() and (folder / DONE).read_text(encoding="utf-8") == name:
        return folder
    try:
        import datasets
    except ModuleNotFoundError:
        raise UsageError(f"{name} is a data set of the hub. Next: pip install datasets") from None
    try:
        found = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the library has many kinds
        raise AccessError(
            f"the data set {name} could not be opened: {error}. Next: see its page, and HF_TOKEN"
        ) from None
    return write_rows(found, name, folder)


def write_rows(found: Any, name: str, folder: Path) -> Path:
    """Write the rows of a data set of the library `datasets` as files. UsageError, DiskError."""
    import datasets

    features = found.features or {}
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    text = next((key for key in CAPTIONS if key in features), None)
    if image is None:
        raise UsageError(
            f"the data set {name} has no column of pictures, but {', '.join(features) or 'none that is told'}"
        )
    prepare_folder(folder)
    for number, row in enumerate(found.cast_column(image, datasets.Image(decode=False))):
        data = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
        ending = next((ending for start, ending in ENDINGS.items() if data.startswith(start)), ".png")
        write_whole(folder / f"{number:06d}{ending}", data)
        if text is not None:
            write_whole(folder / f"{number:06d}.txt", str(row[text]))
    write_whole(folder / DONE, name)
    return folder
