"""A loaded model that draws: its parts, where they are, what conditions them, and the way from request to picture."""

from .components import Components
from .conditions import Condition, FlowInputs
from .load import load_pipeline
from .pipeline import Pipeline

__all__ = ["Components", "Condition", "FlowInputs", "Pipeline", "load_pipeline"]
