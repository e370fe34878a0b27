"""Download from ModelScope where the hub cannot be reached: the same repositories, by the standard library's HTTP.

Two addresses, as ModelScope's own client has them: `/api/v1/models/OWNER/NAME/repo/files` lists the files with their
sizes and sums, and `/models/OWNER/NAME/resolve/master/PATH` gives a file, or redirects to a content network. No token
is ever sent: the repositories are open there, and urllib, unlike the hub's transports, reads no login and no .netrc.
"""

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PureWindowsPath
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote

from tqdm import tqdm

from ..errors import AccessError, DiskError, FileError, FluxError
from ..terminal import no_bars
from ..version import __version__
from .client import DISK, offline
from .parts import file_sha256

ADDRESS = "https://modelscope.cn"
LISTING = "the list of files"
TIMEOUT = 60.0
"""seconds without a byte after which a connection counts as cut"""
TRIES, PAUSE = 5, 1.0
"""how often a download is resumed without much progress, and the seconds before each time"""
MUCH = 2**24
"""bytes of progress that reset the tries: a long download may be cut more than five times"""
CHUNK = 2**20
MAX_LISTING = 2**24


class Unreachable(FileError):
    """ModelScope cannot be reached from here, or the network is forbidden."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the repository lists it. `path` leads into its folder only; `sha256` is empty if none is listed."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Repository:
    """A model's repository. Errors are FileError, AccessError or DiskError."""

    name: str
    address: str = ADDRESS

    @property
    def page(self) -> str:
        return f"{self.address}/models/{self.name}"

    def files(self) -> list[RemoteFile]:
        """All files, by their paths. FileError where one of them would lead out of its folder."""
        url = f"{self.address}/api/v1/models/{self.name}/repo/files?Revision=master&Recursive=true"
        try:
            with self._open(url, LISTING) as answer:
                rows = json.loads(answer.read(MAX_LISTING))["Data"]["Files"]
            found = [
                RemoteFile(str(row["Path"]), int(row["Size"]), str(row.get("Sha256") or "").lower())
                for row in rows
                if row.get("Type") != "tree"
            ]
        except (OSError, HTTPException) as error:
            raise self._unreachable(LISTING, error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(
                f"{self.address} answered with something else than the list of files of {self.name}. "
                "Next: check the address, or try again later."
            ) from error
        for file in found:
            _check_path(file, self)
        return sorted(found, key=lambda file: file.path)

    def missing(self, file: RemoteFile, folder: Path) -> int:
        """Bytes that `fetch` will download. FileError if another file is in its place."""
        target, part = _places(file, folder)
        with _disk_errors(target):
            if not target.exists():
                there = part.stat().st_size if part.exists() else 0
                return file.size - (there if there <= file.size else 0)
            if (size := target.stat().st_size) == file.size:
                return 0
        raise FileError(
            f"{target} has {size:,} bytes, and that of {self.name} has {file.size:,}: it is left as it is. "
            "Next: move it away, or name another folder with --output-dir."
        )

    def fetch(self, file: RemoteFile, folder: Path) -> Path:
        """Download the file into that folder; its path. Until it is complete and its sum is right, it ends in .part.

        A part that a cut connection or a stopped run left is continued at the byte where it broke.
        """
        target, part = _places(file, folder)
        self.missing(file, folder)
        with _disk_errors(target):
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fill(part, file)
                self._check_sum(part, file)
                part.replace(target)
        return target

    def _fill(self, part: Path, file: RemoteFile) -> None:
        """Download the bytes that the part lacks. FileError after `TRIES` tries with less than `MUCH` progress."""
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        with part.open("ab") as out, _bar(file, out.tell()) as bar:
            have = most = out.tell()
            left = TRIES
            broke: Exception | None = None
            while have < file.size:
                have, error = self._append(file, out, have, bar)
                broke = error or broke
                if have < file.size:
                    left = TRIES if have - most >= MUCH else left - 1
                    most = max(most, have)
                    if left == 0:
                        raise FileError(
                            f"the connection to {self.address} was cut while {file.path} of {self.name} was "
                            "downloaded. Next: run this again; it goes on at the byte where it broke."
                        ) from broke
                    time.sleep(PAUSE)
            out.flush()
            os.fsync(out.fileno())

    def _append(self, file: RemoteFile, out: BinaryIO, have: int, bar: "tqdm[None]") -> tuple[int, Exception | None]:
        """Append the bytes from `have` on, as far as one answer goes: the bytes there now, and what cut it off."""
        try:
            with self._open(f"{self.page}/resolve/master/{quote(file.path)}", file.path, have) as answer:
                if have and answer.status != 206:  # it begins anew, whatever was asked
                    have = bar.n = out.truncate(0)
                # read1 gives what is there: read would lose up to a CHUNK of it when the connection breaks
                while have < file.size and (data := answer.read1(min(CHUNK, file.size - have))):
                    have += out.write(data)
                    bar.update(len(data))
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            return have, error
        return have, None

    def _check_sum(self, part: Path, file: RemoteFile) -> None:
        """FileError if a part has another sum than the list says; the part is deleted."""
        if not file.sha256:
            return
        if (found := file_sha256(part, file.path)) != file.sha256:
            part.unlink()
            raise FileError(
                f"{file.path} of {self.name} came with the sum {found[:16]}… (SHA-256), the list has "
                f"{file.sha256[:16]}…: it was deleted. Next: run this again; if it comes so again, take --source hub."
            )

    def _open(self, url: str, what: str, start: int = 0) -> HTTPResponse:
        """The response, from that byte on where the server can. FluxErrors for its refusals; transport errors pass."""
        if offline():
            raise self._unreachable(what, "HF_HUB_OFFLINE is set")
        headers = {"User-Agent": f"flux_core/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            answer: HTTPResponse = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
            return answer
        except HTTPError as error:
            error.close()
            raise self._refused(error.code, what) from error

    def _refused(self, status: int, what: str) -> FluxError:
        if status in (401, 403):
            return AccessError(
                f"{self.address} closes {what} of {self.name} to visitors without a login (HTTP {status}). Next: take "
                "--source hub, or fetch the folder with ModelScope's own tool and point FLUX_MODEL to it."
            )
        if status == 404:
            lacking = f"repository {self.name}" if what == LISTING else f"{what} in {self.name}"
            return FileError(f"{self.address} has no {lacking}. Next: look at {self.page}/files, or take --source hub.")
        reason, pause = "", "try again later"
        if status == 429:
            reason, pause = ": too many requests from here", "wait five minutes and run this again"
        return FileError(
            f"{self.address} answered {status} for {what} of {self.name}{reason}. Next: {pause}; what has come is kept."
        )

    def _unreachable(self, what: str, reason: object) -> Unreachable:
        detail = (str(getattr(reason, "reason", reason)).splitlines() or [""])[0][:200]
        first = "unset HF_HUB_OFFLINE" if offline() else "connect"
        return Unreachable(
            f"{self.address} could not be reached for {what} of {self.name} ({detail}). "
            f"Next: {first} and run this again, or take --source hub."
        )


def _check_path(file: RemoteFile, repository: Repository) -> None:
    path = PureWindowsPath(file.path)  # which splits at both kinds of slashes
    if path.drive or path.root or ".." in path.parts or not path.name or "\0" in file.path or file.size < 0:
        raise FileError(
            f"the list of files of {repository.name} at {repository.address} names {file.path[:80]!a}, which is not a "
            "file in its folder: nothing is fetched. Next: take --source hub."
        )


def _places(file: RemoteFile, folder: Path) -> tuple[Path, Path]:
    """The file's path, and that of its part."""
    target = folder / file.path
    return target, target.with_name(target.name + ".part")


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """A context in which errors of a full, read-only or forbidden disk become DiskErrors."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{target} could not be written: {error.strerror or error}. Next: make room there and run this again (what "
            "has come is kept), or name another folder with --output-dir."
        ) from error


def _bar(file: RemoteFile, have: int) -> "tqdm[None]":
    return tqdm(total=file.size, initial=have, desc=file.path, unit="B", unit_scale=True, disable=no_bars())
