"""Download the hub's large files into its client's cache, resuming where an earlier run ended.

The client resumes a broken connection, but deletes its partial file at the end of a run (huggingface_hub 2.4), and a
file of 24 GB would begin anew. Here a file is written under its sum and `.part`, checked against that sum when it is
complete, and then moved to where the client finds it and only links it. Requests, redirects and bar are the client's.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import FileError, FluxError
from ..terminal import note
from .client import cache_folder, cached, hub_errors, repo_folder

LARGE = 2**30
"""bytes from which checking a sum is announced, as it takes long"""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository. `sha256` is empty for a small file: the hub keeps those in git, by another sum."""

    repo: str
    name: str
    size: int
    sha256: str

    def missing(self) -> int:
        """Bytes still to be downloaded."""
        if cached(self.repo, self.name) or _twins(self):
            return 0
        have = _size(_part(self))
        return self.size - (have if have <= self.size else 0)


def listing(repo: str, patterns: list[str]) -> list[HubFile]:
    """The repository's files of these patterns. AccessError or FileError."""
    with hub_errors(repo, "the list of files") as access:
        from huggingface_hub import HfApi

        found = HfApi(**access).model_info(repo, files_metadata=True).siblings or []
    # as the client matches them: a * also takes slashes
    files = [file for file in found if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    return [HubFile(repo, file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "") for file in files]


def fetch_all(repo: str, patterns: list[str]) -> None:
    """`fetch` the large files of these patterns, if the cache has none of them yet, or a partial file.

    Otherwise the list is not requested: the cache may be enough for the client, without network.
    """
    begun = any(repo_folder(repo).glob("blobs/*.part"))
    if begun or not any(cached(repo, pattern) for pattern in patterns):
        files: list[HubFile] = []
        with suppress(FluxError):  # the client gets the same error, and the cache may be enough
            files = listing(repo, patterns)
        for file in files:
            if file.sha256:
                fetch(repo, file.name)


def fetch(repo: str, name: str) -> None:
    """Download a large file that the cache lacks, from the byte on where an earlier run ended.

    Small files are left to the client, and those for which the hub gives no answer: the client tries again.
    AccessError, FileError or DiskError.
    """
    if cached(repo, name):
        return
    with hub_errors(repo, name) as access:
        if found := _large_file(repo, name, access):
            _download(*found, access)


def _large_file(repo: str, name: str, access: dict[str, Any]) -> tuple[HubFile, str] | None:
    """The file and its commit, as the hub has them; None for a small file, and where the hub gives no answer."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        head = get_hf_file_metadata(hf_hub_url(repo, name, endpoint=access["endpoint"]), **access)
    except Exception:  # whatever the transport raises
        return None
    if head.size is None or head.commit_hash is None or not _SHA256.fullmatch(head.etag or ""):
        return None
    return HubFile(repo, name, head.size, str(head.etag)), head.commit_hash


def _download(file: HubFile, commit: str, access: dict[str, Any]) -> None:
    """Download a file to where the client looks for it, under the client's own lock."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import are_symlinks_supported
    from huggingface_hub.utils import WeakFileLock

    part, home = _part(file), repo_folder(file.repo)
    # where there are no links, the client would copy a blob that it finds
    blobs = are_symlinks_supported(cache_folder())
    target = part.with_suffix("") if blobs else home / "snapshots" / commit / file.name
    lock = home.parent / ".locks" / home.name / f"{file.sha256}.lock"
    if not Path(os.path.abspath(target)).is_relative_to(os.path.abspath(home)):
        return  # a name that leads elsewhere, which the client refuses
    for path in (part, target, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if target.exists() or _link_twin(target, file):
            part.unlink(missing_ok=True)
            return
        _fill(part, file, hf_hub_url(file.repo, file.name, revision=commit, endpoint=access["endpoint"]), access)
        _check_sum(part, file)
        part.replace(target)


def _fill(part: Path, file: HubFile, url: str, access: dict[str, Any]) -> None:
    """Download what the part lacks. Where the hub redirects to another host, the client does not send the token."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if _size(part) > file.size:
        part.unlink()
    headers = build_hf_headers(token=access["token"]) | {"Accept-Encoding": "identity"}  # ranges are of plain bytes
    with part.open("ab") as out:
        have = out.tell()
        http_get(url, out, resume_size=have, headers=headers, expected_size=file.size, displayed_filename=file.name)
        out.flush()
        os.fsync(out.fileno())


def _check_sum(part: Path, file: HubFile) -> None:
    """FileError if the part has another sum than the hub lists; the part is deleted."""
    if file_sha256(part, file.name) != file.sha256:
        part.unlink()
        raise FileError(
            f"{file.name} of {file.repo} came with another sum (SHA-256) than the hub has of it: it was deleted. "
            "Next: run this again; if it comes so again, take another endpoint."
        )


def file_sha256(path: Path, name: str) -> str:
    """The SHA-256 in hex digits. For a large file a line on stderr announces it, by that name."""
    if path.stat().st_size >= LARGE:
        note(f"checking the sum of {name}")
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _link_twin(target: Path, file: HubFile) -> bool:
    """Link a file with the same bytes from another repository's cache (dev and schnell share T5), if there is any."""
    for twin in _twins(file):
        with suppress(OSError):  # a disk without hard links
            if file_sha256(twin, file.name) == file.sha256:
                os.link(twin.resolve(), target)
                return True
    return False


def _twins(file: HubFile) -> list[Path]:
    found = cache_folder().glob(f"models--*/blobs/{file.sha256}") if file.sha256 else []
    return [path for path in found if _size(path) == file.size]


def _part(file: HubFile) -> Path:
    return repo_folder(file.repo) / "blobs" / f"{file.sha256}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
