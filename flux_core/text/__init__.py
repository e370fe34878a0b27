"""The two text encoders, T5 and CLIP; transformers does the work."""

from .encoders import TextEncoder, load_text_encoders

__all__ = ["TextEncoder", "load_text_encoders"]
