"""The text encoders T5 and CLIP, loaded from any layout, and their tokenizers."""

from .encoders import T5Choice, TextEncoder, load_text_encoders
from .trained import TrainedWords

__all__ = ["T5Choice", "TextEncoder", "TrainedWords", "load_text_encoders"]
