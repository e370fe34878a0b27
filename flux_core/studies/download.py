"""`download`: the files of a model from the hub or from ModelScope, as they will be loaded, and no others."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from .. import hub
from ..checkpoint.files import HOMES, text_files
from ..checkpoint.source import find_source
from ..errors import DiskError, FileError, UsageError
from ..fields import DOWNLOAD
from ..modelscope import ADDRESS, RemoteFile, Repository, Unreachable
from ..places import TEXT_FILES, TEXT_OF_FLUX, TOKENIZER_FILES, embedded_folder, hub_file
from ..terminal import note, tell
from ..variants import Variant, get_variant

RESERVE = 2**28
"""bytes that stay free beside a download, for everything else on that disk"""
_FIELDS = {field.name: field for field in DOWNLOAD}
_ALL_THERE = "all files are on this disk already, nothing is downloaded"


def download(
    name: str, endpoint: str | None = None, source: str | None = None, output_dir: str | None = None
) -> list[Path]:
    """Fetch transformer, autoencoder and text encoders of that model; their paths, or the folder's, also told.

    source: `hub`, into its cache, or `modelscope`, into the folder `output_dir`, which FLUX_MODEL or --model then
    names. endpoint: the source's address, instead of HF_ENDPOINT's or its own. What is whole on this disk is not
    fetched again, and a cache that has all is not held against the hub: that works without a network. The hub's client
    takes up a broken connection by itself; a run that ended begins its last file anew (huggingface_hub 2.4 keeps no
    part of it). From ModelScope it goes on where it ended. UsageError, AccessError, FileError, or DiskError before
    anything is fetched.
    """
    variant, origin = get_variant(name), _FIELDS["source"].parse(source, "hub")
    if output_dir is not None and origin == "hub":
        raise UsageError(
            "--output-dir goes with --source modelscope: the hub's files go to its cache. "
            f"Next: leave it out, or set {hub.cache_variable()} to move the cache."
        )
    note(variant.licence_line)
    if variant.repo is None:
        folder = embedded_folder(variant)
        tell(f"{name} ships with the package, nothing is to be downloaded: {folder}")
        return [folder]
    if origin == "modelscope":
        return [_from_modelscope(variant, variant.repo, endpoint, output_dir)]
    with hub.settings(HF_ENDPOINT=endpoint):
        paths = _from_hub(replace(variant, variables=()), variant.repo)
    for path in paths:
        tell(str(path))
    return paths


def _from_hub(variant: Variant, repo: str) -> list[Path]:
    """Paths in the cache. What FLUX_MODEL names is none of them, so the variant has no variables."""
    note(f"from {hub.endpoint()} to {hub.cache_folder()}")
    try:
        with hub.without_network():
            paths = _hub_paths(variant, repo)
    except FileError:
        paths = []
    if _whole(paths):
        note(_ALL_THERE)
    else:
        fetched: list[tuple[str, str]] = []
        if not hub.offline():
            free = hub.free_bytes(hub.cache_folder())
            sizes = [(owner, file, size, bool(hub.cached(owner, file))) for owner, file, size in _sizes(variant)]
            fetched = [(owner, file) for owner, file, _, there in sizes if not there]
            rows = [(f"{owner}/{file}", size, there) for owner, file, size, there in sizes]
            missing = sum(size for _, size, there in rows if not there)
            _check_room(rows, missing, hub.cache_folder(), free, f"set {hub.cache_variable()} to a folder")
        paths = _hub_paths(variant, repo)
        for owner, file in fetched:
            _check_sum(owner, file)
    return list(dict.fromkeys(paths))


def _check_sum(repo: str, file: str) -> None:
    """FileError, and the file is gone, if it came with another SHA-256 than the hub has of it.

    The cache names a large file by that sum; the client itself looks at the size alone.
    """
    for path in hub.cached(repo, file):
        blob = path.resolve()
        if not re.fullmatch("[0-9a-f]{64}", blob.name):
            continue  # a small file, or a cache without links
        with blob.open("rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() == blob.name:
                continue
        blob.unlink()
        path.unlink(missing_ok=True)
        raise FileError(
            f"{file} of {repo} came with another sum (SHA-256) than the hub has of it: it was deleted. "
            "Next: run this again; if it comes so again, take another endpoint."
        )


def _hub_paths(variant: Variant, repo: str) -> list[Path]:
    """Transformer, autoencoder, T5, its tokenizer, CLIP and its tokenizer, fetched where they are not there."""
    return [hub_file(repo, variant.flow_file), hub_file(repo, variant.ae_file), *text_files(variant)]


def _whole(paths: Sequence[Path]) -> bool:
    """Whether those six are all there, by the headers of their weights: a folder may lack a shard or more."""
    try:
        flow, ae, t5, t5_tokenizer, clip, clip_tokenizer = paths
        for weights in (flow, ae, t5, clip):
            find_source(weights)
        return all(folder.is_dir() and any(folder.iterdir()) for folder in (t5_tokenizer, clip_tokenizer))
    except (ValueError, FileError):
        return False


def _sizes(variant: Variant) -> list[tuple[str, str, int]]:
    """(repository, file, bytes) of what `resolve` and `text_files` will ask for. Errors as in `hub_file`."""
    assert variant.repo is not None
    files = _listing(variant.repo, [variant.flow_file, variant.ae_file]) + _listing(variant.clip, TEXT_FILES)
    t5 = _listing(variant.t5, TEXT_FILES)
    if not any(file.endswith(".safetensors") for _, file, _ in t5):
        t5 += _listing(variant.repo, TEXT_OF_FLUX)
    return files + t5


def _listing(repo: str, patterns: list[str]) -> list[tuple[str, str, int]]:
    with hub.hub_errors(repo, "the list of files") as access:
        from huggingface_hub import HfApi

        found = HfApi(**access).model_info(repo, files_metadata=True).siblings or []
    # as the client matches them: a * also takes slashes
    wanted = [one for one in found if any(fnmatch(one.rfilename, pattern) for pattern in patterns)]
    return [(repo, one.rfilename, one.size or 0) for one in wanted]


def _from_modelscope(variant: Variant, repo: str, endpoint: str | None, output_dir: str | None) -> Path:
    """The folder with official files and text encoders, by default beside the hub's cache, on whose disk there is room.

    Their own client's cache is another: it takes no file there that it has not written down.
    """
    source = Repository(repo, hub.checked_address(endpoint or "", "--endpoint", ADDRESS))
    folder = Path(output_dir).expanduser() if output_dir else hub.cache_folder().parent / "modelscope" / repo
    folder = folder.absolute()
    note(f"from {source.page} to {folder}")
    try:
        files = _wanted(variant, source)
    except Unreachable:
        parts = [part for home in _text_homes() for part in home]
        if not _whole([folder / part for part in (variant.flow_file, variant.ae_file, *parts)]):
            raise
        files = []
    missing = [source.missing(file, folder) for file in files]
    if any(missing):
        rows = [
            (f"{repo}/{file.path}", file.size, left == 0 < file.size) for file, left in zip(files, missing, strict=True)
        ]
        free = hub.free_bytes(folder, "--output-dir")
        _check_room(rows, sum(missing), folder, free, "name a folder with --output-dir")
    else:
        note(_ALL_THERE)
    for file in sorted(files, key=lambda one: one.size):
        source.fetch(file, folder)
    tell(f"FLUX_MODEL={shlex.quote(str(folder))}")
    return folder


def _text_homes() -> list[tuple[str, str]]:
    """The folders of T5 and its tokenizer, then CLIP's, in the repository of a FLUX.1 model."""
    return [(HOMES[part].folders[0], HOMES[part].tokenizer) for part in ("t5", "clip")]


def _wanted(variant: Variant, source: Repository) -> list[RemoteFile]:
    """What is loaded of the repository: one layout, no pickles. FileError where it lacks a part."""
    needed = [("", [variant.flow_file]), ("", [variant.ae_file])]
    for encoder, tokenizer in _text_homes():
        needed += [(encoder, ["*.safetensors"]), (encoder, ["*.json"]), (tokenizer, TOKENIZER_FILES)]
    files, wanted = [(*file.path.rpartition("/")[::2], file) for file in source.files()], []
    for folder, patterns in needed:
        inside = [(name, file) for parent, name, file in files if parent == folder]
        found = [file for name, file in inside if any(fnmatch(name, pattern) for pattern in patterns)]
        if not found:
            raise FileError(f"{source.page} has no {(folder and folder + '/') + patterns[0]}. Next: take --source hub.")
        wanted += found
    return wanted


def _check_room(rows: Sequence[tuple[str, int, bool]], missing: int, folder: Path, free: int, advice: str) -> None:
    """Tell rows of (file, bytes, is it there), what is missing and what is free; DiskError if that is too little."""
    for file, size, there in rows:
        if size >= 10**6 or there:
            note(f"  {size / 1e9:8.3f} GB  {file}{'  on this disk' if there else ''}")
    note(f"  {missing / 1e9:8.3f} GB  to download; {free / 1e9:.1f} GB free in {folder}")
    if missing and missing + RESERVE > free:
        raise DiskError(
            f"{missing / 1e9:.1f} GB do not fit into {folder}: {free / 1e9:.1f} GB are free. "
            f"Next: make room, or {advice} on a larger disk."
        )
