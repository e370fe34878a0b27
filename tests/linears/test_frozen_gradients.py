"""Gradients through frozen Linears in few bits: those of the weights that the codes stand for; and rows of a layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux_core.linears.fp8 import Fp8Linear
from flux_core.linears.frozen import Frozen
from flux_core.linears.gguf import GgufLinear
from flux_core.linears.int8 import Int8Linear, hadamard, rotate, rotate_tokens
from flux_core.linears.nf4 import Nf4Linear
from flux_core.model.blocks import SingleStreamBlock
from flux_core.model.layers import ModulationOut
from flux_core.params import FluxParams

KINDS = [Int8Linear, Fp8Linear, Nf4Linear, GgufLinear]
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""relative errors: two or three numbers are rounded"""
SMALL = FluxParams(
    in_channels=64, out_channels=64, vec_in_dim=8, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2,
    depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6), theta=10_000, qkv_bias=True, guidance_embed=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def layer_of(kind, inputs=512, outputs=48, dtype=torch.float32, **options):
    linear = nn.Linear(inputs, outputs, **options).requires_grad_(False)
    linear.weight *= torch.randn(outputs, 1).exp()  # rows of many sizes
    return kind.of(linear.to(dtype))


def error(found, exact):
    return float((found.detach().double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_that_of_the_weight_in_fp64(kind, dtype, bias):
    layer = layer_of(kind, dtype=dtype, bias=bias)
    x, grad = torch.randn(2, 5, 512).to(dtype).requires_grad_(), torch.randn(2, 5, 48).to(dtype)
    layer(x).backward(grad)
    assert x.grad.dtype == dtype
    assert error(x.grad, grad.double() @ layer.widen(torch.float32).double()) < EXACT[dtype]


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_few_more_numbers_are_rounded_than_with_a_dense_weight(kind):
    layer, grad = layer_of(kind, 1024, 512), torch.randn(64, 512).bfloat16()
    exact = grad.double() @ layer.widen(torch.float32).double()
    dense = error(grad @ layer.widen(torch.bfloat16), exact)
    assert error(layer.input_gradient(grad), exact) < 1.35 * dense < 4e-3


@pytest.mark.parametrize("kind", [Int8Linear, Fp8Linear])
def test_small_gradients_in_fp16_are_not_lost_to_the_scales(kind):
    """Numbers near fp16's smallest normal one, of a weight as small as a transformer's, whose scales are near 1e-4."""
    linear = nn.Linear(512, 48).requires_grad_(False)
    linear.weight *= 0.2
    layer, grad = kind.of(linear), (1e-3 * torch.randn(64, 48)).half()
    exact = grad.double() @ layer.widen(torch.float32).double()
    assert error(layer.input_gradient(grad), exact) < 2e-2
    folded = (grad * layer.weight_scale).half() @ layer.weight.half()
    assert error(rotate_tokens(folded, getattr(layer, "group", 0)), exact) > 5e-2


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_the_rotation_by_a_product_is_that_by_additions(group):
    x = torch.randn(3, 5, 512)
    assert error(rotate_tokens(x.double(), group), rotate(x, group)) < 1e-6
    assert error(rotate_tokens(x.bfloat16(), group), rotate(x.bfloat16(), group)) < 3e-3  # one rounding
    assert rotate_tokens(x, 0) is x
    signs = hadamard(group, torch.float32, "cpu")
    assert torch.equal(hadamard(group, torch.bfloat16, "cpu").float(), signs) and torch.equal(signs, signs.t())


def test_a_layer_that_is_not_rotated():
    layer = layer_of(Int8Linear, 30)
    x, grad = torch.randn(4, 30, requires_grad=True), torch.randn(4, 48)
    layer(x).backward(grad)
    assert layer.group == 0 and error(x.grad, grad @ layer.widen(torch.float32)) < 1e-6


# Rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [slice(0, 16), slice(16, 48)])
def test_rows_are_those_of_the_whole_with_their_gradients(kind, rows):
    layer, x = layer_of(kind), torch.randn(2, 5, 512, requires_grad=True)
    layer.bias.requires_grad_()
    y, whole = layer.multiply_rows(x, rows), layer(x)[..., rows]
    assert y.shape == whole.shape and error(y, whole.detach()) < 1e-6
    grad = torch.randn(y.shape)
    found, expected = (torch.autograd.grad(some, (x, layer.bias), grad, retain_graph=True) for some in (y, whole))
    assert all(error(one, other) < 1e-6 for one, other in zip(found, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(layer.multiply_rows(x, rows), y)
    mapped = torch.func.vmap(lambda x: layer.multiply_rows(x, rows))(x.detach())
    assert error(mapped, F.linear(x, layer.widen(torch.float32), layer.bias)[..., rows].detach()) < 1e-6


def test_rows_in_int8_are_multiplied_by_the_same_functions():
    """By the units' product: the integers, and so the bits, are those of the whole."""
    layer, x, seen = layer_of(Int8Linear), torch.randn(2, 5, 512), []
    layer.scaled, product = True, layer.product

    def counted(tokens, weight, *rest):
        seen.append(weight.shape)
        return product(tokens, weight, *rest)

    layer.product = counted
    rows = slice(16, 48)
    assert torch.equal(layer.multiply_rows(x, rows), layer(x)[..., rows])
    assert seen == [(32, 512), (48, 512)]


# The compiler


@pytest.mark.parametrize("kind", [None, Int8Linear, Fp8Linear])
def test_a_compiled_block_passes_the_same_gradients(kind):
    block, dim = SingleStreamBlock(SMALL).requires_grad_(False), SMALL.hidden_size
    if kind is not None:
        block.linear1, block.linear2 = kind.of(block.linear1), kind.of(block.linear2)
        assert isinstance(block.linear1, Frozen)
    x, grad = torch.randn(1, 8, dim, requires_grad=True), torch.randn(1, 8, dim)
    mod = ModulationOut(*torch.randn(3, 1, 1, dim))
    pe = torch.eye(2).expand(1, 1, 8, SMALL.head_dim // 2, 2, 2)
    torch._dynamo.reset()
    found = []
    for call in (block, torch.compile(block, backend="aot_eager")):
        y = call(x, mod, pe)
        found.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    torch._dynamo.reset()
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 1e-6
