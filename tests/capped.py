"""An allocator that runs out: all that is allocated in its context takes so many bytes at most."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Capped(TorchDispatchMode):
    """Counts the memory that operations allocate, as long as it is in use; out of memory above the limit."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit, self.peak, self.failures = limit, 0, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and func._schema.name != "aten::set_":  # which points at memory that is there
                storage = x.untyped_storage()
                if storage._cdata not in given:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        taken = sum(size for _, size in self.alive.values())
        if taken > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory: {taken} bytes of {self.limit}")
        self.peak = max(self.peak, taken)
        return found
