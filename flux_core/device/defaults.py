"""torch's process-wide defaults, which a user may have set for code of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """New tensors are fp32 on the CPU while the block runs, as torch's defaults are before anybody changes them.

    For libraries that create tensors without naming dtype and device. Our own code names both
    (tests/test_factories.py), so it needs no such block.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
