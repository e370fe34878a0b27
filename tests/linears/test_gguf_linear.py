"""ggml's blocks: the numbers they stand for, to the bit; the codes that are written; and the layer that holds them."""

import copy
import hashlib
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from golden_files import FOLDER, distance, read
from torch import nn

from flux_core.checkpoint.gguf import read_gguf
from flux_core.checkpoint.names import renamed
from flux_core.errors import FileError, UsageError
from flux_core.linears import contract, gguf
from flux_core.linears.gguf import PACK, UNPACK, GgufLinear, quantize, to_dense, unpack
from flux_core.linears.gguf_types import TYPES, size_of

GOLDEN = FOLDER / "gguf"
FIRST = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
EACH = pytest.mark.parametrize("kind", UNPACK)
WRITTEN = pytest.mark.parametrize("kind", PACK)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def same(one, other):
    """To the bit, the sign of zero included."""
    assert one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


def blocks(kind, count=40):
    """Random whole blocks, with the scales of the golden file."""
    raw = read("gguf/peer").tensors.get(f"raw.{kind}")
    if raw is None:
        return torch.randint(0, 60, (count * TYPES[kind].size,), dtype=torch.uint8)
    return raw.repeat(-(-count // len(raw)), 1)[:count].flatten()


# The numbers ---------------------------------------------------------------------------------------------


def test_every_type_is_widened():
    assert UNPACK.keys() == TYPES.keys()


@pytest.mark.parametrize("kind", [kind for kind in UNPACK if kind not in ("F32", "F16", "BF16")])
def test_values_are_those_of_gguf_py(kind):
    """Scales of either sign from subnormal fp16 to 1, and one of zero."""
    golden = read("gguf/peer").tensors
    out = golden[f"out.{kind}"]
    same(to_dense({"weight": golden[f"raw.{kind}"]}, tuple(out.shape), {"type": kind}), out)


@pytest.mark.parametrize("name", read("gguf/types").group("raw.types."))
def test_values_of_rows(name):
    golden, kind = read("gguf/types"), name.split(".")[0]
    out = golden.tensors[f"out.types.{name}"]
    same(to_dense({"weight": golden.tensors[f"raw.types.{name}"]}, tuple(out.shape), {"type": kind}), out)


def dense(name):
    """The tensors of a golden file, by their names without a prefix, those of T5 by transformers'."""
    path = GOLDEN / f"{name}.gguf"
    header, raw, found = read_gguf(path), path.read_bytes(), {}
    for key, entry in header.tensors.items():
        codes = torch.frombuffer(bytearray(raw[entry.start : entry.end]), dtype=torch.uint8)
        bare = key.removeprefix("model.diffusion_model.").removeprefix("text_encoders.t5xxl.transformer.")
        found[bare] = to_dense({"weight": codes}, entry.shape, {"type": entry.dtype})
    part = "t5" if name.startswith("t5") else "transformer"
    return {ours: found[theirs] for ours, theirs in renamed(found, part).items()}


@pytest.mark.parametrize("name", [path.stem for path in sorted(GOLDEN.glob("flux_*.gguf"))])
def test_whole_files_stand_for_the_tensors_of_their_hashes(name):
    golden, found = read(f"gguf/{name}"), dense(name)
    hashes = json.loads(golden.metadata["sha256"])
    assert {key: hashlib.sha256(x.numpy().tobytes()).hexdigest() for key, x in found.items()} == hashes
    for key, rows in golden.group("rows.").items():
        same(found[key][[0, -1]], rows)


@pytest.mark.parametrize("name", ["t5_q8_0", "t5_sdcpp_q4_0"])
def test_t5_encodes_as_transformers_does(name):
    from transformers import T5Config, T5EncoderModel

    golden = read(f"gguf/{name}")
    model = T5EncoderModel(T5Config(**json.loads(golden.metadata["params"]))).eval()
    left = model.load_state_dict(dense(name), strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"encoder.embed_tokens.weight"}
    with torch.no_grad():
        found = model(golden.tensors["in.input_ids"]).last_hidden_state
    torch.testing.assert_close(found, golden.tensors["out.last_hidden_state"], rtol=0, atol=1e-5)


def test_every_fp16_scale_is_what_fp16_says():
    """All 63,488 finite ones, a block for each, of codes 1, -1 and 127."""
    scales = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scales = scales[scales.isfinite()]
    codes = torch.tensor([1, -1, 127, 0] * 8, dtype=torch.int8).view(torch.uint8).expand(len(scales), 32)
    found = unpack(torch.cat([scales[:, None].view(torch.uint8), codes], dim=1).flatten(), "Q8_0", torch.float32)
    expected = scales.double()[:, None] * codes.view(torch.int8)
    assert len(scales) == 63_488 and torch.equal(found.double().view(-1, 32), expected)


@EACH
def test_a_number_is_rounded_once_and_chunks_leave_no_trace(kind, monkeypatch):
    codes = blocks(kind)
    exact = unpack(codes, kind, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(unpack(codes, kind, dtype), exact.to(dtype))
    monkeypatch.setattr(gguf, "CHUNK", 3 * TYPES[kind].block)
    same(unpack(codes, kind, torch.float32), exact)
    assert unpack(codes[:0], kind, torch.bfloat16).shape == (0,)


# Codes that are written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIRST)
def test_codes_are_those_of_gguf_py(kind):
    golden = read("gguf/peer").tensors
    assert torch.equal(quantize(golden["in.source"], kind), golden[f"codes.{kind}"].flatten())
    types = read("gguf/types").tensors
    if (source := types.get(f"in.types.{kind}.quantized")) is not None:
        assert torch.equal(quantize(source, kind), types[f"raw.types.{kind}.quantized"].flatten())


ERROR = {
    "Q4_0": 0.1,
    "Q4_1": 0.09,
    "Q5_0": 0.05,
    "Q5_1": 0.045,
    "Q8_0": 0.006,
    "Q4_K": 0.08,
    "Q5_K": 0.04,
    "Q6_K": 0.02,
}
"""rms, of normal numbers, in deviations"""


@WRITTEN
def test_how_far_normal_numbers_are_rounded(kind):
    x = 0.02 * torch.randn(64, 512)
    error = (unpack(quantize(x, kind), kind, torch.float32).view_as(x) - x).norm() / x.norm()
    assert ERROR[kind] / 2 < error < ERROR[kind], error


@WRITTEN
def test_zeros_stay_zeros_and_chunks_leave_no_trace(kind, monkeypatch):
    x = torch.randn(8, 512)
    x[2:4] = 0
    codes = quantize(x, kind)
    dense = unpack(codes, kind, torch.float32).view_as(x)
    assert torch.equal(dense[2:4], torch.zeros(2, 512)) and dense.isfinite().all()
    assert torch.equal(quantize(x.bfloat16(), kind), quantize(x.bfloat16().float(), kind))
    monkeypatch.setattr(gguf, "CHUNK", 3 * TYPES[kind].block)
    assert torch.equal(quantize(x, kind), codes)


def squared(x, dense):
    """Errors of blocks: [..., n] -> [...]"""
    return (x.double() - dense.double()).square().sum(-1)


def best_of(x, dense):
    """Of some dense forms of x [..., n]: the number of that with the smallest error, for each block, and the error."""
    return torch.stack([squared(x, y) for y in dense]).min(0)


def rounded(x, scale, low, least, most):
    return ((x + low) / torch.where(scale == 0, 1, scale)).round().clamp(least, most) * scale - low


def plain_search(x, top):
    """The error of blocks [n, 8, 32] by 300 scales for a minimum that is the block's own, then both in six bits."""
    low = -x.amin(-1, keepdim=True).clamp(max=0)
    reach, shares = (x.amax(-1, keepdim=True) + low) / top, torch.linspace(0.6, 1.2, 300)
    share = best_of(x, (rounded(x, share * reach, low, 0, top) for share in shares)).indices
    scale = shares[share][..., None] * reach
    scale, low = (u * (y / u).round() for y in (scale, low) for u in [(y.amax(1, keepdim=True) / 63).half().float()])
    return squared(x, rounded(x, scale, low, 0, top)).sum()


def every_pair(x, d, dmin, top):
    """The smallest error of blocks [n, 8, 32] over all 64 * 64 codes of scale and minimum."""
    pairs = itertools.product(d * torch.arange(64)[:, None, None, None], dmin * torch.arange(64)[:, None, None, None])
    best = torch.full(x.shape[:2], torch.inf, dtype=torch.float64)
    for scale, low in pairs:
        best = torch.minimum(best, squared(x, rounded(x, scale, low, 0, top)))
    return best.sum()


DRAWS = {
    "normal": lambda: 0.02 * torch.randn(6, 256),
    "heavy": lambda: 0.02 * torch.randn(6, 256) * torch.randn(6, 256).exp(),
    "shifted": lambda: torch.randn(6, 256) - 1.5,
    "large": lambda: 1e4 * torch.randn(6, 256),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("kind", "top"), [("Q4_K", 15), ("Q5_K", 31)])
def test_scales_and_minima_of_k_types_are_near_the_best(kind, top, draw):
    """Better than a plain search, and near the best of all pairs for these d and dmin."""
    x = DRAWS[draw]()
    codes, x = quantize(x, kind), x.view(-1, 8, 32)
    error = squared(x, unpack(codes, kind, torch.float32).view_as(x)).sum()
    d, dmin = codes.view(len(x), -1)[:, :4].view(torch.float16).float()[..., None, None].unbind(1)
    assert error < plain_search(x, top) and error < 1.06 * every_pair(x, d, dmin, top)


@pytest.mark.parametrize("draw", DRAWS)
def test_scales_of_q6_k_are_near_the_best(draw):
    """As good as a plain search by 600 scales, rounded to eight bits, and near the best of all for this d."""
    x = DRAWS[draw]()
    codes, x = quantize(x, "Q6_K"), x.view(-1, 16, 16)
    error = squared(x, unpack(codes, "Q6_K", torch.float32).view_as(x)).sum()
    d = codes.view(6, -1)[:, 208:].view(torch.float16).float()[..., None]
    each = d * torch.arange(-128, 128)[:, None, None, None]
    assert error < 1.05 * best_of(x, (rounded(x, s, 0, -32, 31) for s in each)).values.sum()
    reach, shares = x.abs().amax(-1, keepdim=True) / 32, torch.linspace(-1.2, 1.2, 600)
    share = best_of(x, (rounded(x, share * reach, 0, -32, 31) for share in shares)).indices
    scale = shares[share][..., None] * reach
    unit = (scale.abs().amax(1, keepdim=True) / 127).half().float()
    assert error < 1.02 * squared(x, rounded(x, unit * (scale / unit).round(), 0, -32, 31)).sum()


def test_scales_that_are_subnormal_in_fp16_still_round_small_weights():
    x = 1e-5 * torch.randn(8, 256)
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        assert distance(unpack(quantize(x, kind), kind, torch.float32).view_as(x), x) < ERROR[kind]


# The layer -----------------------------------------------------------------------------------------------


def layer(kind="Q4_K", rows=24, columns=256, bias=True):
    """Of random codes in the file's form."""
    codes = blocks(kind, rows * columns // TYPES[kind].block)
    return GgufLinear.read({"weight": codes}, (rows, columns), {"type": kind}, torch.randn(rows) if bias else None)


@EACH
def test_it_is_the_linear_of_its_dense_weight_to_the_bit(kind):
    one, x = layer(kind), torch.randn(2, 5, 256)
    plain = to_dense({"weight": one.weight}, (24, 256), {"type": kind})
    assert torch.equal(one(x), F.linear(x, plain, one.bias))
    assert distance(contract.multiply_columns(one, x[..., :100], x[..., 100:]), one(x)) < 1e-6
    one.bfloat16()
    assert torch.equal(one(x.bfloat16()), F.linear(x.bfloat16(), plain.bfloat16(), one.bias))
    weight, bias = contract.dense(one, x.bfloat16())
    assert torch.equal(weight, plain.bfloat16()) and bias is one.bias


def test_moves_casts_copies_and_states_leave_its_codes():
    one = layer("Q5_1")
    codes = one.weight.clone()
    for other in (copy.deepcopy(one), one.bfloat16(), one.to("cpu"), one.to(torch.float64).float()):
        assert torch.equal(other.weight, codes) and other.weight.dtype == torch.uint8
        assert not other.weight.requires_grad and other.kind == "Q5_1"
    empty = GgufLinear.of(nn.Linear(256, 24, device="meta"), "Q5_1")
    empty.load_state_dict(one.state_dict(), assign=True)
    x = torch.randn(3, 256)
    assert torch.equal(empty(x), one(x))
    again = GgufLinear.read(one.tensors(), (24, 256), one.details, one.bias)
    assert torch.equal(again(x), one(x)) and repr(one) == "GgufLinear(in_features=256, out_features=24, Q5_1)"


def test_another_function_may_widen_one_layer_and_its_copies():
    one, asked = layer(), []

    def watched(*args):
        asked.append(args[1:])
        return unpack(*args)

    one.unpack = watched
    copy.deepcopy(one)(torch.randn(1, 256))
    layer()(torch.randn(1, 256))
    assert asked == [("Q4_K", torch.float32)]


@EACH
def test_it_compiles_whole(kind):
    torch._dynamo.reset()
    one, x = layer(kind), torch.randn(2, 256)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), one(x))
    torch._dynamo.reset()


def test_gradients_pass_to_the_inputs_and_the_bias():
    one, x = layer(), torch.randn(3, 256, requires_grad=True)
    one.bias.requires_grad_()
    weight = one.widen(torch.float32)
    one(x).square().sum().backward()
    grad = 2 * (x @ weight.t() + one.bias)
    torch.testing.assert_close(x.grad, (grad @ weight).detach())
    torch.testing.assert_close(one.bias.grad, grad.sum(0).detach())
    by_func = torch.func.grad(lambda x: one(x).square().sum())(x.detach())
    torch.testing.assert_close(by_func, x.grad)
    each = torch.func.vmap(one)(x.detach())
    torch.testing.assert_close(each, one(x).detach())


def test_rows_of_layers_are_joined_as_codes():
    parts, bias = [layer("Q4_0", rows) for rows in (24, 8, 40)], torch.randn(72)
    whole = GgufLinear.joined(parts, bias)
    assert torch.equal(whole.widen(torch.float32), torch.cat([part.widen(torch.float32) for part in parts]))
    assert whole.bias.data_ptr() == bias.data_ptr() and (whole.out_features, whole.in_features) == (72, 256)
    assert GgufLinear.joined([layer("Q4_0"), layer("Q8_0")], None) is None
    assert GgufLinear.joined([layer("Q4_0"), layer("Q4_0", columns=512)], None) is None


def test_rows_that_are_no_whole_blocks():
    """As `comfy.gguf.orig_shape` says it: blocks run across rows of 96."""
    codes = blocks("Q4_K", 3)
    one = GgufLinear.read({"weight": codes}, (8, 96), {"type": "Q4_K"}, None)
    assert torch.equal(one.widen(torch.float32).flatten(), unpack(codes, "Q4_K", torch.float32))
    both = GgufLinear.joined([one, one], None)
    assert torch.equal(both.widen(torch.float32), torch.cat([one.widen(torch.float32)] * 2))


@WRITTEN
def test_a_linear_is_quantized(kind):
    linear = nn.Linear(256, 24).bfloat16()
    one = GgufLinear.of(linear, kind)
    assert torch.equal(one.weight, quantize(linear.weight, kind)) and torch.equal(one.bias, linear.bias)
    empty = GgufLinear.of(nn.Linear(256, 24, device="meta", bias=False), kind)
    assert empty.weight.is_meta and empty.weight.shape == one.weight.shape == (size_of(kind, (24, 256)),)


def test_errors():
    for codes, shape, details in [
        (torch.zeros(17, dtype=torch.uint8), (1, 32), {"type": "Q4_0"}),
        (torch.zeros(18, dtype=torch.int8), (1, 32), {"type": "Q4_0"}),
        (torch.zeros(18, dtype=torch.uint8), (1, 48), {"type": "Q4_0"}),
        (torch.zeros(18, dtype=torch.uint8), (1, 32), {"type": "Q9"}),
        (torch.zeros(18, dtype=torch.uint8), (1, 32), {}),
    ]:
        with pytest.raises(FileError):
            to_dense({"weight": codes}, shape, details)
        with pytest.raises(FileError):
            GgufLinear.read({"weight": codes}, shape, details, None)
    with pytest.raises(UsageError, match="rows of 48 values are no whole blocks of Q8_0"):
        GgufLinear.of(nn.Linear(48, 32))
    with pytest.raises(UsageError, match=r"\[32\] values can't be written as IQ4_NL"):
        quantize(torch.ones(32), "IQ4_NL")
