"""Caption the pictures of a folder: which of them, batch by batch, and what could not be captioned."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from ..errors import FileError, FluxError, is_out_of_memory
from ..images.pictures import as_rgb, open_picture
from ..training.data import with_trigger
from .folder import Captions, pictures_in
from .words import cleaned, joined


class Captioner(Protocol):
    """What answers about pictures."""

    name: str

    def __call__(self, pictures: Sequence[Image.Image], keys: Sequence[str]) -> list[str]:
        """An answer for each RGB picture; keys tell them apart."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What is put around an answer."""

    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    existing: str = "skip"
    between: str = " "
    """of a caption that is there and a new one"""

    def __call__(self, answer: str, old: str) -> str:
        """The caption: prefix, answer and suffix, before or behind an old one; then the trigger, if it lacks that."""
        new = joined(self.prefix, answer, self.suffix)
        parts = {"append": (old, new), "prepend": (new, old)}.get(self.existing, (new,))
        return with_trigger(self.between.join(part for part in parts if part), self.trigger)


@dataclass
class Report:
    """What became of a folder's pictures."""

    written: dict[Path, str] = field(default_factory=dict)
    kept: int = 0
    """which had a caption, or got one before the run was stopped"""
    failed: dict[Path, str] = field(default_factory=dict)
    """why a picture is without a caption, or has only its old one"""
    doubles: dict[Path, Path] = field(default_factory=dict)
    """which are left out, and the pictures of whose names their .txt is"""


class Shown(NamedTuple):
    """A picture to caption."""

    path: Path
    picture: Image.Image
    sha256: str


def caption_folder(
    captions: Captions,
    load: Callable[[], Captioner],
    wording: Wording,
    batch: int = 1,
    max_side: int = 512,
    on_picture: Callable[[Path, str], object] = lambda path, text: None,
) -> Report:
    """Caption what is to be captioned, and write it. load: called where there is anything to do.

    max_side: pixels to which a picture's longer side is scaled down first. on_picture: called with each path, and its
    caption or "". Nothing that was answered is lost, however this ends. UsageError, MemoryShortage, DiskError, and the
    errors of `load`.
    """
    pictures, todo = pictures_in(captions.folder), []
    report = Report(doubles=captions.doubles(pictures))
    for path in pictures:
        if path in report.doubles:
            continue
        try:
            is_done = captions.name_of(path) in captions.done
            if not is_done and wording.existing == "skip" and (old := captions.of(path)):
                captions.adopt(path, old)
                is_done = True
        except FileError as error:  # of a .txt, which is not to be lost, or of a damaged picture
            report.failed[path] = str(error)
            continue
        report.kept += is_done
        todo += [] if is_done else [path]
    captioner = load() if todo else None
    for shown in _ahead([todo[i : i + batch] for i in range(0, len(todo), batch)], max_side, report.failed):
        assert captioner is not None
        for one, answer in zip(shown, _answers(captioner, shown, report.failed), strict=True):
            if text := cleaned(answer):
                text = wording(text, captions.of(one.path) if wording.existing in ("append", "prepend") else "")
                captions.put(one.path, text, one.sha256)
                report.written[one.path] = text
            else:
                report.failed.setdefault(one.path, "the captioner answered nothing")
            on_picture(one.path, text)
    captions.close()
    return report


def _ahead(batches: list[list[Path]], max_side: int, failed: dict[Path, str]) -> Iterator[list[Shown]]:
    """The pictures of each batch; a thread opens those of the next meanwhile. What is damaged is left out and told."""

    def opened(paths: list[Path]) -> list[Shown]:
        found = []
        for path in paths:
            try:
                image, sha256 = open_picture(path)
                found.append(Shown(path, scaled_down(as_rgb(image, path.name), max_side), sha256))
            except FileError as error:
                failed[path] = str(error)
        return found

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(opened, batches[0]) if batches else None
        for following in [*batches[1:], None]:
            if coming is None:
                return
            now = coming.result()
            coming = thread.submit(opened, following) if following else None
            if now:
                yield now


def scaled_down(picture: Image.Image, max_side: int) -> Image.Image:
    """A picture whose longer side is at most so many pixels."""
    scale = max_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture if scale >= 1 else picture.resize((width, height), Image.Resampling.LANCZOS)


def _answers(captioner: Captioner, shown: Sequence[Shown], failed: dict[Path, str]) -> list[str]:
    """An answer for each picture. Where a batch fails its pictures are asked about one by one; "" where one does."""
    try:
        return captioner([one.picture for one in shown], [one.sha256 for one in shown])
    except Exception as error:  # of whatever class: a processor may refuse a picture's shape
        if isinstance(error, FluxError) or is_out_of_memory(error):
            raise
        if len(shown) > 1:
            return [answer for one in shown for answer in _answers(captioner, [one], failed)]
        failed[shown[0].path] = f"the captioner failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
        return [""]
