"""Train LoRAs beside a frozen transformer: the loss of a rectified flow, the layers that learn, and the loop."""

from .adapter import PRESETS, Adapter, adapt
from .data import Found, Picture, read_folder
from .loop import Example, Progress, Recipe, train
from .objective import MAPS, WEIGHTINGS, flow_loss, flow_target, noised, on_table

__all__ = [
    "MAPS",
    "PRESETS",
    "WEIGHTINGS",
    "Adapter",
    "Example",
    "Found",
    "Picture",
    "Progress",
    "Recipe",
    "adapt",
    "flow_loss",
    "flow_target",
    "noised",
    "on_table",
    "read_folder",
    "train",
]
