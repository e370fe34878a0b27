"""`download`: the files of a model from the hub, as they will be loaded, and no others."""

from fnmatch import fnmatch
from pathlib import Path

from .. import hub
from ..errors import DiskError
from ..places import TEXT_FILES, TEXT_OF_FLUX, embedded_folder, hub_file, text_folders
from ..terminal import note, tell
from ..variants import Variant, get_variant

RESERVE = 2**28
"""bytes that stay free beside a download, for everything else on that disk"""


def download(name: str, endpoint: str | None = None) -> list[Path]:
    """Fetch transformer, autoencoder and text encoders of that model into the hub's cache; their paths, also told.

    endpoint: the hub's address, instead of HF_ENDPOINT's. Whole files that are there are not fetched again. The
    client takes up a broken connection by itself; a run that ended begins its last file anew (huggingface_hub 2.4
    keeps no part of it). UsageError, AccessError, FileError, or DiskError before anything is fetched.
    """
    variant = get_variant(name)
    tell(f"{name}: {variant.licence}")
    if variant.repo is None:
        folder = embedded_folder(variant)
        tell(f"{name} ships with the package, nothing is to be downloaded: {folder}")
        return [folder]
    with hub.settings(HF_ENDPOINT=endpoint):
        note(f"from {hub.endpoint()} to {hub.cache_folder()}")
        if not hub.offline():
            free = hub.free_bytes(hub.cache_folder())
            _check_room(_sizes(variant), free)
        flow, ae = (hub_file(variant.repo, file) for file in (variant.flow_file, variant.ae_file))
        paths = list(dict.fromkeys([flow, ae, *text_folders(variant)]))
    for path in paths:
        tell(str(path))
    return paths


def _sizes(variant: Variant) -> list[tuple[str, str, int]]:
    """(repository, file, bytes) of what `resolve` and `text_folders` will ask for. Errors as in `hub_file`."""
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


def _check_room(files: list[tuple[str, str, int]], free: int) -> None:
    """Tell what is to be fetched and the bytes that are free; DiskError if those are too few."""
    missing = [row for row in files if not hub.cached(row[0], row[1])]
    for repo, file, size in files:
        there = "" if (repo, file, size) in missing else "  on this disk"
        if size >= 10**6 or there:
            note(f"  {size / 1e9:8.3f} GB  {repo}/{file}{there}")
    folder = hub.cache_folder()
    needed = sum(size for *_, size in missing)
    note(f"  {needed / 1e9:8.3f} GB  to download; {free / 1e9:.1f} GB free in {folder}")
    if missing and needed + RESERVE > free:
        raise DiskError(
            f"{needed / 1e9:.1f} GB do not fit into {folder}: {free / 1e9:.1f} GB are free. "
            f"Next: make room, or set {hub.cache_variable()} to a folder on a larger disk."
        )
