"""Train LoRAs beside a frozen transformer: the loss of a rectified flow, and the layers that learn."""

from .adapter import Adapter, adapt
from .objective import MAPS, WEIGHTINGS, flow_loss, flow_target, noised, on_table

__all__ = ["MAPS", "WEIGHTINGS", "Adapter", "adapt", "flow_loss", "flow_target", "noised", "on_table"]
