"""Train LoRAs beside a frozen transformer: the loss of a rectified flow, the layers that learn, the loop, and a run."""

from .adapter import PRESETS, Adapter, adapt
from .data import Found, Picture, read_folder
from .loop import Progress, train, validate
from .objective import MAPS, WEIGHTINGS, flow_loss, flow_target, noised, on_table
from .recipe import Example, Recipe, Source
from .sizes import parse_resolution

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
    "Source",
    "adapt",
    "flow_loss",
    "flow_target",
    "noised",
    "on_table",
    "parse_resolution",
    "read_folder",
    "train",
    "validate",
]
