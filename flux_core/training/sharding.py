"""A frozen model that is spread over the ranks' cards, by FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

Each rank keeps an equal part of every block. A block is whole on all of them while it computes, once in the forward
and once in the backward; the next one comes meanwhile. What learns stays whole everywhere, and so does all outside of
blocks, which is little. Modulation is computed before the blocks run, so its layers come by themselves.

A block comes when the module is called that it is, so what reads weights without a call asks for them (`gathered`).
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..linears.frozen import Scaled
from ..model import Flux
from ..model.layers import Modulation


def shard(model: Flux, learning: Iterable[nn.Parameter], device: torch.device) -> None:
    """Spread an adapted model over all ranks, from the CPU to their devices, one block after another.

    All ranks call it with the same numbers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = [*model.double_blocks, *model.single_blocks]
    inside = {x for block in blocks for x in block.parameters()}
    whole = {x for x in model.parameters() if x not in inside}.union(learning)
    for x in (*whole, *model.buffers()):
        x.data = x.data.to(device)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # into which nothing here writes
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    spread: Any = partial(fully_shard, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for block in blocks:
        for part in block.modules():
            if isinstance(part, Modulation):
                spread(part)
        spread(block)
    for layer in model.modules():
        if isinstance(layer, Scaled):
            layer.choose_matmul()  # on the device where it is now
    spread(model)  # which has nothing left to spread, but knows which block comes next


@contextmanager
def gathered(model: nn.Module, name: str) -> Iterator[None]:
    """A context in which a module's weights are whole, if they are spread. All ranks enter it."""
    owner: Any = None
    part = model
    for word in name.split("."):
        part = getattr(part, word)
        owner = part if hasattr(part, "unshard") else owner
    if owner is not None:
        owner.unshard()
    try:
        yield
    finally:
        if owner is not None:
            owner.reshard()
