"""Writing pictures whole or not at all, and never over another file.

A picture is written under a temporary name, flushed to the disk, and then linked to its final name. `link` fails when
the name is taken, even if another process took it a moment ago; then the next number is tried. Names hold the model and
the seed, never the prompt, so no prompt can choose a file's path.
"""

from pathlib import Path

from PIL import Image

from ..files import disk_errors, publish, temporary_beside, write_synced
from .metadata import png_bytes


def save_picture(image: Image.Image, folder: Path, stem: str) -> Path:
    """Write a PNG with its metadata as `stem.png`, or `stem_1.png`, … if that is taken. Returns its path."""
    data, temporary = png_bytes(image), temporary_beside(folder)
    with disk_errors(folder / f"{stem}.png"):
        try:
            write_synced(temporary, data)
            return publish(temporary, folder / f"{stem}.png")
        finally:
            temporary.unlink(missing_ok=True)
