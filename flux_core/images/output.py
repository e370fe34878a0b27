"""Writing pictures whole or not at all, and never over another file.

A picture is written under a temporary name, flushed to the disk, and then linked to its final name. `link` fails when
the name is taken, even if another process took it a moment ago; then the next number is tried. Names hold the model and
the seed, never the prompt, so no prompt can choose a file's path.
"""

import os
from itertools import count
from pathlib import Path

from PIL import Image

from ..files import disk_errors, temporary_beside, write_synced
from .metadata import png_bytes


def save_picture(image: Image.Image, folder: Path, stem: str) -> Path:
    """Write a PNG with its metadata as `stem.png`, or `stem_1.png`, … if that is taken. Returns its path."""
    data, temporary = png_bytes(image), temporary_beside(folder)
    with disk_errors(folder / f"{stem}.png"):
        try:
            write_synced(temporary, data)
            return _publish(temporary, folder, stem)
        finally:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, folder: Path, stem: str) -> Path:
    """Give a file the first free name of `stem.png`, `stem_1.png`, … and return its path."""
    for number in count():
        path = folder / (f"{stem}_{number}.png" if number else f"{stem}.png")
        try:
            _move(temporary, path)
            return path
        except FileExistsError:
            continue
    raise AssertionError("count() does not end")


def _move(temporary: Path, path: Path) -> None:
    """Rename a file. FileExistsError when the new name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (FAT, some network mounts): reserve the name with an empty file, then replace it.
        path.touch(exist_ok=False)
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise
