"""Data sets of the hub, written as a folder of pictures with captions, where what is trained on can be looked at."""

from io import BytesIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import AccessError, FileError, FluxError, UsageError
from ..files import prepare_folder, write_whole
from ..images.pictures import as_rgb
from ..terminal import no_bars, note
from .tables import CAPTIONS

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
        from huggingface_hub.utils import logging
    except ModuleNotFoundError:
        raise UsageError(
            f"there is no folder {name}, and data sets of the hub need a library. Next: pip install datasets"
        ) from None
    note(f"there is no folder {name}: asking the hub for a data set of that name")
    logging.set_verbosity_error()  # a line for each of five trials, where the error below says it
    try:
        found = datasets.load_dataset(name, split="train", streaming=True)
        return write_rows(found, name, folder)
    except FluxError:
        raise
    except Exception as error:  # the library and its clients have many kinds
        raise AccessError(
            f"there is no folder {name}, and the data set {name} could not be read: {error}. "
            "Next: see its page and HF_TOKEN, or try again"
        ) from None


def write_rows(found: Any, name: str, folder: Path) -> Path:
    """Write the rows of a data set of the library `datasets` as upright PNGs with captions. UsageError, DiskError.

    A picture that is damaged is told, and left out.
    """
    import datasets

    features = found.features or {}
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    text = next((key for key in CAPTIONS if key in features), None)
    if image is None:
        raise UsageError(
            f"the data set {name} has no column of pictures, but {', '.join(features) or 'none that is told'}"
        )
    prepare_folder(folder)
    for number, row in enumerate(tqdm(found, desc=name, unit="picture", disable=no_bars())):
        try:
            picture, data = as_rgb(row[image], f"row {number}"), BytesIO()
        except FileError as error:
            note(f"{name}: left out: {error}")
            continue
        picture.save(data, "PNG")
        write_whole(folder / f"{number:06d}.png", data.getvalue())
        if text is not None:
            write_whole(folder / f"{number:06d}.txt", str(row[text]))
    write_whole(folder / DONE, name)
    return folder
