"""The one place of the version: packaging, metadata and requests read it here."""

__version__ = "0.1.0"
