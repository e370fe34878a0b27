"""Writing pictures whole or not at all, and never over another file.

A picture is written under a temporary name, flushed to the disk, and then linked to its final name. `link` fails when
the name is taken, even if another process took it a moment ago; then the next number is tried. Names hold the model and
the seed, never the prompt, so no prompt can choose a file's path.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..files import disk_errors, publish, temporary_beside, write_synced
from ..terminal import tell
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


@contextmanager
def saver(folder: Path) -> Iterator[Callable[[Image.Image, str], Future[Path]]]:
    """`save_picture` in another thread, one after the other; paths are told as files are there. All are at the end.

    An error is raised at the next picture, or at the end.
    """
    waiting: list[Future[Path]] = []

    def saved(image: Image.Image, stem: str) -> Path:
        path = save_picture(image, folder, stem)
        with tqdm.external_write_mode():  # the next picture's bar may be there
            tell(str(path))
        return path

    with ThreadPoolExecutor(1) as thread:

        def save(image: Image.Image, stem: str) -> Future[Path]:
            while waiting and waiting[0].done():
                waiting.pop(0).result()
            waiting.append(thread.submit(saved, image, stem))
            return waiting[-1]

        yield save
    for one in waiting:
        one.result()
