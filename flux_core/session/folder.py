"""A session's folder: what belongs into it, what of it is there, and how the rest gets there.

`session.json` is the manifest, written whole before anything is drawn. A picture is there when its first place is: its
latents come before it, its other places and its row in the table behind it, and what of that a sudden end left out is
made up for from the picture itself. No torch.
"""

import json
import os
import shutil
import time
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from ..errors import DiskError, FileError, UsageError
from ..files import disk_errors, write_whole
from ..jsonfile import first_finding, read_json
from .exploration import Drawn, Exploration, Point
from .record import NAME, append, mend, row_of
from .sharing import lock_file, try_lock

MANIFEST = "session.json"
FORMAT = 1
"""of the manifest; one with another number is left alone"""
MAX_MANIFEST = 16 << 20
"""bytes: 1 MiB of prompts with every character escaped"""
CLAIMS, RECORD = ".claims", ".metadata.lock"
PNG_BYTES, LATENT_BYTES = 1.5, 1
"""for each pixel of a picture, about; latents are 16 numbers of up to 4 bytes for 64 pixels"""
PATIENCE = 90
"""seconds until a network's folder shows what another machine wrote"""
PICTURE, LATENTS = ".png", ".safetensors"


class Session:
    """The files of an exploration."""

    def __init__(self, folder: Path, asked: Exploration) -> None:
        self.folder, self.asked = folder, asked
        self.numbers = {point: number for number, point in enumerate(asked.places)}

    def path(self, stem: str, suffix: str = PICTURE) -> Path:
        return self.folder / (stem + suffix)  # not `with_suffix`: "guidance_3.5" would lose its 5

    def first(self, point: Point) -> Path:
        return self.path(self.asked.places[point][0])

    def there(self) -> set[Point]:
        return {point for point in self.asked.places if self.first(point).is_file()}

    def begin(self) -> None:
        """Make the folder what it should be, but for what is to be drawn. Nobody else may be in it yet.

        DiskError, also where the pictures would not fit.
        """
        if not (self.folder / MANIFEST).is_file():
            write_whole(self.folder / MANIFEST, self.asked.text())
        for one in (self.folder, *(self.folder / view.folder for view in self.asked.views)):
            with disk_errors(one):
                one.mkdir(exist_ok=True)
                for left in one.glob(".flux_core.*.tmp"):
                    left.unlink()
        self.mend()
        size, free = self._bytes_missing(), shutil.disk_usage(self.folder).free
        if size > free:
            raise DiskError(
                f"{self.folder}: the pictures take about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
                "Next: make room, or begin in another folder with --output-dir"
            )

    def _bytes_missing(self) -> float:
        """About how much is still to be written."""
        there, request = self.there(), self.asked.request_of(next(iter(self.numbers)))
        missing = [point for point in self.asked.places if point not in there]
        latents = {None: 0, "last": len(missing), "every": sum(point.steps for point in missing)}
        per_pixel = len(missing) * PNG_BYTES + latents[self.asked.save_latents] * LATENT_BYTES
        return per_pixel * request.width * request.height

    def mend(self) -> None:
        """Other places and rows of every picture that is there."""
        with self.recording():
            for point, (first, *others) in self.asked.places.items():
                for suffix in (LATENTS, PICTURE) if self.first(point).is_file() else ():
                    for other in others:
                        if self.path(first, suffix).is_file() and not self.path(other, suffix).is_file():
                            _link(self.path(first, suffix), self.path(other, suffix))
            if self.asked.metadata:
                mend(self.folder, [stems[0] + PICTURE for stems in self.asked.places.values()])

    def recording(self) -> AbstractContextManager[None]:
        """One process at a time writes what others read."""
        return lock_file(self.folder / RECORD)

    def settle(self, now: Drawn) -> None:
        """Write down what the pictures are drawn with, or find it to be what they were begun with. UsageError."""
        with self.recording():
            then = read_manifest(self.folder).drawn
            if then is None:
                self.asked = self.asked.model_copy(update={"drawn": now})
                write_whole(self.folder / MANIFEST, self.asked.text())
            elif then != now:
                raise UsageError(
                    f"{self.folder} was begun with {then.dtype} and {then.weights}, these are {now.dtype} and "
                    f"{now.weights}. Next: give the same files (--model, --ae, …), or begin another session"
                )

    def claim(self, point: Point) -> AbstractContextManager[bool]:
        """Whether the picture is ours to draw while the block runs: nobody else is at it."""
        folder = self.folder / CLAIMS
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return try_lock(folder / f"{self.numbers[point]}.lock")

    def keep(self, point: Point, picture: bytes, latents: bytes | None) -> None:
        """Write a picture to its places, and its row behind it. DiskError; then it is missing, or there."""
        first, *others = self.asked.places[point]
        with self.recording():  # whoever mends the table sees no picture before its row
            for suffix, data in ((LATENTS, latents), (PICTURE, picture)):
                if data is not None:
                    write_whole(self.path(first, suffix), data)
                    for other in others:
                        _link(self.path(first, suffix), self.path(other, suffix))
            if self.asked.metadata:
                append(self.folder / NAME, row_of(self.folder, first + PICTURE))

    def end(self) -> None:
        """Everything in order, and nothing left that only the work needed."""
        self.mend()
        shutil.rmtree(self.folder / CLAIMS, ignore_errors=True)


def _link(path: Path, other: Path) -> None:
    """The same file under another name; a copy where there are no hard links, or where something has the name."""
    try:
        os.link(path, other)
    except OSError:
        write_whole(other, path.read_bytes())


def new_folder(parent: Path, now: float | None = None) -> Path:
    """A folder named by the time, and nobody else's: two in one second, or a clock that goes back, count on."""
    stem = time.strftime("exploration_%Y-%m-%d_%H-%M-%S", time.localtime(now))
    for number in count():
        folder = parent / (f"{stem}_{number}" if number else stem)
        with disk_errors(folder):
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    raise AssertionError("count() does not end")


def read_manifest(folder: Path) -> Exploration:
    """A folder's manifest. FileError when it has none, UsageError with the line when it is damaged or another's."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileError(f"{folder} holds no {MANIFEST}, so it is no session's folder: give the one to go on with")
    found = read_json(path, "the session", MAX_MANIFEST)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        other = f"format {found.get('format')!a:.40}" if isinstance(found, dict) else "no session at all"
        raise UsageError(f"{path}, line {_line(path, 'format')}: {other}, this version reads format {FORMAT}")
    try:
        session = Exploration(**found)
    except ValidationError as error:
        first = first_finding(error)
        key = str(first["loc"][0]) if first["loc"] else "prompts"
        raise UsageError(f"{path}, line {_line(path, key)}: {key}: {first['msg']}") from None
    try:
        requests = [session.request_of(point) for point in session.places]
    except (UsageError, TypeError) as error:
        raise UsageError(f"{path}, line {_line(path, 'request')}: {error}") from None
    if any(not one.portable for one in requests[0].plan):
        raise UsageError(f"{path}, line {_line(path, 'plan')}: a file cannot make us read or write others")
    return session


def _line(path: Path, key: str) -> int:
    """Where a key stands, for people."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((number for number, line in enumerate(lines, 1) if json.dumps(key) in line), 1)


def wait_for_manifest(folder: Path) -> Exploration:
    """The manifest that another process wrote, maybe on another machine."""
    deadline = time.monotonic() + PATIENCE
    while not (folder / MANIFEST).is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    return read_manifest(folder)
