"""T-LoRA (Soboleva et al. 2025, arXiv 2507.05964): fewer ranks of a LoRA count where there is more noise. No torch.

    r(t) = r_min + floor((r - r_min) (1 - t)^curve)

of a module of rank r at the noise level t in [0, 1]: the first so many. What was trained so is drawn so: with all ranks
at all levels pictures look burnt. A file says it in its header, under the key and the names of SimpleTuner, whose
rounding this is, too (documentation/experimental/T_LORA.md, helpers/training/save_hooks.py).
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

LYCORIS_CONFIG = "lycoris_config"
"""a header's key under which SimpleTuner keeps the configuration of LyCORIS, as JSON"""
ALGORITHM, LEAST, CURVE = "tlora", "tlora_min_rank", "tlora_alpha"
"""there: the value of `algo`, and the names of the two numbers"""
SLACK = 1e-4
"""of a rank, below which noise levels of fp32 and of fp64 are the same"""


class RankSchedule(NamedTuple):
    """How many ranks of a module count at a noise level."""

    least: int = 1
    """at level 1; a module of fewer has them all"""
    curve: float = 1.0

    def active(self, rank: int, sigma: float) -> int:
        """Of a module of that rank, at a noise level in [0, 1]."""
        more = max(0, rank - self.least)
        return rank - more + math.floor(more * max(0.0, 1 - sigma) ** self.curve + SLACK)

    def config(self) -> dict[str, Any]:
        """Its entries in LyCORIS' configuration."""
        return {"algo": ALGORITHM, LEAST: self.least, CURVE: self.curve}

    @classmethod
    def of(cls, header: Mapping[str, str]) -> "RankSchedule | None":
        """That of a header, None without one. ValueError for numbers that are none."""
        try:
            config = json.loads(header.get(LYCORIS_CONFIG, "{}"))
        except (ValueError, RecursionError):
            return None  # nobody's configuration
        if not isinstance(config, dict) or config.get("algo") != ALGORITHM:
            return None
        default = cls()
        least, curve = config.get(LEAST, default.least), config.get(CURVE, default.curve)
        numbers = isinstance(least, int) and isinstance(curve, int | float)
        if not numbers or least < 1 or not 0 <= curve < math.inf:
            raise ValueError(f"{LEAST} {least!r}, {CURVE} {curve!r}")
        return cls(least, float(curve))
