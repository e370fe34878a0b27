"""Where weights are: shipped beside the package, in the clone around it, or on the hub.

Everything else asks here for a folder or a file on this disk, and gets it, or an error with the next step.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .errors import AccessError, DiskError, FileError, FluxError
from .variants import Variant

PACKAGE = Path(__file__).resolve().parent
ROOTS = (PACKAGE / "weights", PACKAGE.parent / "weights")
"""an installed wheel carries the weights inside the package, a clone beside it"""

SCORER = "dinov2-mini"
"""the scorer that ships, trained on flux-mini's world"""
_SCORER_FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]
_TEXT_FILES = ["*.json", "*.safetensors", "spiece.model", "merges.txt"]
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def embedded_folder(variant: Variant) -> Path:
    """The folder of a model that ships with the package. FileError if it is not there."""
    for root in ROOTS:
        if (folder := root / variant.name).is_dir():
            return folder
    looked = " or ".join(str(root / variant.name) for root in ROOTS)
    raise FileError(
        f"the weights of {variant.name} ship with this package, but there is no folder {looked}. "
        "Next: clone the repository again, whole, or reinstall the package from it."
    )


class TextFolders(NamedTuple):
    """Where the two text encoders and their tokenizers are, in transformers' own format."""

    t5: Path
    t5_tokenizer: Path
    clip: Path
    clip_tokenizer: Path


def text_folders(variant: Variant) -> TextFolders:
    """Beside the weights for an embedded model, else from the hub, safetensors only.

    Google's own T5 repository holds pickles, which are never opened here; then the encoder comes from the
    FLUX.1 repository, which has the same weights as safetensors, a quarter of the size (bf16, no decoder).
    transformers could fetch it by itself, but it would ask a converting service for safetensors, with the
    token.
    """
    if variant.repo is None:
        t5, clip = (embedded_folder(variant) / name for name in (variant.t5, variant.clip))
        for folder in (t5, clip):
            if not (folder / "config.json").is_file():
                raise FileError(f"{folder} holds no text encoder. Next: clone the repository again, whole.")
        return TextFolders(t5, t5, clip, clip)
    clip = hub_folder(variant.clip, _TEXT_FILES)
    t5 = hub_folder(variant.t5, _TEXT_FILES)
    if not any(t5.glob("*.safetensors")):
        flux = hub_folder(variant.repo, ["text_encoder_2/*", "tokenizer_2/*"])
        return TextFolders(flux / "text_encoder_2", flux / "tokenizer_2", clip, clip)
    return TextFolders(t5, t5, clip, clip)


def scorer_folder(name: str) -> Path:
    """The folder of a scorer: one that ships, one on this disk, or a hub repository's. Errors as in `hub_file`."""
    shipped = [root / SCORER for root in ROOTS] if name == SCORER else []
    for folder in (*shipped, Path(name)):
        if folder.is_dir():
            return folder
    if name == SCORER:
        looked = " or ".join(map(str, shipped))
        raise FileError(f"the scorer {SCORER} is not in {looked}. Next: train it (weights/README.md), or name another")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileError(f"there is no scorer {name!a}: give {SCORER}, a folder, or a hub id as facebook/dinov2-base")
    return hub_folder(name, _SCORER_FILES, "the scorer")


def hub_file(repo: str, name: str) -> Path:
    """A file of a hub repository, downloaded once. AccessError, FileError or DiskError, as may be."""
    with _hub_errors(repo, name):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, name))


def hub_folder(repo: str, patterns: list[str], what: str = "the text encoder") -> Path:
    """The folder that holds a repository's files of these patterns. Errors as in `hub_file`."""
    with _hub_errors(repo, what):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, allow_patterns=patterns))


@contextmanager
def _hub_errors(repo: str, wanted: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the hub's client raises, its own or its transport's
        raise _in_our_words(error, repo, wanted) from error


def _in_our_words(error: Exception, repo: str, wanted: str) -> FluxError:
    """What the hub's exceptions mean to a user. Gated is a kind of not found, so the order matters."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return _no_access(repo, "is gated")
    if isinstance(error, hub.RepositoryNotFoundError | hub.LocalTokenNotFoundError):
        return _no_access(repo, "does not exist, or not for this token")
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return _unreachable(repo, wanted)
    if isinstance(error, hub.EntryNotFoundError):
        return FileError(f"{repo} has no {wanted}. Next: look at https://huggingface.co/{repo}/tree/main.")
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return _no_access(repo, f"is closed to this token (HTTP {status})")
        return FileError(f"the hub answered {status} for {wanted} of {repo}. Next: try again later.")
    if isinstance(error, OSError) and error.errno in _DISK:
        return DiskError(f"{wanted} of {repo} could not be stored: {error}. HF_HOME moves it.")
    return _unreachable(repo, wanted, f" ({type(error).__name__}: {error})")


def _unreachable(repo: str, wanted: str, detail: str = "") -> FileError:
    return FileError(
        f"{wanted} of {repo} is not on this disk, and the hub could not be reached{detail}. "
        "Next: connect and run this again, or point FLUX_MODEL and FLUX_AE to files you have."
    )


def _no_access(repo: str, state: str) -> AccessError:
    return AccessError(
        f"the repository {repo} {state}. Next: log in, accept its licence at https://huggingface.co/{repo}, "
        "make a read token at https://huggingface.co/settings/tokens, and set it as HF_TOKEN."
    )
