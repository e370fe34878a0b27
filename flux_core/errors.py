"""Every failure that a user can cause, with the exit code the command line answers with.

The text of an error names the file or value, what was found, and the next step. Nothing else reaches the user:
a traceback is shown only with `--debug`.
"""

from collections.abc import Iterable


class FluxError(Exception):
    """Base of the errors that are part of the interface."""

    exit_code = 1


class UsageError(FluxError):
    """A wrong argument, request or combination of them."""

    exit_code = 2


class AccessError(FluxError):
    """A gated repository, a missing or refused token, a licence that was not accepted."""

    exit_code = 3


class FileError(FluxError):
    """A missing, damaged or foreign file."""

    exit_code = 4


class MemoryShortage(FluxError):
    """The device or the machine ran out of memory."""

    exit_code = 5


class DiskError(FluxError):
    """A full, read-only or unwritable place."""

    exit_code = 6


class NonFiniteError(FluxError):
    """NaN or infinity in embeddings, latents or pictures; no picture is written."""

    exit_code = 7


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause " Did you mean …?" with the likeliest of the known words, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""in errors without a class of their own: of MPS and of CUDA outside of torch's allocator, of the CPU on Linux and on
Windows, of cuBLAS and cuDNN"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether any device or the machine ran out of memory, whatever class the error has."""
    named = "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}  # torch's, without importing it
    return named or isinstance(error, MemoryError) or any(text in str(error) for text in SHORTAGES)
