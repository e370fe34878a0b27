"""A page in the browser: draw, see inside, edit and explore, through the server's worker."""

from .app import mount

__all__ = ["mount"]
