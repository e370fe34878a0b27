"""Kernels of layers in int8 against their plain functions: on CUDA if it is there, else by Triton's interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden_files import distance, flux_of, read
from torch import nn
from triton_device import CUDA, DEVICE, DTYPES  # skips where there is no Triton

from flux_core import kernels
from flux_core.kernels import fused, int8, int8_product, put
from flux_core.linears.contract import QuantizedTokens
from flux_core.linears.fp8 import E4M3, Fp8Linear, stays_bf16
from flux_core.linears.int8 import Int8Linear, group_for, product_of_tokens, quantize_rows
from flux_core.model import ops

ANYWHERE = ("gated_sum", "norm_rope", "norm_rope_join")
OURS = {name: getattr(int8, name) for name in ("modulate", "mlp", "linear2")}
# The CPU's epilogue has another GELU, the interpreter no bf16 product.
FUSED = (
    kernels._triton() if CUDA else ops.PLAIN._replace(**{name: getattr(fused, name) for name in ANYWHERE})
)._replace(**OURS)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def frozen(inputs, outputs, dtype=torch.bfloat16, **options):
    return nn.Linear(inputs, outputs, **options).requires_grad_(False).to(DEVICE, dtype)


def with_kernels(layer):
    layer.scaled, layer.quantize, layer.product = True, int8.quantize, int8_product.product
    return layer


def units(inputs, outputs, dtype=torch.bfloat16):
    """A layer that multiplies in int8, by the kernels."""
    return with_kernels(Int8Linear.of(frozen(inputs, outputs, dtype)))


def gelu(x):
    return F.gelu(x, approximate="tanh")


def near(found, exact, group):
    """Tokens against those of exact numbers, in fp64: another order of sums moves a code by one at most, and rarely."""
    codes, scale = quantize_rows(exact.float(), group)
    assert found.codes.dtype == torch.int8 and found.codes.shape == codes.shape and found.scale.shape == scale.shape
    torch.testing.assert_close(found.scale, scale, rtol=1e-5, atol=0)
    off = (found.codes.int() - codes.int()).abs()
    assert off.max() <= 1 and (off > 0).double().mean() < 1e-3


# Tokens


@DTYPES
@pytest.mark.parametrize("width", [12, 48, 320, 30, 256, 3072, 15360])
def test_quantize_is_the_plain_function_to_the_bit(dtype, width):
    """Groups of 4, 16, 64, none, and 256, and rows that are no power of two."""
    group, x = group_for(width), 3 * draw(2, 5, width, dtype=dtype)
    for one in (x, x[:, 2:], torch.zeros_like(x), x[0], x[:, :1].expand(-1, 3, -1), x.unflatten(1, (1, 5))):
        found, plain = int8.quantize(one, group), quantize_rows(one, group)
        assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)
        assert found.codes.shape == one.shape


def test_a_number_that_is_not_finite_reaches_the_scale():
    x, shift = draw(1, 4, 512), draw(1, 1, 512)
    x[0, 1, 3], x[0, 2, 400] = float("nan"), float("inf")
    hidden = x.repeat(1, 1, 2)
    for _, scale in (
        int8.quantize(x, 256),
        int8.modulate_op(x, shift, shift, 256),
        int8.join_gelu(x, draw(1, 4, 1024), 256),
        int8.join_gelu(draw(1, 4, 512), hidden, 256),
    ):
        assert scale.flatten().isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dim", [64, 320, 30, 3072])
def test_modulate(dim):
    x, mods = 3 * draw(2, 7, dim, dtype=torch.bfloat16) + 1, draw(2, 1, 6 * dim, dtype=torch.bfloat16).chunk(6, dim=-1)
    layer = units(dim, 16)
    for one in (x, x[:, 3:]):
        args = one, mods[3], mods[1]
        near(int8.modulate(*args, layer), ops.modulate(*(a.double() for a in args)), layer.group)


@DTYPES
@pytest.mark.parametrize(("dim", "mlp_dim"), [(0, 256), (256, 1024), (3072, 12288), (64, 1088), (30, 61)])
def test_join_gelu(dim, mlp_dim, dtype):
    attn, product = draw(2, 3, dim, dtype=dtype), 3 * draw(2, 3, 3 * dim + mlp_dim, dtype=dtype)
    hidden, group = product[..., 3 * dim :], group_for(dim + mlp_dim)
    exact = torch.cat((attn, gelu(hidden.double()).to(dtype)), dim=2)
    found = int8.join_gelu(attn, hidden, group)
    if CUDA or dtype == torch.float32:
        near(found, exact.double(), group)
    else:  # the interpreter cuts to bf16, and does not round
        plain = quantize_rows(exact, group)
        torch.testing.assert_close(found.scale, plain.scale, rtol=8e-3, atol=0)
        off = (found.codes.int() - plain.codes.int()).abs()
        assert off.max() <= 2 and (off > 0).double().mean() < 0.2


# The product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 16, 64), (70, 72, 320), (64, 130, 48), (300, 48, 256), (513, 200, 200)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_exact_up_to_its_last_rounding(M, N, K, dtype, bias):
    """By pointers, and by descriptors of tiles where rows are aligned."""
    layer = Int8Linear.of(frozen(K, N, dtype, bias=bias))
    tokens = quantize_rows(draw(1, M, K), layer.group)
    args = layer.weight, layer.weight_scale, layer.bias
    found, plain = int8_product.product(tokens, *args, dtype), product_of_tokens(tokens, *args, torch.float32)
    assert found.shape == (1, M, N) and found.dtype == dtype
    last = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # the interpreter cuts to bf16
    assert ((found.float() - plain).abs() <= last * plain.abs() + 2e-7 * plain.abs().max()).all()
    other = torch.full_like(found[0], float("nan"))
    for described in (False, all(map(int8_product.is_aligned, (tokens.codes[0], layer.weight, other)))):
        other.fill_(float("nan"))
        int8_product.product_of_tiles(tokens.codes[0], tokens.scale[0], *args, other, int8_product.SMALL, described)
        assert torch.equal(other, found[0])


def test_the_copy_engine_gets_rows_that_are_aligned():
    x = torch.zeros(8, 64, dtype=torch.int8)
    assert int8_product.is_aligned(x) and int8_product.is_aligned(x[:, 16:48])
    assert not int8_product.is_aligned(x[:, 8:]) and not int8_product.is_aligned(torch.zeros(8, 60, dtype=torch.int8))


def test_a_product_takes_a_weight_that_is_a_part_of_another():
    layer = Int8Linear.of(frozen(64, 48))
    wide = torch.cat((layer.weight, layer.weight), dim=1)[:, :64]
    tokens, rest = quantize_rows(draw(2, 5, 64), 64), (layer.weight_scale, layer.bias, torch.float32)
    found, expected = (int8_product.product(tokens, weight, *rest) for weight in (wide, layer.weight.detach()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_tiles_fit_into_a_cards_shared_memory(capability):
    room = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) * 1024
    for M in (1, 64, 65, 512, 4608, 16384):
        one = int8_product.tiles(M, capability)
        assert one.stages * (one.m + one.n) * one.k <= room


# Layers and models


@DTYPES
def test_the_layer_computes_as_its_plain_twin(dtype):
    layer, x = units(512, 48, dtype), draw(2, 5, 512, dtype=dtype)
    plain = copy.deepcopy(layer)
    plain.quantize, plain.product = quantize_rows, product_of_tokens
    assert distance(layer(x), plain(x)) < (1e-6 if dtype == torch.float32 else 8e-3)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == x.shape


@DTYPES
def test_mlp_and_linear2_are_those_of_their_layers(dtype):
    layers = nn.Sequential(units(256, 1024, dtype), nn.GELU(approximate="tanh"), units(1024, 256, dtype))
    x, last = draw(2, 7, 256, dtype=dtype), units(256 + 1024, 256, dtype)
    hidden = layers[0](x)

    def exact(layer, x):
        return F.linear(x.double(), layer.widen(torch.float32).double(), layer.bias.double())

    assert distance(int8.mlp(layers, x), exact(layers[2], gelu(hidden.double()))) < 0.015
    joined = torch.cat((x.double(), gelu(hidden.double())), dim=-1)
    assert distance(int8.linear2(last, x, hidden), exact(last, joined)) < 0.015


def test_a_group_is_never_of_both_parts():
    """256 divides 320 + 192, but no 256 are whole groups of attention's 320."""
    last, attn, hidden = units(320 + 192, 64, torch.float32), draw(1, 5, 320), draw(1, 5, 192)
    plain = last(torch.cat((attn, gelu(hidden)), dim=-1))
    assert distance(int8.linear2(last, attn, hidden), plain) < 1e-3


def test_each_consumer_gets_tokens_of_its_kind():
    args = draw(1, 3, 64, dtype=torch.bfloat16), *(draw(1, 1, 64, dtype=torch.bfloat16) for _ in range(2))
    as_fp8 = Fp8Linear.of(frozen(64, 48))
    as_fp8.scaled = True
    other = Int8Linear(torch.zeros(48, 64, dtype=torch.int8).to(DEVICE), torch.ones(48).to(DEVICE), None, 16)
    ours, theirs = int8.modulate(*args, units(64, 48)), int8.modulate(*args, as_fp8)
    assert ours.codes.dtype == torch.int8 and theirs.codes.dtype == E4M3
    assert not torch.equal(int8.modulate(*args, with_kernels(other)).codes, ours.codes)  # in its own groups
    hooked, idle = units(64, 48), units(64, 48)
    hooked.register_forward_hook(lambda *_: None)
    idle.scaled = False
    for consumer in (None, hooked, idle, frozen(64, 48)):
        assert torch.equal(int8.modulate(*args, consumer), fused.modulate(*args))
    layers = nn.Sequential(as_fp8, nn.GELU(approximate="tanh"), units(48, 16))
    assert isinstance(int8.modulate(*args, layers), QuantizedTokens)


def test_where_a_gradient_is_wanted_the_plain_twin_computes():
    x, mod, layer = draw(1, 3, 64).requires_grad_(), draw(1, 1, 64), units(64, 48, torch.float32)
    layer(int8.modulate(x, mod, mod, layer)).sum().backward()
    assert x.grad is not None
    hidden = draw(1, 3, 64).requires_grad_()
    int8.linear2(units(128, 16, torch.float32), mod.expand(1, 3, 64), hidden).sum().backward()
    assert hidden.grad is not None


def test_a_model_of_int8_linears_takes_tokens():
    golden = read("transformer_dev")
    dtype = torch.bfloat16 if CUDA else torch.float32  # the interpreter has no bf16 product
    model, inputs = flux_of(golden, dtype).to(DEVICE), {name: x[:1] for name, x in golden.group("in.").items()}
    inputs = {name: (x if name.endswith("ids") else x.to(dtype)).to(DEVICE) for name, x in inputs.items()}
    truth, seen = model(**inputs), []
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and not stays_bf16(name):
            model.set_submodule(name, Int8Linear.of(linear))
    layers = [one for one in model.modules() if isinstance(one, Int8Linear)]
    for one in layers:
        one.scaled = True
    plainly = model(**inputs)
    for one in layers:
        with_kernels(one)
        one.product = lambda x, *rest: (seen.append(x.codes.dtype), int8_product.product(x, *rest))[1]
    put(model, FUSED)
    found = model(**inputs)
    assert distance(found, truth) < 1.1 * distance(plainly, truth) + 1e-3 and distance(plainly, truth) < 0.05
    assert seen == [torch.int8] * len(layers)


@pytest.mark.gpu
def test_a_compiler_takes_the_kernels_whole():
    layers = nn.Sequential(units(512, 2048), nn.GELU(approximate="tanh"), units(2048, 512))
    x, mod = draw(1, 700, 512, dtype=torch.bfloat16), draw(1, 1, 512, dtype=torch.bfloat16)

    def block(x):
        return int8.mlp(layers, int8.modulate(x, mod, mod, layers))

    torch._dynamo.reset()
    assert distance(torch.compile(block, fullgraph=True)(x), block(x)) < 8e-3
    torch._dynamo.reset()
