"""Folders and files of weights on this disk: shipped beside the package, in the clone around it, or from the hub.

A missing folder or file is an error with the next step.
"""

from pathlib import Path

from ..errors import FileError
from ..files import user_path
from ..variants import Variant
from .client import cache_folder, hub_errors
from .parts import fetch, fetch_all

PACKAGE = Path(__file__).resolve().parents[1]
ROOTS = (PACKAGE / "weights", PACKAGE.parent / "weights")
"""an installed wheel has the weights inside the package, a clone beside it"""

SCORER = "dinov2-mini"
"""the scorer that ships, trained on flux-mini's world"""
NETWORK_FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]
"""of a network that looks at pictures"""
TOKENIZER_FILES = ["*.json", "spiece.model", "merges.txt"]
TEXT_FILES = [*TOKENIZER_FILES, "*.safetensors"]
TEXT_OF_FLUX = ["text_encoder_2/*", "tokenizer_2/*"]
"""T5 and its tokenizer in the repository of a FLUX.1 model"""


def embedded_folder(variant: Variant) -> Path:
    """The folder of a model that ships with the package, or of the one that it stands on. FileError."""
    return shipped_folder(variant.base or variant.name)


def shipped_folder(name: str) -> Path:
    """A folder of weights that ships with the package. FileError if it is not there."""
    for root in ROOTS:
        if (folder := root / name).is_dir():
            return folder
    looked = " or ".join(str(root / name) for root in ROOTS)
    raise FileError(
        f"the weights of {name} ship with this package, but there is no folder {looked}. "
        "Next: clone the repository again, whole, or reinstall the package from it."
    )


def scorer_folder(name: str) -> Path:
    """The folder of a scorer: one that ships, one on this disk, or a hub repository's. Errors as in `hub_file`."""
    if name != SCORER:
        return network_folder(name, "scorer", f"{SCORER}, a folder, or a hub id as facebook/dinov2-base")
    shipped = [root / SCORER for root in ROOTS]
    for folder in (*shipped, Path(SCORER)):
        if folder.is_dir():
            return folder
    looked = " or ".join(map(str, shipped))
    raise FileError(f"the scorer {SCORER} is not in {looked}. Next: train it (weights/README.md), or name another")


def network_folder(name: str, what: str, choice: str, files: list[str] = NETWORK_FILES) -> Path:
    """The folder of a network that looks at pictures: one on this disk, or a hub repository's. Errors as in `hub_file`.

    what: a noun, and choice: what else may be given, for the error. files: patterns of what a repository has of it.
    """
    folder = user_path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileError(f"there is no {what} {name!a}: give {choice}")
    return hub_folder(name, files, f"the {what}")


def hub_file(repo: str, name: str) -> Path:
    """A file of a hub repository, downloaded once. AccessError, FileError or DiskError."""
    fetch(repo, name)
    with hub_errors(repo, name) as access:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, name, cache_dir=cache_folder(), **access))


def hub_listing(repo: str, what: str) -> list[str]:
    """The names of a hub repository's files. Errors as in `hub_file`."""
    with hub_errors(repo, what) as access:
        from huggingface_hub import HfApi

        return HfApi(endpoint=access.get("endpoint"), token=access.get("token")).list_repo_files(repo)


def hub_folder(repo: str, patterns: list[str], what: str = "the text encoder") -> Path:
    """The folder that holds a repository's files of these patterns. Errors as in `hub_file`."""
    fetch_all(repo, patterns)
    with hub_errors(repo, what) as access:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, allow_patterns=patterns, cache_dir=cache_folder(), **access))
