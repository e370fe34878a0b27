"""The environment that a picture's last bits depend on besides request and weights: versions, device, kernels."""

from collections.abc import Sequence

import torch

from ..hooks import Intervention
from ..kernels import describe
from ..request.generation import PATCH, GenerationRequest
from ..sampling.graph import is_worth_it
from .placement import Placement


def environment(
    placement: Placement,
    request: GenerationRequest,
    functions: Sequence[Intervention] = (),
    branched: bool = False,
    behind: int = 0,
) -> dict[str, str]:
    """`torch`, `device`, `attention`, `kernels` and `replay`, by name, for a request drawn with this placement.
    `t5_device` is there where T5 encodes elsewhere.

    branched: whether LoRAs will be beside layers then (`Loras.branched`); those of the last request still may be.
    behind: tokens of its references.
    """
    replayed = not _hooked(functions) and is_replayed(placement, request, branched, behind)
    return {
        "torch": torch.__version__,
        "device": device_name(placement.device),
        **({"t5_device": device_name(home)} if (home := t5_home(placement)) else {}),
        **describe(placement.components.flux),
        "replay": "graph" if replayed else "none",
    }


def _hooked(plan: Sequence[Intervention]) -> bool:
    """Whether a plan hooks into the forward."""
    return any(entry.in_forward for entry in plan)


def t5_home(placement: Placement) -> torch.device | None:
    """The device that T5 never leaves, if it is another than that of the placement."""
    home = getattr(placement.components.t5, "home", None)
    return None if home is None or home.type == placement.device.type else home


def device_name(device: torch.device) -> str:
    """The card's name; for a CPU the number of threads, which decides the order of sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def is_replayed(placement: Placement, request: GenerationRequest, branched: bool = False, behind: int = 0) -> bool:
    """Whether the steps of that request are replayed from a CUDA graph (`sampling/graph.py`)."""
    width, height = request.padded_size
    rows = len(request.texts) * (request.batch.rows if request.batch else 1)
    tokens = rows * (request.variant.max_text + width * height // PATCH**2 + behind)
    return (
        placement.is_fixed
        and not _hooked(request.hooks)
        and not request.controlnet
        and is_worth_it(placement.components.flux, placement.device, tokens, request.num_forward_steps, branched)
    )
