"""Scaled products on the CPU, also for a torch whose `_scaled_mm` takes one scale for a whole tensor there (2.11)."""

import pytest
import torch

from flux_core.linears import fp8


def has_row_scales() -> bool:
    one = torch.ones(16, 1, dtype=torch.float32, device="cpu")
    codes = torch.ones(16, 16, dtype=torch.float32, device="cpu").to(fp8.E4M3)
    try:
        fp8.scaled_product(codes, one, codes, one, None)
        return True
    except (RuntimeError, NotImplementedError):
        return False


ROW_SCALES = has_row_scales()
ON_DEVICE = fp8.scaled_product


def in_fp64(x, x_scale, weight, weight_scale, bias):
    """`fp8.scaled_product`, rounded once."""
    if x.is_cuda:
        return ON_DEVICE(x, x_scale, weight, weight_scale, bias)
    y = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t()
    return (y if bias is None else y + bias.double()).bfloat16()


@pytest.fixture(autouse=True)
def row_scales_on_the_cpu(monkeypatch):
    if not ROW_SCALES:
        monkeypatch.setattr(fp8, "scaled_product", in_fp64)
