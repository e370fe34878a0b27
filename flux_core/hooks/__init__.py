"""Skip, read, change, share and cache named values and blocks of a forward, from outside the model.

    from flux_core.hooks import Capture, Custom, Skip
    seen = {}
    plan = [Skip(blocks="single_blocks.5"), Capture(sites="double_blocks.*.img.out", into=seen)]
    pipeline.generate("a red apple", plan=plan)
    pipeline.generate("a red apple", plan=[Custom(sites="vec", fn=lambda x, at: 1.1 * x)])

`sites.py` lists the names, `seam.py` defines the functions that can be placed there, and each kind of intervention has
its own file. Importing this module does not import torch.
"""

from typing import TYPE_CHECKING, Any

from .attention_maps import AttentionMaps
from .attention_mask import AttentionMask
from .capture import Capture
from .change import Add, Replace, Scale
from .custom import Custom
from .first_block_cache import FirstBlockCache
from .intervention import Intervention
from .lora import Lora
from .plan import Plan, check_plan, parse_plan, read_plan
from .python import Python
from .seam import At, traceable
from .share_kv import ShareKV
from .skip import Skip
from .step_cache import StepCache
from .store import Captured, load_capture
from .velocity import Sampler, Sampling, Wrap

if TYPE_CHECKING:
    from .run import HookRun, run_with_cache

__all__ = [
    "Add", "At", "AttentionMaps", "AttentionMask", "Capture", "Captured", "Custom", "FirstBlockCache", "HookRun",
    "Intervention", "Lora", "Plan", "Python", "Replace", "Sampler", "Sampling", "Scale", "ShareKV", "Skip", "StepCache",
    "Wrap", "check_plan", "load_capture", "parse_plan", "read_plan", "run_with_cache", "traceable",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in ("HookRun", "run_with_cache"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import run

    return getattr(run, name)
