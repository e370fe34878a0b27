"""A session's folder: which files belong to it, which of them exist, and how the others are written.

`session.json` is the manifest, written whole before anything is drawn. A picture counts as drawn when the first of its
paths exists: its latents are written before it, its other paths and its row in the table after it, and what of these is
missing after a sudden end is made from the picture itself. No torch.
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
from ..request.generation import check_untrusted
from .exploration import Drawn, Exploration, Point
from .record import NAME, append, mend, row_of
from .sharing import claim, end_claims, lock

MANIFEST = "session.json"
FORMAT = 1
"""of the manifest; a manifest with another number is refused"""
MAX_MANIFEST = 16 << 20
"""bytes: 1 MiB of prompts with every character escaped"""
RECORD = ".metadata.lock"
PNG_BYTES, LATENT_BYTES = 1.5, 1
"""for each pixel of a picture, about; latents are 16 numbers of up to 4 bytes for 64 pixels"""
PATIENCE = 90
"""seconds to wait until a network folder shows what another machine wrote"""
PICTURE, LATENTS = ".png", ".safetensors"


class Session:
    """The files of an exploration."""

    def __init__(self, folder: Path, exploration: Exploration) -> None:
        self.folder, self.exploration = folder, exploration
        self.numbers = {point: number for number, point in enumerate(exploration.places)}

    def path(self, stem: str, suffix: str = PICTURE) -> Path:
        return self.folder / (stem + suffix)  # not `with_suffix`: "guidance_3.5" would lose its 5

    def first(self, point: Point) -> Path:
        return self.path(self.exploration.places[point][0])

    def there(self) -> set[Point]:
        return {point for point in self.exploration.places if self.first(point).is_file()}

    def begin(self) -> None:
        """Write the manifest, make all folders, and mend what an earlier end left, before other processes join.

        DiskError, also where the pictures would not fit.
        """
        if not (self.folder / MANIFEST).is_file():
            write_whole(self.folder / MANIFEST, self.exploration.text())
        for folder in (self.folder, *(self.folder / view.folder for view in self.exploration.views)):
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
                for temporary in folder.glob(".flux_core.*.tmp"):
                    temporary.unlink()
        self.mend()
        size, free = self._bytes_missing(), shutil.disk_usage(self.folder).free
        if size > free:
            raise DiskError(
                f"{self.folder}: the pictures take about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
                "Next: make room, or begin in another folder with --output-dir"
            )

    def _bytes_missing(self) -> float:
        """Bytes that are still to be written, about."""
        there, request = self.there(), self.exploration.request_of(next(iter(self.numbers)))
        missing = [point for point in self.exploration.places if point not in there]
        latents = {None: 0, "last": len(missing), "every": sum(point.steps for point in missing)}
        per_pixel = len(missing) * PNG_BYTES + latents[self.exploration.save_latents] * LATENT_BYTES
        return per_pixel * request.width * request.height

    def mend(self) -> None:
        """Make the missing other paths and rows of every picture that exists."""
        with self.recording():
            for point, (first, *others) in self.exploration.places.items():
                for suffix in (LATENTS, PICTURE) if self.first(point).is_file() else ():
                    for other in others:
                        if self.path(first, suffix).is_file() and not self.path(other, suffix).is_file():
                            _link(self.path(first, suffix), self.path(other, suffix))
            if self.exploration.metadata:
                mend(self.folder, [stems[0] + PICTURE for stems in self.exploration.places.values()])

    def recording(self) -> AbstractContextManager[None]:
        """The lock under which the folder's record is changed."""
        return lock(self.folder / RECORD)

    def settle(self, now: Drawn) -> None:
        """Write dtypes and weights into the manifest, or compare them with those in it: UsageError if they differ."""
        with self.recording():
            then = read_manifest(self.folder).drawn
            if then is None:
                self.exploration = self.exploration.model_copy(update={"drawn": now})
                write_whole(self.folder / MANIFEST, self.exploration.text())
            elif then != (now if then.t5_dtype else now.model_copy(update={"t5_dtype": None})):
                raise UsageError(
                    f"{self.folder} was begun with {then.dtype}, T5 in {then.t5_dtype}, {then.attention} attention and "
                    f"{then.weights}, these are {now.dtype}, {now.t5_dtype}, {now.attention} and {now.weights}. "
                    "Next: give the same files (--model, --ae, …) and --attention, or begin another session"
                )

    def claim(self, point: Point) -> AbstractContextManager[bool]:
        """Reserve a picture for this process while the block runs. False: another process is drawing it."""
        return claim(self.folder, str(self.numbers[point]))

    def keep(self, point: Point, picture: bytes, latents: bytes | None) -> None:
        """Write a picture to all its paths, then its row. After a DiskError the picture is missing or whole."""
        first, *others = self.exploration.places[point]
        with self.recording():  # so that no other process finds the picture without its row
            for suffix, data in ((LATENTS, latents), (PICTURE, picture)):
                if data is not None:
                    write_whole(self.path(first, suffix), data)
                    for other in others:
                        _link(self.path(first, suffix), self.path(other, suffix))
            if self.exploration.metadata:
                append(self.folder / NAME, row_of(self.folder, first + PICTURE))

    def end(self) -> None:
        """Make what is missing beside the pictures, and remove the claims."""
        self.mend()
        end_claims(self.folder)


def _link(path: Path, other: Path) -> None:
    """Hard-link a file to another name; copy it where there are no hard links, or where the name is taken."""
    try:
        os.link(path, other)
    except OSError:
        write_whole(other, path.read_bytes())


def new_folder(parent: Path, now: float | None = None) -> Path:
    """Make a folder named by the time. Where the name is taken (a second session in that second), a number is added."""
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
    """A folder's manifest. FileError when there is none, UsageError with the line when it is damaged or not ours."""
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
    key = "plan"
    try:
        check_untrusted(session.request)
        key = "request"
        for point in session.places:
            session.request_of(point)
    except (UsageError, TypeError) as error:
        raise UsageError(f"{path}, line {_line(path, key)}: {error}") from None
    return session


def _line(path: Path, key: str) -> int:
    """The number of the first line that has a key, for an error message."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((number for number, line in enumerate(lines, 1) if json.dumps(key) in line), 1)


def wait_for_manifest(folder: Path) -> Exploration:
    """The manifest, as soon as another process, maybe on another machine, has written it."""
    deadline = time.monotonic() + PATIENCE
    while not (folder / MANIFEST).is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    return read_manifest(folder)
