"""A block's products, with the work between them taken in: cuBLASLt's, and one kernel for a table of modulation.

mlp, linear1    GELU in the epilogue of the product; for it `linear1` is two products, qkv and the MLP's part
linear2         a product of attention and one of the MLP's part, added up: they need not be joined
modulation      the projections of all steps of a schedule read their weights once

Where a layer is more than its weights, or a gradient is wanted, the plain twin computes.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import wrap_triton

from ..model import ops
from .fused import needs_grad, operator

PROJECT_ROWS, PROJECT_N, PROJECT_K, PROJECT_WARPS = 32, 32, 128, 4


def bare(layer: nn.Module, kind: type[nn.Module], *inputs: Tensor) -> bool:
    """Whether a layer is its weights and nothing else: no other class (of a weight, too), no hook, no gradient."""
    if type(layer) is not kind:
        return False
    weights: list[Any] = [x for x in (layer.weight, layer.bias) if x is not None]
    if any(type(x) is not nn.Parameter for x in weights) or needs_grad(*inputs, *weights):
        return False
    return torch.compiler.is_compiling() or not (layer._forward_hooks or layer._forward_pre_hooks)


def bare_linear(linear: nn.Module, *inputs: Tensor) -> bool:
    """Of a Linear, and whether it has a bias."""
    return bare(linear, nn.Linear, *inputs) and linear.bias is not None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, tanh form, of a Linear, in the epilogue of the product (cuBLASLt). [B, L, K] -> [B, L, N]"""
    y = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
    return y.unflatten(0, x.shape[:2])


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`ops.mlp` without a pass for the GELU."""
    if not bare_linear(layers[0], x):
        return ops.mlp(layers, x)
    weight, bias = layers[0].parameters()
    return layers[2](linear_gelu(x, weight, bias))


def linear1(linear: nn.Linear, x: Tensor, split: list[int]) -> tuple[Tensor, Tensor]:
    """`ops.linear1`, with the MLP's part activated already, where it can in the epilogue of a product of its own."""
    if not bare_linear(linear, x):
        qkv, hidden = ops.linear1(linear, x, split)
        return qkv, F.gelu(hidden, approximate="tanh")
    weights, biases = linear.weight.split(split), linear.bias.split(split)
    return F.linear(x, weights[0], biases[0]), linear_gelu(x, weights[1], biases[1])


def linear2(linear: nn.Linear, attn: Tensor, hidden: Tensor) -> Tensor:
    """`ops.linear2` of what `linear1` gives, as two products into one sum: nothing is joined before."""
    if not bare_linear(linear, attn, hidden):
        return linear(torch.cat((attn, hidden), dim=2))
    add_up = torch.ops.flux_core.sum_of_products if torch.compiler.is_compiling() else sum_of_products
    return add_up(attn, hidden, linear.weight, linear.bias)


def sum_of_products(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[x | y] @ weight.T + bias, for x [B, L, K], y [B, L, M] and weight [N, K + M].

    An operator of its own, since inductor would copy the first sum before it adds the second to it.
    """
    of_x, of_y = weight.t().split([x.shape[2], y.shape[2]])
    return torch.addmm(bias, y.flatten(0, 1), of_y).addmm_(x.flatten(0, 1), of_x).unflatten(0, x.shape[:2])


@torch.library.custom_op("flux_core::sum_of_products", sum_of_products, mutates_args=()).register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


# The modulation of many steps at once ------------------------------------------------------------------------


@triton.jit
def project_kernel(
    x, weight, bias, out, M, N,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(w), total, input_precision="ieee")
    total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )


@operator("project")
def project_op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    wrap_triton(project_kernel)[(triton.cdiv(N, PROJECT_N), triton.cdiv(M, PROJECT_ROWS))](
        x.contiguous(), weight.contiguous(), bias, out, M, N,
        K=K, ROWS=PROJECT_ROWS, BLOCK_N=PROJECT_N, BLOCK_K=PROJECT_K, num_warps=PROJECT_WARPS,
    )  # fmt: skip
    return out


def modulation(linear: nn.Linear, vec: Tensor) -> Tensor:
    """`ops.modulation`, of all steps in one pass over the weights. A row's sum does not know the rows beside it."""
    if not bare_linear(linear, vec):
        return ops.modulation(linear, vec)
    rows, weights = F.silu(vec).flatten(0, -2), ops.brought(linear, vec.device)
    return project_op(rows, weights["weight"], weights["bias"]).unflatten(0, vec.shape[:-1])
