"""The errors that a user can cause, each with the command line's exit code.

An error's text names the file or value, what was found, and the next step. The user sees only this text; a traceback
is shown only with `--debug`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FluxError(Exception):
    """Base class of the errors that are part of the interface."""

    exit_code = 1


class UsageError(FluxError):
    """A wrong argument, request or combination of them."""

    exit_code = 2


class HookError(UsageError):
    """A function of a plan that failed, or returned what does not fit its place."""


class AccessError(FluxError):
    """A gated repository, a missing or refused token, a licence that was not accepted."""

    exit_code = 3


class FileError(FluxError):
    """A missing or damaged file, or a file of another kind."""

    exit_code = 4


class MemoryShortage(FluxError):
    """The device or the machine ran out of memory."""

    exit_code = 5


class DiskError(FluxError):
    """A full disk, or a folder or file that cannot be written."""

    exit_code = 6


class NonFiniteError(FluxError):
    """NaN or infinity in embeddings, latents or pictures; no picture is written."""

    exit_code = 7


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean …?" with the known word nearest to `word`; empty if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


@contextmanager
def foreign() -> Iterator[None]:
    """A context whose errors are not of the user's function that called into it: they pass it as they are."""
    try:
        yield
    except Exception as error:
        error._foreign = True  # type: ignore[attr-defined]
        raise


def is_foreign(error: Exception) -> bool:
    """Whether an error is none of the function that it passes: our own, a shortage, or raised in `foreign`."""
    return isinstance(error, FluxError) or is_out_of_memory(error) or getattr(error, "_foreign", False)


SHORTAGES = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory", "ALLOC_FAILED")
"""texts of errors without their own class: from MPS and from CUDA outside torch's allocator, from the CPU on Linux and
on Windows, from cuBLAS and cuDNN"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any class means that a device or the machine ran out of memory."""
    named = "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}  # torch's, without importing it
    return named or isinstance(error, MemoryError) or any(text in str(error) for text in SHORTAGES)
