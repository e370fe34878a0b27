"""A watch for tensors that MPS does not have."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoFloat64(TorchDispatchMode):
    """Fails where any operation makes a float64 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = out if isinstance(out, tuple | list) else (out,)
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in leaves), func
        return out
