"""Where LoRA files and ControlNets are: by path, by hub id, and a LoRA by the hash in a picture's record. No torch.

A record names a file and its hash, never a folder. So that a picture can be repeated without naming its LoRAs again,
the paths that the user gave are remembered by their hashes, in `flux_core/loras.json` beside the hub's cache; so files
are hashed once, ControlNets as well. No path from a record or from anybody else's file is opened.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.source import SUFFIXES, file_in
from ..errors import DiskError, FileError, UsageError
from ..files import user_path, write_whole
from ..hooks import Lora
from ..hub.client import cache_folder, cached, offline
from ..hub.places import hub_file, hub_listing
from ..params import FluxParams
from ..terminal import one_line
from .file import FILE_NAMES, check_drawable, check_matched, read_lora

CHUNK = 1 << 22
"""bytes hashed at a time"""
REMEMBERED = 500
"""files, the latest"""
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+\.(?:safetensors|sft)))?")


class Sought(NamedTuple):
    """What the user means by a text: its flag, a noun, and the names of the file to use in a folder of several."""

    flag: str
    noun: str
    names: tuple[str, ...]


LORA = Sought("--lora", "the LoRA", FILE_NAMES)
CONTROLNET = Sought("--controlnet", "the ControlNet", ("diffusion_pytorch_model",))
_NAMED: dict[str, "Known"] = {}
"""the files that this process was given, by path, the latest last: where nothing can be written they are known all the
same"""


@dataclass(frozen=True)
class Known:
    """A file that the user named, and what it is known by."""

    path: str
    size: int
    changed: int
    """of the file, when it was hashed: nanoseconds"""
    sha256: str
    autov3: str
    """the first twelve digits of the SHA-256 of its bytes behind the header, as other tools compute it"""

    @property
    def is_there(self) -> bool:
        """Whether the file is where it was, unchanged since."""
        with suppress(OSError, ValueError, TypeError):
            found = os.stat(self.path)
            return (found.st_size, found.st_mtime_ns) == (self.size, self.changed)
        return False

    @property
    def is_same(self) -> bool:
        """Whether its path has the bytes of then, maybe with a new date."""
        with suppress(OSError, ValueError, TypeError, FileError):
            found = os.stat(self.path)
            return found.st_size == self.size and _hashed(Path(self.path), found).sha256 == self.sha256
        return False


def locate(text: str, sought: Sought = LORA) -> Path:
    """The file that the user means: a path, a folder of a trainer or of diffusers, or a hub id, as `owner/name` or with
    a file behind it.

    UsageError for a link, FileError, AccessError or DiskError.
    """
    if re.match("https?://", text, re.IGNORECASE):
        raise UsageError(
            f"{text[:200]} is a link, and links are not fetched. Next: download the file and name it, or give its id "
            f"on the hub, as in {sought.flag} owner/name/file.safetensors"
        )
    path = user_path(text)
    hub = _HUB.fullmatch(text)
    if path.exists() or path.is_symlink() or hub is None or text.startswith(("./", "../")):
        return file_in(path, sought.names)
    repo, file = hub["repo"], hub["file"]
    if file is None and text.endswith(SUFFIXES):
        return path  # folder/file.safetensors, which does not exist
    return hub_file(repo, file or _file_of(repo, sought))


def _file_of(repo: str, sought: Sought) -> str:
    """What is sought in a hub repository. FileError where it is not clear which file that is."""
    here = {path.name for suffix in SUFFIXES for path in cached(repo, f"*{suffix}")} if offline() else ()
    files = sorted(here) or [name for name in hub_listing(repo, sought.noun) if name.endswith(SUFFIXES)]
    named = [name for want in sought.names for name in files if Path(name).stem == want]
    if named or len(files) == 1:
        return (named or files)[0]
    listed = ", ".join(files[:5]) or "none"
    raise FileError(
        f"{repo} on the hub holds {len(files)} safetensors files ({listed}). Next: name one, as in {sought.flag} "
        f"{repo}/FILE"
    )


def remember(path: Path) -> Known:
    """What a file is known by; kept for `recall`. FileError."""
    try:
        found = path.stat()
    except OSError as error:
        raise FileError(f"{path} could not be read: {error.strerror}.") from None
    path = path.parent.resolve() / path.name  # not the file itself: the hub's are links to other names
    entries = _read()
    old = next((x for x in (*_NAMED.values(), *entries) if x.path == str(path)), None)
    known = old if old is not None and old.is_there else _hashed(path, found)
    _NAMED.pop(known.path, None)
    _NAMED[known.path] = known
    if not entries or entries[-1] != known:
        _write([*(x for x in entries if x.path != known.path), known])
    return known


def recall(sha256: str, name: str = "") -> Path | None:
    """The path of a file with that hash which the user named before, if it is still there: one of that name, or else
    the latest."""
    known = [x for x in (*reversed(_NAMED.values()), *reversed(_read())) if x.sha256 == sha256]
    known.sort(key=lambda x: Path(str(x.path)).name != name)
    return next((Path(x.path) for x in known if x.is_there or x.is_same), None)


def find_recorded(name: str, sha256: str, given: Iterable[Path] = ()) -> Path:
    """The file of a record: among those that the user gives, or remembered. FileError asks for it by its hash."""
    others = []
    for path in given:
        if (found := remember(path).sha256) == sha256:
            return path
        others.append(f"{path} has another, {found[:16]}…")
    if (there := recall(sha256, name)) is not None:
        return there
    raise FileError(
        f"that picture was drawn with the LoRA {one_line(name)}, SHA-256 {sha256[:16]}…; "
        f"{', '.join(others) or 'no file with this hash is known here: it was moved, changed, or never given'}. "
        "Next: say where it is, with --lora FILE"
    )


def record_of(entry: Lora) -> Lora:
    """An entry of a plan as pictures carry it: with the file's own name and its hashes. A record is returned unchanged.

    FileError; UsageError for a record that names a folder.
    """
    if entry.portable:
        return entry
    if entry.sha256 is not None:
        raise UsageError(f"{entry.file[:60]!a} names a folder; a record of a LoRA has only the file's own name")
    return record(remember(locate(entry.file)), entry)


def checked(entry: Lora, params: FluxParams) -> Lora:
    """`record_of` an entry, once its file's header has been compared with the model. FileError, UsageError."""
    path = find_recorded(entry.file, entry.sha256) if entry.sha256 is not None else locate(entry.file)
    file = read_lora(path, params)
    check_drawable(file, params)
    check_matched(file, entry.partial)
    return record_of(entry)


def record(known: Known, entry: Lora) -> Lora:
    """An entry of a plan for a known file, as pictures carry it."""
    return entry.model_copy(update={"file": Path(known.path).name, "sha256": known.sha256, "autov3": known.autov3})


def _hashed(path: Path, found: os.stat_result) -> Known:
    whole, data = hashlib.sha256(), hashlib.sha256()
    try:
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), 1 << 27))
            whole.update(head)
            while chunk := file.read(CHUNK):
                whole.update(chunk)
                data.update(chunk)
    except OSError as error:
        raise FileError(f"{path} could not be read: {error.strerror}.") from None
    return Known(str(path), found.st_size, found.st_mtime_ns, whole.hexdigest(), data.hexdigest()[:12])


def _place() -> Path:
    return cache_folder().parent / "flux_core" / "loras.json"


def _read() -> list[Known]:
    """The remembered files, the latest last; none where they cannot be read."""
    with suppress(OSError, ValueError, TypeError, AttributeError, UsageError, RecursionError):
        return [Known(**entry) for entry in json.loads(_place().read_bytes())]
    return []


def _write(entries: list[Known]) -> None:
    """Keep the latest entries. Where there is no place for them, records have to be found with --lora."""
    with suppress(OSError, DiskError, UsageError):
        place = _place()
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps([asdict(entry) for entry in entries[-REMEMBERED:]], indent=1) + "\n")
