"""From a request to a picture: the loaded parts of a model, and how they work together."""

from .pipeline import Pipeline, load_pipeline

__all__ = ["Pipeline", "load_pipeline"]
