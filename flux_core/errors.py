"""Every failure that a user can cause, with the exit code the command line answers with.

The text of an error names the file or value, what was found, and the next step. Nothing else reaches the user:
a traceback is shown only with `--debug`.
"""


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
