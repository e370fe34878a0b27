"""int8 with rotation: what the codes are, how far they round, and that a layer of them is a Linear wherever it goes."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from units import SHORTAGES, card_with

from flux_core import load_pipeline
from flux_core.linears import fp8, int8
from flux_core.linears.branch import BranchedLinear, LowRank, Shift
from flux_core.linears.contract import QuantizedTokens, dense, is_leaf, multiply_columns, takes_tokens
from flux_core.linears.int8 import (
    Int8Linear,
    dequantize,
    group_for,
    hadamard,
    has_int8_units,
    product_of_tokens,
    quantize_rows,
    rotate,
    to_dense,
)
from flux_core.methods import calibration
from flux_core.request.generation import GenerationRequest

CPU = torch.device("cpu")
GROUPS = (4, 16, 64, 256)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def frozen(inputs=512, outputs=48, dtype=torch.float32, **options):
    return nn.Linear(inputs, outputs, **options).requires_grad_(False).to(dtype)


def units(inputs=512, outputs=48, dtype=torch.float32):
    """A layer that multiplies in int8, which the CPU does, too."""
    layer = Int8Linear.of(frozen(inputs, outputs, dtype))
    layer.scaled = True
    return layer


def heavy_tailed(*shape):
    """Rows as transformers have them: most numbers small, a few very large."""
    return torch.randn(*shape) * torch.exp(1.5 * torch.randn(shape[-1]))


def error(found, exact):
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


# The rotation


def matrix(group):
    """R's block entry by entry: -1 for each base-4 digit of row and column that add up to 3, over the root."""

    def digits(number):
        return [number // 4**k % 4 for k in range((group.bit_length() - 1) // 2)]

    signs = [
        [(-1) ** sum(a + b == 3 for a, b in zip(digits(i), digits(j), strict=True)) for j in range(group)]
        for i in range(group)
    ]
    return torch.tensor(signs, dtype=torch.float64) / group**0.5


@pytest.mark.parametrize("group", GROUPS)
def test_the_block_is_a_regular_hadamard_matrix(group):
    block = hadamard(group, torch.float64, "cpu")
    assert torch.equal(block, matrix(group))
    assert torch.equal(block, block.t()) and torch.equal(block @ block, torch.eye(group, dtype=torch.float64))
    assert torch.equal(block.sum(1), torch.ones(group, dtype=torch.float64))  # regular: a constant row stays one


@pytest.mark.parametrize("group", GROUPS)
def test_a_rotation_is_a_product_with_the_block(group):
    x = heavy_tailed(2, 3, 3 * group)
    exact = (x.double().unflatten(-1, (3, group)) @ matrix(group)).flatten(-2)
    found = rotate(x, group)
    assert found.dtype == torch.float32 and found.shape == x.shape
    assert error(found, exact) < 2e-7
    assert error(rotate(found, group), x) < 3e-7  # R R = 1
    many = torch.randint(-128, 128, (5000, group)).to(torch.int8)  # more than one part, and codes: exact
    assert torch.equal(rotate(many, group).double(), many.double() @ matrix(group))


def kitchens(x, group):
    """ComfyUI's CUDA kernel, one output after the other: half of each sum, from left to right."""
    for stride in (4**k for k in range((group.bit_length() - 1) // 2)):
        digits = x.reshape(*x.shape[:-1], -1, 4, stride).unbind(-2)
        rows = []
        for d in range(4):
            total = None
            for k, value in enumerate(digits):
                term = -value if k == 3 - d else value
                total = term if total is None else total + term
            rows.append(0.5 * total)
        x = torch.stack(rows, -2).reshape(x.shape)
    return x


@pytest.mark.parametrize("group", GROUPS)
def test_sums_have_the_order_of_comfyuis_kernel(group):
    x = heavy_tailed(40, 2 * group)
    assert torch.equal(rotate(x, group), kitchens(x, group))


def test_the_largest_group_that_divides():
    sizes = {3072: 256, 15360: 256, 256: 256, 320: 64, 48: 16, 12: 4, 30: 0}
    assert {features: group_for(features) for features in sizes} == sizes
    for group in (2, 8, 128, 3, 0, -4):
        with pytest.raises(ValueError, match="power of 4"):
            hadamard(group, torch.float32, "cpu")
    with pytest.raises(ValueError, match="groups of 256 features do not divide 320"):
        Int8Linear(torch.zeros(4, 320, dtype=torch.int8), torch.ones(4), None, 256)


# Codes


def plainly(weight, group):
    """Codes and scales by the formula, with R as an explicit matrix in fp64; the rotated number is rounded to fp32."""
    rotated = (weight.double().unflatten(-1, (-1, group)) @ matrix(group)).flatten(-2).float()
    scale = rotated.abs().amax(1, keepdim=True) / torch.tensor(127, dtype=torch.float32)
    return (rotated / scale).round().clamp(-127, 127).to(torch.int8), scale


@pytest.mark.slow
def test_codes_of_a_models_weights_to_the_bit():
    """All of flux-mini's: the order of fp32 sums decides about no code, and about the last bit of some scales."""
    model = load_pipeline("flux-mini", "cpu", "bfloat16").model
    off, rows = 0, 0
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and not fp8.stays_bf16(name):
            layer, (codes, scale) = Int8Linear.of(linear), plainly(linear.weight, 256)
            assert layer.group == 256 and torch.equal(layer.weight, codes), name
            torch.testing.assert_close(layer.weight_scale[:, None], scale, rtol=2.5e-7, atol=0)
            off, rows = off + int((layer.weight_scale[:, None] != scale).sum()), rows + len(scale)
    assert off < 0.02 * rows


@pytest.mark.parametrize("group", GROUPS)
def test_codes_of_bf16_weights_to_the_bit(group):
    weight = heavy_tailed(300, 4 * group).bfloat16()
    (codes, scale), (plain, its) = quantize_rows(weight, group), plainly(weight, group)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (300, 1)
    assert torch.equal(codes, plain)
    torch.testing.assert_close(scale, its, rtol=2.5e-7, atol=0)
    assert torch.equal(codes.abs().amax(1), torch.full((300,), 127, dtype=torch.int8))  # every row fills the range


def test_halves_go_to_the_even_code():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 3.5]])
    codes, scale = quantize_rows(row, 0)
    assert scale.item() == 1 and codes.tolist() == [[127, 0, 2, 2, 0, -2, -127, 4]]


def test_rows_of_zeros_and_of_numbers_that_are_not_finite():
    x = torch.randn(4, 256)
    x[0], x[1, 3], x[2, 3] = 0, float("nan"), float("inf")
    codes, scale = quantize_rows(x, 256)
    assert not codes[0].any() and scale[0] > 0 and scale[3].isfinite()
    assert not scale[1:3].isfinite().any()
    ones = torch.ones(8, 256, dtype=torch.int8), torch.ones(8)
    y = product_of_tokens(QuantizedTokens(codes, scale), *ones, None, torch.float32)
    assert not y[1:3].isfinite().any() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("group", [0, *GROUPS])
def test_a_number_is_off_by_half_a_step_at_most(group):
    x = heavy_tailed(64, 1024)
    codes, scale = quantize_rows(x, group)
    exact = x.double() if not group else (x.double().unflatten(-1, (-1, group)) @ matrix(group)).flatten(-2)
    assert ((codes.double() * scale.double() - exact).abs() <= scale.double() * (0.5 + 1e-4)).all()
    assert error(dequantize(codes, scale[:, 0], group, torch.float32), x) == pytest.approx(
        error(codes.double() * scale.double(), exact), rel=1e-3
    )  # rotations keep distances


def test_rotated_int8_is_nearer_than_fp8_and_than_int8_as_it_is():
    """On rows with outliers, in a product with both sides quantized: a third of e4m3's error, as of a Gaussian's."""
    x, weight = heavy_tailed(64, 3072), heavy_tailed(96, 3072)
    exact = x.double() @ weight.double().t()

    def product(quantize):
        (a, s), (b, t) = quantize(x), quantize(weight)
        return error((a.double() * s.double()) @ (b.double() * t.double()).t(), exact)

    of_fp8, plain = product(fp8.quantize_rows), product(lambda x: quantize_rows(x, 0))
    rotated = product(lambda x: quantize_rows(x, 256))
    assert rotated < 0.45 * of_fp8 and rotated < 0.45 * plain, (rotated, of_fp8, plain)
    # closed form: a Gaussian's largest of 3072 is 3.6 to 4.4 of its root of the mean square
    codes, scale = quantize_rows(weight, 256)
    assert 0.008 < error(dequantize(codes, scale[:, 0], 256, torch.float32), weight) < 0.0115


# Products


@pytest.mark.parametrize("size", [(1, 64, 16), (7, 256, 48), (70, 320, 24), (3000, 16, 16)])
def test_sums_are_exact(size):
    M, K, N = size
    codes, weight = (torch.randint(-127, 128, (n, K)).to(torch.int8) for n in (M, N))
    exact = codes.double() @ weight.double().t()
    assert torch.equal(int8.sums(codes, weight).double(), exact)
    scale, rows, bias = torch.rand(M, 1) / 127, torch.rand(N) / 127, torch.randn(N)
    y = product_of_tokens(QuantizedTokens(codes, scale), weight, rows, bias, torch.float32)
    assert error(y, exact * scale.double() * rows.double() + bias.double()) < 2e-7


def test_the_longest_rows_do_not_overflow():
    codes = torch.full((1, 15360), -127, dtype=torch.int8)
    assert int8.sums(codes, codes).item() == 15360 * 127**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_where_units_multiply_both_sides_are_rounded_and_nothing_else(dtype, bias):
    linear, x = frozen(dtype=dtype, bias=bias), torch.randn(2, 5, 512).to(dtype)
    layer = Int8Linear.of(linear)
    layer.scaled = True
    codes, scale = quantize_rows(x, 256)
    exact = (codes.double() * scale.double()) @ (layer.weight.double() * layer.weight_scale.double()[:, None]).t()
    exact = exact if linear.bias is None else exact + linear.bias.double()
    y = layer(x)
    assert y.shape == (2, 5, 48) and y.dtype == dtype
    assert error(y, exact) < {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert 0.001 < error(y, linear.double()(x.double())) < 0.02
    tokens = layer(QuantizedTokens(codes, scale))
    assert torch.equal(tokens, y if bias else layer.of_tokens(QuantizedTokens(codes, scale), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_only_the_weights_are_rounded(dtype):
    linear, x = frozen(dtype=dtype), heavy_tailed(2, 5, 512).to(dtype)
    layer = Int8Linear.of(linear)
    assert layer.scaled is has_int8_units(CPU) is False
    exact = F.linear(x.double(), layer.widen(torch.float32).double(), layer.bias.double())
    assert layer(x).dtype == dtype and error(layer(x), exact) < (1e-6 if dtype == torch.float32 else 6e-3)
    assert error(layer(x), linear.double()(x.double())) < 0.02
    weight, bias = layer.dense(dtype)
    assert bias is layer.bias and error(F.linear(x, weight, bias), exact) < (1e-6 if dtype == torch.float32 else 6e-3)


# The layer


def test_what_it_tells_fused_code():
    layer, x = Int8Linear.of(frozen()), torch.randn(1, 3, 512)
    assert is_leaf(layer, x) and not takes_tokens(layer) and dense(layer, x)[1] is layer.bias
    assert error(multiply_columns(layer, x[..., :256], x[..., 256:]), layer(x)) < 1e-6
    layer.scaled = True
    assert takes_tokens(layer) and dense(layer, x) is None
    assert torch.equal(multiply_columns(layer, x[..., :256], x[..., 256:]), layer(x))
    layer.bias.requires_grad_()
    assert not takes_tokens(layer) and "group=256, scaled" in repr(layer)


def same(one, other):
    assert one.keys() == other.keys()
    assert all(x.dtype == other[name].dtype and torch.equal(x, other[name]) for name, x in one.items())


def test_casts_copies_and_state_dicts_keep_codes_and_scales():
    layer, x = Int8Linear.of(frozen()), torch.randn(2, 512)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    for other in (copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer).half().to(torch.bfloat16)):
        after = other.state_dict()
        assert after.pop("bias").dtype == torch.bfloat16 and other(x.bfloat16()).dtype == torch.bfloat16
        same({name: x for name, x in before.items() if name != "bias"}, after)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.weight.data_ptr() != layer.weight.data_ptr()
    empty = Int8Linear.of(nn.Linear(512, 48, device="meta"))
    assert {name: (x.shape, x.dtype) for name, x in empty.state_dict().items()} == {
        name: (x.shape, x.dtype) for name, x in before.items()
    }
    empty.load_state_dict(before, assign=True)
    assert torch.equal(empty(x), layer(x)) and not empty.weight.requires_grad


@pytest.mark.parametrize("way", ["units", "widened"])
def test_gradients_pass_to_the_inputs_by_the_widened_weight(way):
    layer, x = units(), torch.randn(3, 512, requires_grad=True)
    layer.scaled = way == "units"
    grad = torch.randn(3, 48)
    y = layer(x)
    y.backward(grad)
    assert error(x.grad, grad @ layer.widen(torch.float32)) < 1e-6
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    layer.bias.requires_grad_()
    layer(x.detach()).backward(grad)
    assert error(layer.bias.grad, grad.sum(0)) < 1e-6

    def total(x):
        return layer(x).square().sum()

    assert error(torch.func.grad(total)(x.detach()), torch.autograd.grad(total(x), x)[0]) < 0.02
    assert torch.func.vmap(layer)(x.detach()[None]).shape == (1, 3, 48)


@pytest.mark.parametrize("way", ["units", "widened"])
def test_a_compiler_takes_it_whole(way):
    torch._dynamo.reset()
    layer, x, counter = units(), torch.randn(2, 5, 512), CompileCounter()
    layer.scaled = way == "units"
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    assert torch.equal(compiled(x), layer(x)) and counter.frame_count == 1
    x.requires_grad_()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert error(x.grad, layer.widen(torch.float32).sum(0).expand_as(x)) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["units", "widened"])
def test_low_rank_branches_beside_it(way):
    layer, x = units(), torch.randn(2, 5, 512)
    layer.scaled = way == "units"
    own, branched = layer(x), BranchedLinear(layer)
    down, up, shift = torch.randn(4, 512) / 16, torch.randn(48, 4) / 16, torch.randn(48)
    branched.add("some", [LowRank(down, up, torch.full((4,), 0.5)), Shift(shift)])
    expected = own.double() + 0.5 * (x.double() @ down.double().t()) @ up.double().t() + shift
    assert error(branched(x), expected) < 1e-6
    assert error(branched.multiply_columns(x[..., :256], x[..., 256:]), expected) < 1e-6
    assert not takes_tokens(branched)
    before = layer.state_dict()
    branched.remove("some")
    assert torch.equal(branched(x), own)
    same(before, layer.state_dict())


# Files


def test_what_a_file_gets_is_what_it_is_read_from():
    for features in (512, 30):
        layer, x = Int8Linear.of(frozen(features)), torch.randn(2, features)
        file = layer.tensors()
        said = json.loads(bytes(file["comfy_quant"].tolist()))
        rotation = {"convrot": True, "convrot_groupsize": 256} if features == 512 else {}
        assert said == {"format": "int8_tensorwise", **rotation}
        assert file["weight"].dtype == torch.int8 and file["weight_scale"].shape == (48, 1)
        again = Int8Linear.read(file, (48, features), said, layer.bias.detach())
        same(again.state_dict(), layer.state_dict())
        assert torch.equal(again(x), layer(x))
        assert torch.equal(to_dense(file, (48, features), said), layer.widen(torch.float32))
        assert torch.equal(to_dense(file, (48, features), said, torch.bfloat16), layer.widen(torch.float32).bfloat16())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
@pytest.mark.parametrize("details", [{}, {"convrot": False}, {"convrot": True, "convrot_groupsize": 16}])
def test_scales_of_rows_or_of_the_tensor(shape, details):
    codes, scale = torch.randint(-128, 128, (6, 32)).to(torch.int8), torch.rand(shape)
    tensors = {"weight": codes, "weight_scale": scale}
    exact = codes.double() * scale.double().reshape(-1, 1)
    if details.get("convrot"):
        exact = (exact.unflatten(-1, (2, 16)) @ matrix(16)).flatten(-2)
    assert error(to_dense(tensors, (6, 32), details), exact) < 1e-7
    layer = Int8Linear.read(tensors, (6, 32), details, None)
    assert torch.equal(layer.weight, codes) and layer.weight_scale.shape == (6,)
    assert error(layer.widen(torch.float32), exact) < 1e-7
    with pytest.raises(ValueError, match="a group of 32"):
        to_dense(tensors, (6, 32), {"convrot": True, "convrot_groupsize": 32})


def test_shapes_that_are_no_matrix():
    codes = torch.randint(-128, 128, (6, 4, 2, 2)).to(torch.int8)
    found = to_dense({"weight": codes, "weight_scale": torch.arange(6.0)}, (6, 4, 2, 2), {})
    assert torch.equal(found, codes * torch.arange(6.0)[:, None, None, None])
    number = to_dense({"weight": codes[0, 0, 0], "weight_scale": torch.tensor(2.0)}, (2,), {})
    assert torch.equal(number, 2.0 * codes[0, 0, 0])


def test_rows_of_several_become_one_layer():
    q, k, v = (Int8Linear.of(frozen(outputs=n)) for n in (16, 32, 8))
    x, bias = torch.randn(3, 512), torch.cat([one.bias.detach() for one in (q, k, v)])
    joined = Int8Linear.joined((q, k, v), bias)
    assert torch.equal(joined.weight, torch.cat((q.weight, k.weight, v.weight)))
    torch.testing.assert_close(joined(x), torch.cat((q(x), k(x), v(x)), dim=-1))
    other = Int8Linear(k.weight.detach(), k.weight_scale, None, 64)
    assert Int8Linear.joined((q, other), None) is None


# A model


def test_flux_minis_velocity_is_off_by_a_tenth_of_what_it_is_in_fp8(monkeypatch):
    """In squares; both sides rounded."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import velocity_error as benchmark

    pipeline = load_pipeline("flux-mini", "cpu", "float32")
    request = GenerationRequest(prompt="a red apple", seed=0, num_steps=4, width=128, height=128)
    with torch.no_grad():
        paths = calibration.trajectories(pipeline, [pipeline.complete(request)])
        exact = benchmark.calibration.velocities(pipeline, paths)
    names = "fp8", "int8", "int8 weights"
    of = {name: benchmark.velocity_error(pipeline, paths, exact, benchmark.FORMATS[name]) for name in names}
    assert (of["int8"] / of["fp8"]) ** 2 < 0.15 and of["int8 weights"] < of["int8"] < 0.03, of
    with torch.no_grad():
        assert torch.equal(benchmark.calibration.velocities(pipeline, paths), exact)  # the model is as it was
    sys.modules.pop("velocity_error")


# The units


@pytest.fixture
def card(monkeypatch):
    return card_with(monkeypatch, (7, 5))


@pytest.mark.parametrize("shortage", SHORTAGES, ids=["torch", "cublas"])
def test_a_shortage_during_the_trial_of_the_units_is_raised_and_forgotten(monkeypatch, card, shortage):
    real, answers = int8.sums, [shortage]

    def sums(*args):
        if answers:
            raise answers.pop()
        return real(*args)

    monkeypatch.setattr(int8, "sums", sums)
    with pytest.raises(RuntimeError) as found:
        has_int8_units(card)
    assert found.value is shortage
    assert has_int8_units(card)


def test_units_that_compute_something_else_are_none(monkeypatch, card):
    asked, real = [], int8.sums

    def wrong(*args):
        asked.append(1)
        return real(*args) + 1

    monkeypatch.setattr(int8, "sums", wrong)
    assert not has_int8_units(card) and not has_int8_units(card)
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 512])
def test_the_units_and_the_cpu_agree(tokens):
    device = torch.device("cuda", torch.cuda.current_device())
    if not has_int8_units(device):
        pytest.skip("this card has no int8 units")
    linear, x = frozen(3072, 512, torch.bfloat16), torch.randn(1, tokens, 3072).bfloat16()
    layer, on_card = Int8Linear.of(linear), Int8Linear.of(copy.deepcopy(linear).to(device))
    layer.scaled = True
    assert on_card.scaled and error(on_card(x.to(device)).cpu(), layer(x)) < 2**-8
    same(copy.deepcopy(on_card).cpu().state_dict(), layer.state_dict())
    assert copy.deepcopy(on_card).cpu().scaled is False
