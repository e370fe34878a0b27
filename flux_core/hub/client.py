"""Access to the hub: settings, token, endpoint, and its errors as ours. The client is imported where it is used.

The client reads its settings when it is imported, so `read_env` comes first. Every call passes token and endpoint, so
that only those found here are used. `login()` is never called: it writes to the disk.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ..errors import AccessError, DiskError, FileError, FluxError, UsageError
from ..files import user_path
from ..terminal import note
from ..variants import VARIANTS

HUB = "https://huggingface.co"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
"""variables for the token; the first that is set counts"""
ENV = Path(".env")
_KNOWN = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "FLUX_")
"""prefixes of the variables that are read from .env; a file in an unknown folder must set nothing else"""
_LOCAL = ("127.0.0.1", "localhost", "::1")
_BROKEN = ("RemoteProtocolError", "ReadError", "ReadTimeout", "ChunkedEncodingError", "IncompleteRead")
"""names of the transports' errors (requests, httpx, by the client's version) for a response that is cut short"""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EEXIST}
"""errors of a file system that cannot be written to, or is full"""

_from_env_file: set[str] = set()
"""names of the variables that were read from .env"""


@dataclass(frozen=True)
class Token:
    """A token and its origin; the value is in no repr."""

    value: str = field(repr=False)
    origin: str
    kind: Literal["environment", "env file", "login"]


def read_env() -> None:
    """Set the hub's and our own variables from `.env` in the current folder, where the environment has none.

    Has to run before huggingface_hub is imported. HF_ENDPOINT is normalised; a file that cannot be read is a line on
    stderr, without any value.
    """
    if ENV.is_file():
        _read_env_file()
    if (cache := os.environ.get("HF_HUB_CACHE")) and not _has_home():
        os.environ["HF_HOME"] = cache  # else the client would make a folder called ~ for other files
    if "HF_ENDPOINT" in os.environ:  # the client takes blanks for an address
        os.environ["HF_ENDPOINT"] = os.environ["HF_ENDPOINT"].strip().rstrip("/")
        if not os.environ["HF_ENDPOINT"]:
            del os.environ["HF_ENDPOINT"]


def _read_env_file() -> None:
    from dotenv import dotenv_values

    try:
        values = dotenv_values(ENV, encoding="utf-8-sig", interpolate=False)
    except (OSError, ValueError) as error:  # UnicodeDecodeError quotes the bytes, so only its name is shown
        return _once(f"warning: .env could not be read ({type(error).__name__}); it should be text in UTF-8")
    has_token = any(name in os.environ for name in TOKENS)  # any name in the environment beats all in the file
    for name, value in values.items():
        taken = name in os.environ or (has_token and name in TOKENS)
        if value and "\0" not in value and not taken and name.startswith(_KNOWN):
            os.environ[name] = value
            _from_env_file.add(name)
    if _tracked_by_git():
        _once("warning: .env is tracked by git, so a token in it is published: git rm --cached .env")


def _has_home() -> bool:
    """Whether there is a folder for the hub's files outside HF_HUB_CACHE."""
    try:
        return bool(_home())
    except UsageError:
        return False


def _tracked_by_git() -> bool:
    # no fsmonitor: it is a program that the folder's own git settings may name
    command = ["git", "-c", "core.fsmonitor=false", "ls-files", "--error-unmatch", str(ENV)]
    try:
        return subprocess.run(command, capture_output=True, timeout=2, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


@cache
def _once(warning: str) -> None:
    note(warning)


def find_token() -> Token | None:
    """The token in one of `TOKENS`, in the environment or in .env, else that of a login's file. No network."""
    for name in TOKENS:
        if value := os.environ.get(name, "").strip():
            if name in _from_env_file:
                return Token(value, f"{name} in .env", "env file")
            return Token(value, f"{name} in the environment", "environment")
    try:
        file = user_path(os.environ.get("HF_TOKEN_PATH") or _home() / "token")
        value = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError, UsageError):  # without a home there is no login
        return None
    return Token(value, f"the login's file {file}", "login") if value else None


def endpoint() -> str:
    """The hub's address without a trailing slash: HF_ENDPOINT, or huggingface.co. UsageError if it is no address."""
    return checked_address(os.environ.get("HF_ENDPOINT", ""), "HF_ENDPOINT", HUB)


def checked_address(given: str, name: str, otherwise: str) -> str:
    """The address without a trailing slash, or `otherwise` if empty. UsageError with `name`, what it was read from."""
    address = given.strip().rstrip("/") or otherwise
    try:
        parts = urlsplit(address)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.username is None and parts.port != 0
    except ValueError:
        right = False
    if not right:
        shown = "" if "@" in address else f"={address[:100]!a}"  # before an @ there may be a password
        raise UsageError(f"{name}{shown} is no address. Next: write it as {otherwise}, or leave it out.")
    return address


def endpoint_of_env_file() -> bool:
    """Whether HF_ENDPOINT was set by .env."""
    return "HF_ENDPOINT" in _from_env_file


def offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE, as the client has it) forbids the network."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def without_network() -> Iterator[None]:
    """A context without requests to the hub: functions return what is in the cache, or raise FileError."""
    from huggingface_hub import constants  # the client has read the environment by now, and only once

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cache_folder() -> Path:
    """The folder of the hub's files: HF_HUB_CACHE, else `hub` in HF_HOME. UsageError where there is no home for it."""
    return user_path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or _home() / "hub"))


def _home() -> Path:
    """HF_HOME, or `huggingface` in the user's cache. UsageError where the user has no home folder."""
    if given := os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME"):
        folder = user_path(os.path.expandvars(given))
        return folder if os.environ.get("HF_HOME") else folder / "huggingface"
    try:
        return Path.home() / ".cache" / "huggingface"
    except RuntimeError:
        raise UsageError(
            "there is no home folder to keep the hub's files in: HOME is not set, and this user has no name. "
            "Next: set HF_HOME to a folder that can be written to."
        ) from None


def cache_variable() -> str:
    """The name of the variable that sets the cache's place."""
    return "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"


def free_bytes(folder: Path, setting: str | None = None) -> int:
    """Free bytes where that folder is or would be. DiskError if nothing can be written there.

    setting: the flag or variable that sets another folder, by default the cache's variable.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise DiskError(
            f"{folder} cannot be written to ({existing} is no folder that is open for writing). "
            f"Next: set {setting or cache_variable()} to a folder that is."
        )
    return shutil.disk_usage(existing).free


@contextmanager
def settings(**variables: str | None) -> Iterator[None]:
    """A context in which those variables of the environment have these values, where they are not None."""
    given = {name: value for name, value in variables.items() if value is not None}
    before, from_file = {name: os.environ.get(name) for name in given}, _from_env_file & given.keys()
    os.environ.update(given)
    _from_env_file.difference_update(given)
    try:
        yield
    finally:
        _from_env_file.update(from_file)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def repo_folder(repo: str) -> Path:
    """The repository's folder in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def cached(repo: str, pattern: str) -> list[Path]:
    """The repository's files of that pattern in the cache, of any revision. No network."""
    found = repo_folder(repo).glob(f"snapshots/*/{pattern}")
    return sorted(path for path in found if path.exists())  # a link without its file is none


def access() -> dict[str, Any]:
    """`token` and `endpoint` for the client's functions. AccessError where the token may not be sent there."""
    read_env()
    address, token = endpoint(), find_token()
    if token is None:
        return {"token": False, "endpoint": address}
    if not (token.value.isascii() and token.value.isprintable()) or " " in token.value:
        # such a header is refused by the transport, whose error would quote it
        raise AccessError(
            f"the token from {token.origin} holds blanks or letters that no token has. Next: set it anew."
        )
    if endpoint_of_env_file() and token.kind != "env file" and address != HUB:
        raise AccessError(
            f"HF_ENDPOINT={address} comes from .env, and the token from {token.origin} does not: it is not sent there. "
            "Next: set HF_ENDPOINT in the environment if you trust that address, else delete it from .env."
        )
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in _LOCAL:
        raise AccessError(
            f"HF_ENDPOINT={address} is not encrypted, and the token from {token.origin} would travel in the open. "
            "Next: use https, or unset the token."
        )
    if address != HUB:
        _once(f"warning: {address} is not huggingface.co, and it receives the token from {token.origin}")
    # True: the client renews a login's
    return {"token": True if token.kind == "login" else token.value, "endpoint": address}


@contextmanager
def hub_errors(repo: str, wanted: str) -> Iterator[dict[str, Any]]:
    """A context with `access()`, in which the client's errors become AccessError, FileError or DiskError."""
    allowed = access()
    try:
        yield allowed
    except FluxError:
        raise
    except Exception as error:  # whatever the hub's client raises, its own or its transport's
        raise _as_flux_error(error, repo, wanted) from error


def _as_flux_error(error: BaseException, repo: str, wanted: str) -> FluxError:
    """Our error for an error of the hub's. Gated is a subclass of not found, so the order matters."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache", because of this
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.GatedRepoError):
        return _gated(repo, status)
    if isinstance(error, hub.RepositoryNotFoundError):
        return _no_access(repo, f"does not exist at {endpoint()}, or is closed to {_visitor()}", "check its name;")
    if isinstance(error, hub.LocalTokenNotFoundError):
        return _no_access(repo, "wants a token, and there is none")
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return _unreachable(repo, wanted)
    if isinstance(error, hub.EntryNotFoundError):
        return FileError(f"{repo} has no {wanted}. Next: look at {HUB}/{repo}/tree/main.")
    return _refused(status, repo, wanted) if status is not None else _broken_off(error, repo, wanted)


def _refused(status: int, repo: str, wanted: str) -> FluxError:
    """The error for an HTTP status."""
    if status == 401:
        return _bad_token(repo)
    if status == 403:
        return _no_access(repo, f"is closed to {_visitor()} (HTTP 403)")
    if status == 429:
        return FileError(
            f"{endpoint()} answered 429 for {wanted} of {repo}: too many requests from here. "
            "Next: wait five minutes and run this again; what has come is kept."
        )
    return FileError(
        f"the hub answered {status} for {wanted} of {repo} ({endpoint()}). Next: try again later; "
        "what has come is kept."
    )


def _broken_off(error: BaseException, repo: str, wanted: str) -> FluxError:
    """The error for a transport or disk that failed."""
    if isinstance(error, OSError) and error.errno in DISK:
        return DiskError(
            f"{wanted} of {repo} could not be stored in {cache_folder()}: {error.strerror}. "
            f"Next: make room there, or set {cache_variable()} to a folder that can be written to."
        )
    if type(error).__name__ in _BROKEN or "Consistency check failed" in str(error):
        return FileError(
            f"the connection to {endpoint()} was cut while {wanted} of {repo} was downloaded. "
            "Next: run this again; what has come is kept."
        )
    detail = (str(error).splitlines() or [""])[0][:200]
    return _unreachable(repo, wanted, f" ({type(error).__name__}: {detail})")


def _unreachable(repo: str, wanted: str, detail: str = "") -> FileError:
    if offline():
        detail, first = " (HF_HUB_OFFLINE is set)", "unset HF_HUB_OFFLINE"
    else:
        detail, first = detail or f" ({endpoint()})", "connect"
    is_model = any(repo == variant.repo for variant in VARIANTS.values())
    own = "point FLUX_MODEL and FLUX_AE to files you have" if is_model else "name a file or folder you have"
    return FileError(
        f"{wanted} of {repo} is not on this disk, and the hub could not be reached{detail}. "
        f"Next: {first} and run this again, or {own}."
    )


def _visitor() -> str:
    token = find_token()
    return f"the token from {token.origin}" if token else "visitors without a token"


def _gated(repo: str, status: int | None) -> AccessError:
    if find_token() is None:
        return _no_access(repo, "is gated, and there is no token")
    if status == 401:
        return _bad_token(repo)
    return AccessError(
        f"{repo} is gated, and {_visitor()} may not read it. Next: with that token's account accept the licence "
        f"at {HUB}/{repo}; a fine-grained token (HF_TOKEN) also needs the right to read gated repositories."
    )


def _bad_token(repo: str) -> AccessError:
    if find_token() is None:
        return _no_access(repo, "wants a token, and there is none")
    return AccessError(
        f"the hub does not know {_visitor()} (HTTP 401, for {HUB}/{repo}). Next: make a new read token at "
        f"{HUB}/settings/tokens, and set it as HF_TOKEN."
    )


def _no_access(repo: str, state: str, first: str = "") -> AccessError:
    return AccessError(
        f"the repository {repo} {state}. Next: {first and first + ' '}log in, accept its licence at {HUB}/{repo}, "
        f"make a read token at {HUB}/settings/tokens, and set it as HF_TOKEN, in the environment or in .env."
    )
