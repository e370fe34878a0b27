"""A block's matrix products, fused with the work between them: by cuBLASLt, and one kernel for modulation tables.

mlp, linear1    GELU in the epilogue of the product; for it `linear1` is two products, qkv and the MLP's part
linear2         the sum of a product for attention and one for the MLP's part, without concatenation
modulation      the projections of all steps of a schedule read their weights once

Each needs a dense weight. A layer without one, or that has to be called (`linears/contract.py`), is called as in the
plain functions. Low-rank branches beside a layer are part of its product: of inputs and weight with columns for them
(`operands`), of three products (`multiply_columns`), or thin ones for all steps.
"""

from copy import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ..linears.contract import (
    Branches,
    QuantizedTokens,
    Widened,
    branches,
    dense,
    is_bare,
    multiply_columns,
    operands,
)
from ..model import ops
from .launch import cdiv, dense_rows, operator, wrap_triton

PROJECT_ROWS, PROJECT_N, PROJECT_K, PROJECT_WARPS = 32, 32, 128, 4


class Activated(NamedTuple):
    """Hidden features after their GELU, which `linear2` then does not apply."""

    hidden: Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, tanh form, of a Linear, in the epilogue of the product (cuBLASLt). [B, L, K] -> [B, L, N]"""
    y = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
    return y.unflatten(0, x.shape[:2])


def is_mlp(layers: nn.Module) -> bool:
    """Whether it is a layer, a GELU and a layer, and only the two layers may have to be called."""
    if not is_bare(layers, nn.Sequential) or len(layers) != 3:  # type: ignore[arg-type]
        return False
    gelu = layers[1]  # type: ignore[index]
    return is_bare(gelu, nn.GELU) and gelu.approximate == "tanh"


def mlp(layers: nn.Sequential, x: Tensor | QuantizedTokens | Widened) -> Tensor:
    """`ops.mlp` with the GELU in the first product."""
    if not is_mlp(layers) or (found := operands(layers[0], x)) is None:
        return layers(x)
    return layers[2](linear_gelu(*found))


def linear1(
    linear: nn.Module, x: Tensor | QuantizedTokens | Widened, split: list[int]
) -> tuple[Tensor, Tensor | Activated]:
    """`ops.linear1`, with the hidden features `Activated` where they are a product of their own."""
    if (found := operands(linear, x)) is None:
        qkv, hidden = linear(x).split(split, dim=-1)
        return qkv, hidden
    inputs, *rest = found
    of_qkv, of_hidden = zip(*(parts.split(split) for parts in rest), strict=True)
    return F.linear(inputs, *of_qkv), Activated(linear_gelu(inputs, *of_hidden))


def linear2(linear: nn.Module, attn: Tensor, hidden: Tensor | Activated) -> Tensor:
    """`ops.linear2` of what `linear1` returns, as a sum of two products, without concatenation."""
    if isinstance(hidden, Activated):
        return multiply_columns(linear, attn, hidden.hidden)
    return multiply_columns(linear, attn, F.gelu(hidden, approximate="tanh"))


# The modulation of many steps at once ------------------------------------------------------------------------


@triton.jit
def project_kernel(
    x, weight, bias, out, weight_row, M, N,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(weight + n[:, None] * weight_row + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )


@operator("project")
def project_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    (M, K), N, weight = x.shape, weight.shape[0], dense_rows(weight)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    wrap_triton(project_kernel)[(cdiv(N, PROJECT_N), cdiv(M, PROJECT_ROWS))](
        x.contiguous(), weight, bias, out, weight.stride(0), M, N,
        K=K, ROWS=PROJECT_ROWS, BLOCK_N=PROJECT_N, BLOCK_K=PROJECT_K, num_warps=PROJECT_WARPS,
    )  # fmt: skip
    return out


def modulation(linear: nn.Module, vec: Tensor) -> Tensor:
    """`ops.modulation`, of all steps in one pass over the weights. The sum of a step is independent of the others."""
    if found := branches(linear, vec):
        own = modulation(found.base, vec)
        return own + raised(F.silu(vec).flatten(0, -2), found).view_as(own)
    product = dense(moved(linear, vec.device), vec)
    if product is None:
        return ops.modulation(linear, vec)  # type: ignore[arg-type]
    return project_op(F.silu(vec).flatten(0, -2), *product).unflatten(0, vec.shape[:-1])


def moved(layer: nn.Module, device: torch.device) -> nn.Module:
    """The same layer with tensors on a device, for one product; itself where they are there."""
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    if all(x is None or x.device == device for x in tensors):
        return layer
    found = copy(layer)
    found._parameters = {
        name: None if x is None else nn.Parameter(x.to(device), requires_grad=x.requires_grad)
        for name, x in layer._parameters.items()
    }
    found._buffers = {name: None if x is None else x.to(device) for name, x in layer._buffers.items()}
    return found


def raised(x: Tensor, found: Branches) -> Tensor:
    """What low-rank branches add to a layer's output of x: up @ (factor * (down @ x)) + shift. [M, K] -> [M, N]"""
    down, up, factor = (one.to(x.device) for one in (found.down, found.up, found.factor))
    shift = x.new_zeros(len(up)) if found.shift is None else found.shift.to(x.device)
    thin = project_op(x, down, x.new_zeros(len(down)))
    return project_op((thin * factor).to(x.dtype), up, shift)
