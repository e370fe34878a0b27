"""A stand-in for a card with units for few bits, and the shortages that its trial may meet."""

import pytest
import torch


class Card:
    """A device that computes as the CPU does, and calls itself one with units."""

    type = "cuda"


def card_with(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Card:
    """A card of that compute capability, whose products run on the CPU."""
    device, to = Card(), torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, where, *args: self if where is device else to(self, where, *args)
    )
    return device


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtCreate(&handle)`"),
]
