"""`download`: fetch the files of a model that will be loaded, and no others, from the hub or from ModelScope."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from ..checkpoint.files import PARTS, check_ships, text_files
from ..checkpoint.source import find_source
from ..errors import DiskError, FileError, UsageError
from ..files import user_path
from ..hub import client as hub
from ..hub.modelscope import ADDRESS, RemoteFile, Repository, Unreachable
from ..hub.parts import HubFile, fetch, listing
from ..hub.places import (
    NETWORK_FILES,
    TEXT_FILES,
    TEXT_OF_FLUX,
    TOKENIZER_FILES,
    embedded_folder,
    hub_file,
    hub_folder,
    shipped_folder,
)
from ..terminal import note, tell
from ..variants import DEFAULT, Variant, get_variant
from .table import DOWNLOAD

RESERVE = 2**28
"""bytes that a download leaves free on the disk"""
_FIELDS = {field.name: field for field in DOWNLOAD}
_ALL_THERE = "all files are on this disk already, nothing is downloaded"


def download(
    name: str = DEFAULT, endpoint: str | None = None, source: str | None = None, output_dir: str | None = None
) -> list[Path]:
    """Fetch a model's transformer, autoencoder and text encoders. Returns and prints their paths, or the folder's.

    source: `hub`, into its cache, or `modelscope`, into the folder `output_dir`, for FLUX_MODEL or --model. endpoint:
    the source's address, instead of HF_ENDPOINT's or its own. Files that are whole on this disk are not fetched again;
    if all are in the cache, no network is needed. A run that was stopped is continued by the next run. UsageError,
    AccessError, FileError, or DiskError before anything is fetched.
    """
    variant, origin = get_variant(name), _FIELDS["source"].parse(source, "hub")
    if output_dir is not None and origin == "hub":
        raise UsageError(
            "--output-dir goes with --source modelscope: the hub's files go to its cache. "
            f"Next: leave it out, or set {hub.cache_variable()} to move the cache."
        )
    check_ships(variant)
    note(variant.licence_line)
    if variant.repo is None:
        folders = [embedded_folder(variant), *([shipped_folder(variant.name)] if variant.base else [])]
        tell(f"{name} ships with the package, nothing is to be downloaded: {' and '.join(map(str, folders))}")
        return folders
    if origin == "modelscope" and variant.adapter is not None:
        raise UsageError(f"{name} takes {variant.adapter.file} of another repository. Next: take --source hub.")
    if origin == "modelscope":
        return [_from_modelscope(variant, variant.repo, endpoint, output_dir)]
    with hub.settings(HF_ENDPOINT=endpoint):
        paths = _from_hub(replace(variant, variables=()), variant.repo)
    for path in paths:
        tell(str(path))
    return paths


def _from_hub(variant: Variant, repo: str) -> list[Path]:
    """Paths in the cache, after fetching what is missing. variant: without variables, so that FLUX_MODEL is ignored."""
    note(f"from {hub.endpoint()} to {hub.cache_folder()}")
    try:
        with hub.without_network():
            paths = _hub_paths(variant, repo)
    except FileError:
        paths = []
    if _whole(paths):
        note(_ALL_THERE)
    else:
        if not hub.offline():
            free = hub.free_bytes(hub.cache_folder())
            files = _listed(variant)
            sizes = [(f"{file.repo}/{file.name}", file.size, file.missing()) for file in files]
            _check_room(sizes, hub.cache_folder(), free, f"set {hub.cache_variable()} to a folder")
            for file in files:
                if file.sha256:
                    fetch(file.repo, file.name)
        paths = _hub_paths(variant, repo)
    return list(dict.fromkeys(paths))


def _hub_paths(variant: Variant, repo: str) -> list[Path]:
    """Paths of transformer, autoencoder, T5, its tokenizer, CLIP and its tokenizer, and of what makes the transformer
    another model; fetches missing files."""
    paths = [hub_file(repo, variant.flow_file), hub_file(repo, variant.ae_file), *text_files(variant)]
    if variant.adapter is not None:
        paths.append(hub_file(variant.adapter.repo, variant.adapter.file))
    return paths + ([hub_folder(variant.takes.words, NETWORK_FILES)] if variant.takes.words else [])


def _whole(paths: Sequence[Path]) -> bool:
    """Whether these paths are complete, by the headers of their weights: a folder may lack shards."""
    try:
        flow, ae, t5, t5_tokenizer, clip, clip_tokenizer, *others = paths
        for weights in (flow, ae, t5, clip, *others):
            find_source(weights)
        return all(folder.is_dir() and any(folder.iterdir()) for folder in (t5_tokenizer, clip_tokenizer))
    except (ValueError, FileError):
        return False


def _listed(variant: Variant) -> list[HubFile]:
    """The files that `_hub_paths` fetches, with their sizes. Errors as in `hub_file`."""
    assert variant.repo is not None
    files = listing(variant.repo, [variant.flow_file, variant.ae_file]) + listing(variant.clip, TEXT_FILES)
    t5 = listing(variant.t5, TEXT_FILES)
    if not any(file.name.endswith(".safetensors") for file in t5):
        t5 += listing(variant.repo, TEXT_OF_FLUX)
    if variant.adapter is not None:
        files += listing(variant.adapter.repo, [variant.adapter.file])
    return files + t5 + (listing(variant.takes.words, NETWORK_FILES) if variant.takes.words else [])


def _from_modelscope(variant: Variant, repo: str, endpoint: str | None, output_dir: str | None) -> Path:
    """Fetch what is missing and return the folder of official files and text encoders, by default beside the cache.

    It is not the cache of ModelScope's own client, which ignores files that it did not fetch itself.
    """
    source = Repository(repo, hub.checked_address(endpoint or "", "--endpoint", ADDRESS))
    folder = user_path(output_dir) if output_dir else hub.cache_folder().parent / "modelscope" / repo
    folder = folder.absolute()
    note(f"from {source.page} to {folder}")
    try:
        files = _needed(variant, source)
    except Unreachable:
        parts = [folder for pair in _text_folders() for folder in pair]
        if not _whole([folder / part for part in (variant.flow_file, variant.ae_file, *parts)]):
            raise
        files = []
    missing = [source.missing(file, folder) for file in files]
    if any(missing):
        sizes = [(f"{repo}/{file.path}", file.size, left) for file, left in zip(files, missing, strict=True)]
        _check_room(sizes, folder, hub.free_bytes(folder, "--output-dir"), "name a folder with --output-dir")
    else:
        note(_ALL_THERE)
    for file in sorted(files, key=lambda file: file.size):
        source.fetch(file, folder)
    tell(f"FLUX_MODEL={shlex.quote(str(folder))}")
    return folder


def _text_folders() -> list[tuple[str, str]]:
    """The folders of T5 and its tokenizer, then CLIP's, in the repository of a FLUX.1 model."""
    return [(PARTS[part].folders[0], PARTS[part].tokenizer) for part in ("t5", "clip")]


def _needed(variant: Variant, source: Repository) -> list[RemoteFile]:
    """The repository's files that are loaded: a single layout, no pickles. FileError where it lacks a part."""
    needed = [("", [variant.flow_file]), ("", [variant.ae_file])]
    for encoder, tokenizer in _text_folders():
        needed += [(encoder, ["*.safetensors"]), (encoder, ["*.json"]), (tokenizer, TOKENIZER_FILES)]
    files, listed = [(*file.path.rpartition("/")[::2], file) for file in source.files()], []
    for folder, patterns in needed:
        inside = [(name, file) for parent, name, file in files if parent == folder]
        found = [file for name, file in inside if any(fnmatch(name, pattern) for pattern in patterns)]
        if not found:
            raise FileError(f"{source.page} has no {(folder and folder + '/') + patterns[0]}. Next: take --source hub.")
        listed += found
    return listed


def _check_room(sizes: Sequence[tuple[str, int, int]], folder: Path, free: int, advice: str) -> None:
    """Print each (file, bytes, bytes to download), the sum, and the free space. DiskError if that is too small."""
    for file, size, left in sizes:
        part = f"{(size - left) / 1e9:.3f} GB " if left else ""
        there = f"  {part}on this disk" if left < size else ""
        if size >= 10**6 or there:
            note(f"  {size / 1e9:8.3f} GB  {file}{there}")
    missing = sum(left for *_, left in sizes)
    note(f"  {missing / 1e9:8.3f} GB  to download; {free / 1e9:.1f} GB free in {folder}")
    if missing and missing + RESERVE > free:
        raise DiskError(
            f"{missing / 1e9:.1f} GB do not fit into {folder}: {free / 1e9:.1f} GB are free. "
            f"Next: make room, or {advice} on a larger disk."
        )
