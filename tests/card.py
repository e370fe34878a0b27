"""What tests on a card leave there: nothing, so that they pass in any order."""

import gc
import sys

import torch

MOST = 64 * 2**20
"""bytes of tensors that a test may leave: caches of small things, and no model"""


def release() -> None:
    """Free what nobody uses, and what only caches of torch's and of the last failure hold.

    A compiled module is part of a cycle (it holds its compiled call, which holds the module), so it stays until the
    garbage collector runs, which in a process as large as this is seldom. cuBLAS keeps a workspace for every stream.
    """
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):  # a failed test's frames
        vars(sys).pop(name, None)
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes of tensors on all cards."""
    return sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
