"""NF4 and FP4: bitsandbytes' own tensors to the bit, how far numbers are rounded, and a layer that behaves as one."""

import copy
import hashlib
import json
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from golden_files import FOLDER, distance, read
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from flux_core.checkpoint import from_diffusers, write_safetensors
from flux_core.checkpoint.bnb import find_bnb
from flux_core.checkpoint.source import find_source
from flux_core.linears.codebooks import CODEBOOKS, FP4, NF4
from flux_core.linears.contract import dense, is_leaf, multiply_columns, takes_tokens
from flux_core.linears.nf4 import (
    CHUNK,
    Nf4Linear,
    as_bytes,
    codebook,
    dynamic_map,
    nearest,
    quantize,
    to_dense,
    widen_absmax,
)
from flux_core.model import Flux, FluxParams

GOLDEN = FOLDER / "nf4"
CASES = json.loads(read("nf4/tensors").metadata["cases"])
CPU = torch.device("cpu")
MODELS = {
    "bnb_nf4_v1": "model.diffusion_model.",
    "bnb_nf4_v2": "model.diffusion_model.",
    "diffusers_nf4": "",
}


def stored(path, prefix=""):
    """(tensors by role, shape, details) of each quantized weight of a file, and its plain tensors."""
    source = find_source(Path(path))
    state = {name: x for header in source.headers for name, x in load_file(header.path).items()}
    found, beside = find_bnb(source, prefix)
    quantized = {
        name.removeprefix(prefix): ({role: state[part] for role, part in one.parts.items()}, one.shape, one.details)
        for name, one in found.items()
    }
    plain = {
        name.removeprefix(prefix): x
        for name, x in state.items()
        if name.startswith(prefix) and name not in found and name not in beside
    }
    return quantized, plain


def model_files(name):
    return stored(GOLDEN / name if name == "diffusers_nf4" else GOLDEN / f"{name}.safetensors", MODELS[name])


@pytest.fixture(scope="module")
def cases():
    found, _ = stored(GOLDEN / "tensors.safetensors", "file.")
    return {name.removesuffix(".weight"): of for name, of in found.items()}


def linear(inputs=96, outputs=80, seed=0, bias=True):
    """80 rows of one and a half blocks."""
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)


# The tables


def test_nf4_is_quantiles_of_the_normal_distribution():
    """Closed form (QLoRA, appendix E, and bitsandbytes' create_normal_map): outermost at 1 - (1/30 + 1/32) / 2."""
    outer, quantile = 0.9677083, NormalDist().inv_cdf
    upper = [quantile(outer + (0.5 - outer) * i / 8) for i in range(8)]
    lower = [-quantile(outer + (0.5 - outer) * i / 7) for i in range(7)]
    exact = [x / quantile(outer) for x in sorted([*lower, 0.0, *upper])]
    torch.testing.assert_close(codebook("nf4", CPU).double(), torch.tensor(exact).double(), rtol=0, atol=1e-6)


def test_fp4_is_a_float_of_four_bits():
    """Sign, two bits of exponent, one of mantissa, as multiples of its largest; bitsandbytes' order of exponents."""
    eighths = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
    exact = torch.tensor([sign * x / 12 for sign in (1, -1) for x in eighths], dtype=torch.float32)
    assert torch.equal(codebook("fp4", CPU), exact)
    assert sorted({abs(12 * x) for x in FP4}) == pytest.approx([0, 1 / 16, 2, 3, 4, 6, 8, 12])


def test_the_tables_are_those_in_bitsandbytes_files_to_the_bit():
    state = load_file(GOLDEN / "tensors.safetensors")
    for name, case in CASES.items():
        assert torch.equal(state[f"file.{name}.weight.quant_map"], codebook(case["quant_type"], CPU))
    assert torch.equal(state["file.nested.weight.nested_quant_map"], dynamic_map(CPU))
    assert CODEBOOKS == {"nf4": NF4, "fp4": FP4}


def test_of_two_numbers_as_near_the_smaller_is_taken():
    numbers = torch.tensor([1.0, -1.0, 0.0, 0.5])
    x = torch.tensor([-2.0, -0.5, -0.49, 0.25, 0.26, 0.75, 3.0])
    assert numbers[nearest(x, numbers).int()].tolist() == [-1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 1.0]


# bitsandbytes' tensors


@pytest.mark.parametrize("name", CASES)
def test_what_bitsandbytes_codes_stand_for(cases, name):
    expected = read("nf4/tensors").tensors[f"out.{name}"]
    tensors, shape, details = cases[name]
    assert torch.equal(to_dense(*cases[name]), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(to_dense(tensors, shape, details, dtype), expected.to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_the_codes_are_those_that_bitsandbytes_finds(cases, name):
    tensors, _, details = cases[name]
    x = read("nf4/tensors").tensors[f"in.{name}"]
    ours, said = quantize(x, details["blocksize"], details["quant_type"], "nested_offset" in details)
    assert ours.keys() == tensors.keys() and said == details
    for role, codes in ours.items():
        assert torch.equal(codes, as_bytes(tensors[role]) if role == "weight" else tensors[role]), role


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_written_as_bitsandbytes_writes_it(cases, name):
    """JSON and all, so that its reader takes our files."""
    state = load_file(GOLDEN / "tensors.safetensors")
    expected = {key.removeprefix(f"file.{name}."): x for key, x in state.items() if key.startswith(f"file.{name}.")}
    found = Nf4Linear.read(*cases[name], None).tensors()
    assert found.keys() == expected.keys()
    expected["weight"] = as_bytes(expected["weight"])
    assert all(torch.equal(x, expected[end]) and x.dtype == expected[end].dtype for end, x in found.items())


@pytest.mark.parametrize("name", MODELS)
def test_models_of_bitsandbytes_give_the_official_velocity(name):
    golden = read(f"nf4/{name}.expect")
    quantized, plain = model_files(name)
    params = FluxParams(**json.loads(golden.metadata["params"]))
    wide = {weight: to_dense(*of) for weight, of in quantized.items()}
    if name in ("bnb_nf4_v1", "bnb_nf4_v2"):
        digests = {weight: hashlib.sha256(x.numpy().tobytes()).hexdigest() for weight, x in wide.items()}
        assert digests == json.loads(golden.metadata["sha256"])
    state = wide | {key: x.float() for key, x in plain.items()}
    state = state if name != "diffusers_nf4" else from_diffusers(state, params)
    for weight, rows in golden.group("rows.").items():
        assert torch.equal(state[weight][[0, -1]], rows), weight
    model = Flux(params)
    model.load_state_dict(state)
    with torch.no_grad():
        velocity = model(**golden.group("in."))
    torch.testing.assert_close(velocity, golden.tensors["out.velocity"], rtol=0, atol=1e-5)


# The numbers


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((64, 64), 64), ((7, 13), 32), ((3, 5, 9), 64), ((1,), 128)])
def test_a_number_is_rounded_by_half_a_gap_of_its_block_at_most(quant_type, shape, blocksize):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors, details = quantize(x, blocksize, quant_type, double=False)
    wide = to_dense(tensors, shape, details)
    gap = codebook(quant_type, CPU).sort().values.diff().max()
    for number, rounded in zip(x.flatten().split(blocksize), wide.flatten().split(blocksize), strict=True):
        largest = number.abs().max()
        assert ((number - rounded).abs() <= gap / 2 * largest * (1 + 1e-6)).all()
        assert rounded.abs().max() == largest  # both tables have 1 and -1
    assert wide.shape == shape and tensors["weight"].shape == (-(-x.numel() // 2), 1)


def test_errors_that_the_essay_tells():
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for double in (False, True):
        of = {kind: to_dense(*at(quantize(x, quant_type=kind, double=double), x.shape)) for kind in ("nf4", "fp4")}
        assert distance(of["nf4"], x) == pytest.approx(0.092, abs=5e-4)
        assert distance(of["fp4"], x) == pytest.approx(0.122, abs=5e-4)
    coded = sum(x.nbytes for role, x in quantize(x)[0].items() if "map" not in role)
    assert coded * 8 / x.numel() == pytest.approx(4.13, abs=0.005)


def at(quantized, shape):
    tensors, details = quantized
    return tensors, tuple(shape), details


@pytest.mark.parametrize("double", [False, True])
def test_blocks_of_zeros_and_of_outliers(double):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 3] = 0, 1e4
    wide = to_dense(*at(quantize(x, double=double), x.shape))
    assert wide.isfinite().all()
    if not double:  # whose absmax are of one scale
        assert torch.equal(wide[0], x[0]) and distance(wide[2:], x[2:]) < 0.12


@pytest.mark.gpu
@pytest.mark.parametrize("double", [True, False])
def test_a_card_finds_the_codes_that_the_cpu_finds(double):
    """Of many weights: a model that is quantized at home, to come in turns, is the one that is there whole."""
    for seed in range(20):
        weight = torch.randn(768, 1000, generator=torch.Generator().manual_seed(seed)).bfloat16()
        (ours, details), (theirs, same) = quantize(weight.cuda(), double=double), quantize(weight, double=double)
        assert details == same and all(torch.equal(x.cpu(), theirs[role]) for role, x in ours.items())


def test_chunks_are_no_part_of_the_result():
    x = torch.randn(CHUNK + 161, generator=torch.Generator().manual_seed(0))
    tensors, details = quantize(x, double=False)
    start, end = quantize(x[:CHUNK], double=False)[0], quantize(x[CHUNK:], double=False)[0]
    for role in ("weight", "absmax"):
        assert torch.equal(tensors[role], torch.cat((start[role], end[role])))
    assert to_dense(tensors, x.shape, details).shape == x.shape


def test_what_is_not_finite_stays_so():
    tensors, details = quantize(torch.ones(64, 64), double=False)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = tensors | {"absmax": tensors["absmax"].clone()}
        spoiled["absmax"][5] = bad
        assert not to_dense(spoiled, (64, 64), details)[5].isfinite().any()
    tensors, details = quantize(torch.ones(64, 64))

    def is_finite(tensors, shape=(64, 64), details=details):
        return bool(to_dense(tensors, shape, details).isfinite().all())

    assert is_finite(tensors)
    assert not is_finite(tensors | {"nested_absmax": torch.tensor([float("nan")])})
    spoiled = tensors["nested_quant_map"].clone()
    spoiled[tensors["absmax"][0].int()] = float("inf")
    assert not is_finite(tensors | {"nested_quant_map": spoiled})
    (spoiled,) = stored(GOLDEN / "bad" / "absmax_nan.safetensors")[0].values()
    assert not is_finite(*spoiled)


# The layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_a_linear_with_the_widened_weight_to_the_bit(bias):
    plain = linear(bias=bias)
    layer, x = Nf4Linear.of(plain), torch.randn(2, 5, 96).bfloat16()
    weight = to_dense(*at(quantize(plain.weight), plain.weight.shape), torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, weight, plain.bias)) and torch.equal(layer.widen(torch.bfloat16), weight)
    assert distance(layer(x), plain(x)) < 0.12
    assert is_leaf(layer) and not takes_tokens(layer)
    if bias:
        assert torch.equal(dense(layer, x)[0], weight) and dense(layer, x)[1] is layer.bias
    torch.testing.assert_close(multiply_columns(layer, x[..., :20], x[..., 20:]), layer(x), rtol=2e-2, atol=2e-2)


def test_a_cast_leaves_codes_and_their_numbers():
    layer = Nf4Linear.of(linear())
    before = {name: getattr(layer, name).clone() for name in Nf4Linear.CODES}
    for cast in (nn.Module.float, nn.Module.half, nn.Module.bfloat16):
        after = cast(layer).state_dict()
        assert after.keys() == before.keys() | {"bias"}
        assert all(torch.equal(after[name], x) and after[name].dtype == x.dtype for name, x in before.items())
    assert layer.float()(torch.ones(1, 96)).dtype == torch.float32


@pytest.mark.parametrize("double", [False, True])
def test_copies_and_state_dicts_are_the_layer(double):
    plain, other = linear(), linear(seed=1)
    layer, empty = (Nf4Linear(*at(quantize(x.weight, double=double), x.weight.shape), x.bias) for x in (plain, other))
    x = torch.randn(3, 96).bfloat16()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x)) and not torch.equal(empty(x), layer(x))
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    assert ("nested_absmax" in layer.state_dict()) == double
    assert f"nf4{', double quantization' * double}" in repr(layer)


@pytest.mark.parametrize("shape", [(96, 80), (7, 3), (2048, 64)])
def test_on_meta_it_has_the_sizes_of_the_values(shape):
    with torch.device("meta"):
        plain = nn.Linear(*shape).bfloat16()
    empty, full = Nf4Linear.of(plain), Nf4Linear.of(linear(*shape))
    sizes = [{name: (x.shape, x.dtype) for name, x in one.state_dict().items()} for one in (empty, full)]
    assert sizes[0] == sizes[1] and all(x.is_meta for x in empty.state_dict().values())
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(3, shape[0]).bfloat16()
    assert torch.equal(empty(x), full(x))


def test_compiled_layers_share_one_graph_whatever_their_offset():
    torch._dynamo.reset()
    layers, counter, x = [Nf4Linear.of(linear(seed=i)) for i in range(3)], CompileCounter(), torch.ones(1, 2, 96)
    x = x.bfloat16()
    expected = [layer(x) for layer in layers]
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_is_that_of_the_widened_weight(compiled):
    layer = Nf4Linear.of(linear())
    layer.bias.requires_grad_()
    x, grad = torch.randn(2, 3, 96).bfloat16().requires_grad_(), torch.randn(2, 3, 80).bfloat16()
    torch._dynamo.reset()
    y = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.widen(torch.bfloat16), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=1e-2, atol=1e-2)
    torch._dynamo.reset()


def test_transforms_of_functions_pass_it():
    layer, x = Nf4Linear.of(linear()).float(), torch.randn(4, 96)
    weight = layer.widen(torch.float32)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], x @ weight.t())
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), weight.sum(0).expand(4, -1))


# Files and joined layers


@pytest.mark.parametrize("double", [False, True])
def test_a_file_of_layers_is_read_as_it_was(tmp_path, double):
    plain = linear()
    layer = Nf4Linear(*at(quantize(plain.weight, double=double), plain.weight.shape), plain.bias)
    write_safetensors(tmp_path / "x.safetensors", {f"txt_in.{end}": x for end, x in layer.tensors().items()})
    quantized, others = stored(tmp_path / "x.safetensors")
    again = Nf4Linear.read(*quantized["txt_in.weight"], others["txt_in.bias"])
    assert quantized.keys() == {"txt_in.weight"} and others.keys() == {"txt_in.bias"}
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in layer.state_dict().items())
    assert again.original == "bfloat16"


def test_joined_rows_of_diffusers_are_the_official_layer():
    quantized, plain = model_files("diffusers_nf4")
    names = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    parts = [Nf4Linear.read(*quantized[f"{name}.weight"], None) for name in names]
    whole = Nf4Linear.joined(parts, torch.cat([plain[f"{name}.bias"] for name in names]))
    assert torch.equal(whole.weight, torch.cat([part.weight for part in parts]))
    assert whole.absmax.dtype == torch.float32 and whole.nested is None and whole.bias.shape == (192,)
    assert torch.equal(whole.widen(torch.float32), torch.cat([part.widen(torch.float32) for part in parts]))
    rows = read("nf4/diffusers_nf4.expect").tensors["rows.double_blocks.0.img_attn.qkv.weight"]
    assert torch.equal(whole.widen(torch.float32)[[0, -1]], rows)
    assert whole.tensors().keys() == {
        *("weight", "bias", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
    }


def test_what_can_be_joined():
    def part(outputs, inputs=32, double=False, **options):
        return Nf4Linear(*at(quantize(torch.randn(outputs, inputs), double=double, **options), (outputs, inputs)), None)

    mixed = [part(4), part(2, double=True), part(3)]  # a last part may end within a block
    whole = Nf4Linear.joined(mixed, None)
    assert torch.equal(whole.widen(torch.float32), torch.cat([one.widen(torch.float32) for one in mixed]))
    assert whole.out_features == 9 and whole.bias is None
    plain = Nf4Linear.joined([part(4), part(2)], None)
    assert plain.absmax.shape == (3,)
    assert Nf4Linear.joined([part(3), part(4)], None) is None
    assert Nf4Linear.joined([part(4), part(4, quant_type="fp4")], None) is None
    assert Nf4Linear.joined([part(4), part(4, blocksize=128)], None) is None
    assert Nf4Linear.joined([part(4), part(4, inputs=64)], None) is None


def test_absmax_of_double_quantization_is_near_what_it_was():
    """Between two numbers of the map the gap is at most 0.0141 of the block's largest deviation from the mean."""
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    exact, layer = quantize(x, double=False)[0]["absmax"], Nf4Linear.of(linear_of(x))
    found = widen_absmax(layer.absmax, layer.nested)
    deviation = (exact - exact.mean()).abs().max()
    assert layer.absmax.dtype == torch.uint8 and (found - exact).abs().max() < 0.0141 / 2 * deviation * 1.01


def linear_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
