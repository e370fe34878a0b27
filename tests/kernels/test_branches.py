"""Low-rank branches beside a layer in fused code: inside its product, or beside it, as the plain way computes them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden_files import distance, flux_of, read
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from triton_device import CUDA, DEVICE, DTYPES  # skips where there is no Triton

from flux_core import kernels
from flux_core.kernels import fused, products, quantized, thin
from flux_core.linears import branch
from flux_core.linears.branch import THIN, BranchedLinear, Dense, LowRank, Shift, codes_of
from flux_core.linears.contract import (
    Branches,
    QuantizedTokens,
    Widened,
    branches,
    multiply_columns,
    operands,
    parts,
    widening,
)
from flux_core.linears.formats import quantize
from flux_core.linears.fp8 import E4M3, LARGEST, MARGIN, Fp8Linear, dequantize, quantize_rows
from flux_core.model import MODULATION, ops
from flux_core.pipeline.placement import move

GELU = "tanh" if CUDA else "none"
"""of the epilogue: the CPU's has another"""
NEAR = 0.04 if CUDA else 0.08
"""of a number in e4m3, to which the interpreter cuts and a card rounds"""


@pytest.fixture(autouse=True)
def kernels_for_branches(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(THIN, DEVICE, kernels._triton_thin())


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def dense(inputs, outputs, dtype=torch.float32, bias=True):
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False).to(DEVICE, dtype)


def scaled(inputs, outputs):
    one = Fp8Linear.of(dense(inputs, outputs, torch.bfloat16))
    one.scaled, one.quantize = True, quantized.quantize
    return one


def pieces(layer, rank=4, dtype=torch.float32, size=0.3, rows=None, unit=0.5):
    """A branch whose output is about `size` of the layer's, as a trained one's is."""
    start, stop = rows or (0, layer.out_features)
    down = draw(rank, layer.in_features, dtype=dtype) / layer.in_features**0.5
    up = size * draw(stop - start, rank, dtype=dtype) / (unit * (3 * rank) ** 0.5)
    return [LowRank(down, up, torch.full((rank,), unit, device=DEVICE), start)]


def branched(base, dtype=torch.float32, owner="one", **options):
    layer = BranchedLinear(base)
    layer.add(owner, pieces(base, dtype=dtype, **options))
    return layer


def exact(layer, x):
    """The forward in fp64: of a dense or e4m3 weight, and of low-rank branches."""
    base, x = layer.base, x.double()
    weight = dequantize(base.weight, base.weight_scale, torch.float32) if isinstance(base, Fp8Linear) else base.weight
    y = x @ weight.double().t() + (0 if base.bias is None else base.bias.double())
    y = y + (x @ layer.down.double().t() * layer.factor.double()) @ layer.up.double().t()
    return y if layer.shift is None else y + layer.shift.double()


def near(dtype):
    return 1e-5 if dtype == torch.float32 and not CUDA else 1e-3 if dtype == torch.float32 else 8e-3


# The kernel


@pytest.mark.parametrize("features", [32, 1024])
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 16, 1), (5, 72, 3), (37, 200, 20), (3, 600, 130)])
def test_the_thin_product_of_tokens(monkeypatch, rows, width, rank, features):
    """In one part, or in several that are added up."""
    monkeypatch.setattr(thin, "FEATURES", features)
    down, factor, gain = draw(rank, width, dtype=torch.bfloat16), draw(rank).abs(), torch.full((rank,), 1e-2)
    tokens = quantized.quantized(draw(2, rows, width, dtype=torch.bfloat16), 2 * rank - 1)
    gain = gain.to(tokens.codes.device)
    codes, scale = tokens.codes[..., :width].double(), tokens.scale.clone()
    thin.write_codes_behind(tokens, down, factor, gain)
    found, rest = tokens.codes[..., width:].double().split([rank, rank - 1], dim=-1)
    assert torch.equal(tokens.codes[..., :width].double(), codes) and torch.equal(tokens.scale, scale)
    error = distance(found, codes @ down.double().t() * (factor * gain).double())
    assert error < (0.04 if CUDA else 0.15) and not rest.any()  # the interpreter rounds e4m3 worse


@pytest.mark.parametrize("loud", [1.0, 1e4])
def test_codes_behind_tokens_are_never_cut_off(loud):
    """However much a branch makes of a token, its codes fit, and the token's stay what they were."""
    found = Widened(QuantizedTokens(*quantized.quantize_wide_op(
        x := draw(2, 5, 600, dtype=torch.bfloat16), down := draw(6, 600, dtype=torch.bfloat16) / 25,
        factor := torch.full((6,), loud, device=DEVICE), gain := torch.linspace(0.1, 1, 6, device=DEVICE), 128,
    ))).both  # fmt: skip
    assert found.codes.shape == (2, 5, 728) and found.codes.dtype == E4M3
    codes, t, left_over, again, rest = found.codes.float().split([600, 6, 6, 6, 110], dim=-1)
    assert codes.abs().max() <= LARGEST / MARGIN and (loud > 1 or codes.abs().max() == LARGEST / MARGIN)
    assert not rest.any() and torch.equal(t, again)
    assert distance(codes * found.scale, x) < (NEAR if loud == 1 else 0.6)
    exactly = codes.double() @ down.double().t() * (factor * gain).double()
    assert loud > 1 or distance(t, exactly) < NEAR
    assert loud > 1 or distance(t + left_over, exactly) < NEAR**2
    assert distance(t * found.scale, x.double() @ down.double().t() * (factor * gain).double()) < 3 * NEAR


# Layers in fused code


def modulated(x, layer, ops_=fused):
    """What the layer gets, and what it is of."""
    shift, scale = draw(x.shape[0], 1, x.shape[2], dtype=x.dtype), draw(x.shape[0], 1, x.shape[2], dtype=x.dtype)
    return ops_.modulate(x, shift, scale, layer), ops.modulate(x, shift, scale)


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_layer_takes_its_branches_into_the_product(dtype, bias):
    layer, x = branched(dense(256, 512, dtype, bias), dtype), draw(2, 7, 256, dtype=dtype)
    inputs, plain = modulated(x, layer)
    assert isinstance(inputs, Widened) and inputs.both.shape == (2, 7, 256 + widening(layer).room)
    assert (operands(layer, inputs) is None) is (not bias)
    assert distance(layer(inputs), exact(layer, plain)) < near(dtype)
    assert distance(layer(plain), exact(layer, plain)) < near(dtype)
    layer.factor.zero_()
    layer.refresh()
    assert distance(layer(modulated(x, layer)[0]), layer.base(plain)) > 1e-3  # other modulation
    inputs, plain = modulated(x, layer)
    assert distance(layer(inputs), layer.base(plain)) < near(dtype)


@DTYPES
def test_mlp_and_linear1_see_branches(dtype):
    layers = nn.Sequential(
        branched(dense(256, 512, dtype), dtype), nn.GELU(approximate="tanh"), branched(dense(512, 256, dtype), dtype)
    )
    layers[0].add("bias", [Shift(draw(512, dtype=dtype))])
    called = []
    layers[0].register_forward_hook(lambda *_: called.append(1)).remove()
    inputs, plain = modulated(draw(2, 7, 256, dtype=dtype), layers)
    hidden = F.gelu(exact(layers[0], plain), approximate=GELU)
    assert distance(products.mlp(layers, inputs), exact(layers[2], hidden)) < near(dtype)
    qkv, activated = products.linear1(layers[0], inputs, [384, 128])
    own = exact(layers[0], plain)
    assert distance(qkv, own[..., :384]) < near(dtype)
    assert distance(activated.hidden, F.gelu(own[..., 384:], approximate=GELU)) < near(dtype)


@DTYPES
@pytest.mark.parametrize("shift", [False, True])
def test_linear2_adds_up_three_products(dtype, shift):
    layer = branched(dense(72 + 200, 72, dtype), dtype)
    if shift:
        layer.add("bias", [Shift(draw(72, dtype=dtype))])
    attn, hidden = draw(2, 5, 72, dtype=dtype), draw(2, 5, 200, dtype=dtype)
    expected = exact(layer, torch.cat((attn, hidden), dim=-1))
    assert distance(products.linear2(layer, attn, products.Activated(hidden)), expected) < near(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if CUDA else [])])  # none in the interpreter
def test_a_table_of_all_steps_sees_branches(dtype):
    layer, vec = branched(dense(256, 768, dtype), dtype), draw(5, 2, 256, dtype=dtype)
    assert layer.wide is not None  # rows of the weight are then apart
    table = products.modulation(layer, vec)
    assert distance(table, exact(layer, F.silu(vec))) < near(dtype)
    assert distance(products.modulation(layer, vec[1]), table[1]) < 1e-6
    layer.register_forward_hook(lambda layer, args, out: 0 * out)
    assert not products.modulation(layer, vec).any()


def test_three_files_share_the_columns_and_leave_no_trace():
    base = dense(256, 512)
    before = base.weight.clone()
    layer, x = BranchedLinear(base), draw(1, 5, 256)
    for owner, rank in (("a", 4), ("b", 20), ("c", 30)):
        layer.add(owner, pieces(base, rank=rank))
        inputs, plain = modulated(x, layer)
        assert isinstance(inputs, Widened) and distance(layer(inputs), exact(layer, plain)) < near(torch.float32)
        assert torch.equal(base.weight, before) and base.weight.data_ptr() == layer.wide.data_ptr()
    assert layer.wide.shape == (512, 256 + 64)  # whole tiles of 32 fp32 numbers
    assert layer.remove("b")
    inputs, plain = modulated(x, layer)
    assert layer.wide.shape == (512, 256 + 64) and distance(layer(inputs), exact(layer, plain)) < near(torch.float32)
    assert layer.remove("c") and layer.wide.shape == (512, 256 + 32)
    assert not layer.remove("a")
    assert layer.wide is None and base.weight.is_contiguous() and torch.equal(base.weight, before)


def test_without_memory_for_it_a_layer_stays_as_it_is(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BranchedLinear, "_join_memory", full)
    layer = branched(dense(256, 512))
    inputs, plain = modulated(draw(1, 5, 256), layer)
    assert isinstance(inputs, torch.Tensor) and layer.base.weight.is_contiguous()
    assert distance(layer(inputs), exact(layer, plain)) < near(torch.float32)


def test_no_kernels_no_columns(monkeypatch):
    monkeypatch.delitem(THIN, DEVICE)
    layer, x = branched(dense(256, 512)), draw(1, 5, 256)
    assert layer.wide is None and not isinstance(modulated(x, layer)[0], Widened)
    layer.factor.zero_()
    layer.refresh()
    assert torch.equal(layer(x), layer.base(x)) or CUDA
    monkeypatch.setitem(THIN, DEVICE, kernels._triton_thin())
    layer.prepare()  # as `install` does for branches that were there before
    assert isinstance(modulated(x, layer)[0], Widened)


# What has to be called, and what moves


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)


def hooked_base(layer):
    hooked(layer.base)


def patched_base(layer):
    layer.base.forward = layer.base.forward


def trained(layer):
    layer.up.requires_grad_()


def trained_base(layer):
    layer.base.bias.requires_grad_()


def with_a_term(layer):
    layer.add("term", [Dense(torch.zeros(layer.out_features, layer.in_features).to(layer.up), 0)])


CHANGES = [hooked, hooked_base, patched_base, trained, trained_base, with_a_term]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [dense, scaled])
def test_a_layer_that_is_called(change, kind):
    dtype = torch.bfloat16 if kind is scaled else torch.float32
    layer, x = branched(kind(512, 768), dtype), draw(1, 3, 512, dtype=dtype)
    before = exact(layer, x)
    assert widening(layer) is not None
    change(layer)
    assert widening(layer) is None
    inputs = quantized.modulate(x, x[:, :1], x[:, :1], layer)
    assert not isinstance(inputs, Widened) and inputs.dtype == dtype
    assert distance(layer(x).detach(), before) < (near(dtype) if kind is dense else 0.2)


class Around(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

    def forward(self, x):
        return 2 * self.base(x)


def test_a_wrapper_keeps_its_own_forward():
    layer, x = branched(Around(dense(256, 512))), draw(1, 3, 256)
    assert layer.wide is None and widening(layer) is None and branches(layer, x) is not None
    assert distance(layer(x) - layer.base(x), (x @ layer.down.t() * layer.factor) @ layer.up.t()) < 1e-4
    x, y = x.split([100, 156], dim=-1)
    assert distance(multiply_columns(layer, x, y), layer(torch.cat((x, y), dim=-1))) < 1e-5


def test_moves_casts_and_copies():
    layer, x = branched(dense(256, 512)), draw(1, 5, 256)
    other = copy.deepcopy(layer)
    assert other.wide is None and other.base.weight.is_contiguous() and torch.equal(other(x), layer(x))
    assert layer.wide is not None and "wide" not in layer.state_dict()
    layer.bfloat16()
    assert layer.factor.dtype == layer.unit.dtype == torch.float32
    assert layer.wide.dtype == torch.bfloat16 and layer.base.weight.data_ptr() == layer.wide.data_ptr()
    inputs, plain = modulated(x.bfloat16(), layer)
    assert isinstance(inputs, Widened) and distance(layer(inputs), exact(layer, plain)) < near(torch.bfloat16)
    layer.to("meta")
    assert layer.wide is None and layer.base.weight.is_contiguous()
    other.prepare()
    other.base.to(torch.float64).to(torch.float32)  # somebody moves the layer behind
    inputs, plain = modulated(x, other)
    assert not isinstance(inputs, Widened) and distance(other(inputs), exact(other, plain)) < near(torch.float32)
    other.float()
    assert isinstance(modulated(x, other)[0], Widened)


# fp8


def widened_plainly(x, found):
    """`quantize_wide` in plain functions, which round."""
    scale = x.abs().amax(dim=-1, keepdim=True).float() * (MARGIN / LARGEST)
    codes = (x / scale).to(E4M3).float()
    t = codes @ found.down.float().t() * (found.factor * found.gain)
    shrink = torch.exp2((t.abs().amax(dim=-1, keepdim=True) / LARGEST).log2().ceil().clamp(min=0))
    t, number = t / shrink, parts(t.shape[-1], found.room)
    rounded = t.to(E4M3).float()
    of_t = torch.cat((rounded, t - rounded, rounded)[:number], dim=-1)
    both = torch.cat((codes / shrink, F.pad(of_t, (0, found.room - of_t.shape[-1]))), dim=-1)
    return Widened(QuantizedTokens(both.to(E4M3), scale * shrink))


@pytest.mark.parametrize("size", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("rank", [16, 48, 128])
@pytest.mark.parametrize("way", ["rounded", "kernel"])
def test_in_fp8_layer_and_branch_are_as_near_to_the_truth_as_the_layer_alone(size, scale, rank, way):
    base = scaled(512, 768)
    layer, bare = branched(base, torch.bfloat16, size=size, rank=rank), base
    layer.factor.mul_(scale)
    layer.refresh()
    x = draw(1, 64 if way == "rounded" else 7, 512, dtype=torch.bfloat16)
    x[..., 7] *= 30  # features that stand out, as FLUX's do
    if way == "rounded":
        layer.thin, bare = layer.thin._replace(quantize=widened_plainly), Fp8Linear.of(nn.Linear(512, 768))
        bare.weight, bare.weight_scale, bare.bias, bare.scaled = base.weight, base.weight_scale, base.bias, True
    weight = dequantize(base.weight, base.weight_scale, torch.float32).double()
    own = distance(bare(x), x.double() @ weight.t() + base.bias.double())
    share = 1.1 if size * scale <= 0.3 or rank == 16 else 2.7  # that of a branch which is most of the output
    assert distance(layer(x), exact(layer, x)) < (share if way == "rounded" or CUDA else 3) * own + 2e-3


def test_codes_of_up_are_as_near_as_a_weights_or_are_not_used():
    up, down, unit = draw(768, 16), draw(16, 512), torch.ones(16, device=DEVICE)
    scale = torch.rand(768).to(DEVICE) * 1e-3 + 1e-4
    codes, gain = codes_of(up, down, unit, scale)
    assert codes.abs().max() <= LARGEST
    assert distance(codes * gain * scale[:, None], up) < 0.03
    for nothing in (codes_of(0 * up, down, unit, scale), codes_of(up, 0 * down, 0 * unit, scale)):
        assert nothing is not None and nothing[0].isfinite().all() and nothing[1].isfinite().all()
    assert codes_of(up, down, unit, scale * 10.0 ** torch.linspace(-6, 6, 768, device=DEVICE)) is None


def test_where_codes_are_too_far_the_branch_is_a_product_of_its_own(monkeypatch):
    monkeypatch.setattr(branch, "UP_ERROR", 0.0)
    layer, x = branched(scaled(512, 768), torch.bfloat16), draw(1, 3, 512, dtype=torch.bfloat16)
    inputs = quantized.modulate(x, x[:, :1], x[:, :1], layer)
    assert layer.wide is None and isinstance(inputs, torch.Tensor)
    assert distance(layer(x), exact(layer, x)) < 0.1


def test_mlp_and_linear2_of_tokens_see_branches():
    layers = nn.Sequential(
        branched(scaled(512, 768), torch.bfloat16),
        nn.GELU(approximate="tanh"),
        branched(scaled(768, 512), torch.bfloat16),
    )
    x = draw(1, 3, 512, dtype=torch.bfloat16)
    inputs = quantized.modulate(x, x[:, :1], x[:, :1], layers)
    plain = ops.modulate(x, x[:, :1], x[:, :1])
    hidden = F.gelu(exact(layers[0], plain), approximate="tanh")
    assert distance(quantized.mlp(layers, inputs), exact(layers[2], hidden)) < 3 * NEAR
    qkv, rest = products.linear1(layers[0], inputs, [512, 256])
    assert distance(qkv, exact(layers[0], plain)[..., :512]) < 3 * NEAR and rest.shape[-1] == 256
    last, attn = branched(scaled(512 + 256, 512), torch.bfloat16), draw(1, 3, 512, dtype=torch.bfloat16)
    whole = torch.cat((attn, F.gelu(rest, approximate="tanh")), dim=-1)
    assert distance(quantized.linear2(last, attn, rest), exact(last, whole)) < 3 * NEAR
    weight = layers[0].base.weight.clone()
    layers[0].remove("one")
    assert torch.equal(layers[0].base.weight.float(), weight.float()) and layers[0].base.weight.is_contiguous()
    assert isinstance(quantized.modulate(x, x[:, :1], x[:, :1], layers), torch.Tensor)  # its place holds no branch


# A compiler


def modulate_wide(x, shift, scale, scaled):
    x = ops.modulate(x, shift, scale)
    return torch.cat((x, F.linear(x, scaled)), dim=-1)


def tokens_wide(x, down, factor, gain, room):
    nothing = x[:0, :0, :0]
    found = Branches(nn.Identity(), down, nothing, factor, None, None, x.new_empty(1, x.shape[-1] + room), gain)
    return tuple(widened_plainly(x, found).both)


def modulate_tokens_wide(x, shift, scale, *rest):
    return tokens_wide(ops.modulate(x, shift, scale), *rest)


def activated(attn, hidden):
    return torch.cat((attn, F.gelu(hidden, approximate="tanh")), dim=-1)


def join_gelu_wide(attn, hidden, *rest):
    return tokens_wide(activated(attn, hidden), *rest)


@pytest.fixture
def traceable(monkeypatch):
    """Kernels by plain functions: no compiler traces into the interpreter."""
    if not CUDA:
        monkeypatch.setattr(fused, "modulate_wide_op", modulate_wide)
        monkeypatch.setattr(quantized, "modulate_wide_op", modulate_tokens_wide)
        monkeypatch.setattr(quantized, "join_gelu_wide_op", join_gelu_wide)
        monkeypatch.setattr(
            quantized, "join_gelu_op", lambda attn, hidden: tuple(quantize_rows(activated(attn, hidden)))
        )


class Block(nn.Module):
    """As a single block: a wide layer behind a modulation, and one of two inputs."""

    def __init__(self, kind):
        super().__init__()
        dtype = torch.float32 if kind is dense else torch.bfloat16
        self.first, self.last = branched(kind(512, 768), dtype), branched(kind(512 + 256, 512), dtype)
        self.linear2 = quantized.linear2 if kind is scaled else products.linear2
        self.modulate = quantized.modulate if kind is scaled else fused.modulate

    def forward(self, x):
        inputs = self.modulate(x, x[:, :1], x[:, :1], self.first)
        assert isinstance(inputs, Widened)
        qkv, hidden = products.linear1(self.first, inputs, [512, 256])
        return self.linear2(self.last, qkv, hidden)


@pytest.mark.parametrize("kind", [dense, scaled])
def test_a_new_scale_compiles_nothing(traceable, kind):
    """Blocks of a kind share a graph, and read the scales from memory."""
    torch._dynamo.reset()
    blocks, counter, x = [Block(kind) for _ in range(2)], CompileCounterWithBackend("aot_eager"), draw(1, 3, 512)
    x = x if kind is dense else x.bfloat16()
    expected = {scale: [with_scale(block, scale)(x) for block in blocks] for scale in (1.0, 0.25)}
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    for scale, own in expected.items():
        for block, y in zip(blocks, own, strict=True):
            assert distance(with_scale(block, scale)(x), y) < (1e-5 if kind is dense else 1e-2)
    assert counter.frame_count == 1 and distance(expected[1.0][0], expected[0.25][0]) > 1e-2
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [dense, scaled])
def test_each_number_of_ranks_has_one_graph_of_fixed_sizes(traceable, kind):
    """Kernels are compiled for sizes: a size that may vary would stop a whole graph."""
    torch._dynamo.reset()
    counter, x = CompileCounterWithBackend("aot_eager"), draw(1, 3, 512)
    x = x if kind is dense else x.bfloat16()
    for rank, graphs in ((4, 1), (40, 2), (70, 3), (4, 3)):
        block = Block(kind)
        for layer in (block.first, block.last):
            layer.remove("one")
            layer.add("one", pieces(layer.base, rank=rank, dtype=x.dtype))
        block.compile(backend=counter, fullgraph=True)
        block(x)
        assert counter.frame_count == graphs
    shapes = [node.meta["example_value"].shape for node in counter.graphs[-1].graph.nodes if is_tensor(node)]
    assert shapes and not any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)
    torch._dynamo.reset()


def is_tensor(node):
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def with_scale(block, scale):
    for layer in (block.first, block.last):
        layer.factor.copy_(scale * layer.unit)
        layer.refresh()
    return block


# Whole models


@pytest.fixture
def narrow(monkeypatch):
    """Layers of a small model widen, too."""
    monkeypatch.setattr(branch, "WIDEST", 4.0)


def small_model(dtype):
    golden = read("transformer_dev")
    inputs = {
        name: x[:1].to(DEVICE, x.dtype if name.endswith("ids") else dtype) for name, x in golden.group("in.").items()
    }
    return flux_of(golden, dtype).to(DEVICE), inputs


def with_branches(model, dtype):
    """Branches beside all Linears of the blocks."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "in_features") and "_blocks." in name:
            model.set_submodule(name, branched(layer, dtype, rank=2, size=0.1))
    return [layer for layer in model.modules() if isinstance(layer, BranchedLinear)]


def installed(monkeypatch, model):
    """A card's functions, or those of them that agree with the plain ones on the CPU."""
    some = {"modulate": fused.modulate, "gated_sum": fused.gated_sum}
    monkeypatch.setattr(kernels, "fused_ops", lambda device: kernels._triton() if CUDA else ops.PLAIN._replace(**some))
    monkeypatch.setattr(Fp8Linear, "scales_on", lambda self, device: True)
    found = kernels.install(model, DEVICE)
    if not CUDA:
        kernels.put(model, found._replace(modulation=ops.modulation))


@pytest.mark.parametrize("first", ["branches", "kernels"])
def test_a_whole_model_with_branches(monkeypatch, narrow, first):
    """Whether branches were there before the kernels, or come later."""
    monkeypatch.delitem(THIN, DEVICE)
    model, inputs = small_model(torch.float32)
    bare = model(**inputs)
    state = torch.get_rng_state()
    layers = with_branches(model, torch.float32)
    plainly = model(**inputs)
    assert not any(layer.wide is not None for layer in layers) and distance(plainly, bare) > 1e-3
    for layer in layers if first == "kernels" else ():
        layer.remove("one")
    if first == "kernels":
        model = small_model(torch.float32)[0]
    installed(monkeypatch, model)
    if first == "kernels":
        torch.set_rng_state(state)
        layers = with_branches(model, torch.float32)
    wide = {layer.out_features > layer.in_features for layer in layers if layer.wide is not None}
    assert wide == {True}
    assert distance(model(**inputs), plainly) < (2e-3 if CUDA else 1e-5)
    for layer in layers:
        layer.factor.zero_()
        layer.refresh()
    assert distance(model(**inputs), bare) < (2e-3 if CUDA else 1e-5)


def test_a_whole_model_in_fp8_with_branches(monkeypatch, narrow):
    model, inputs = small_model(torch.bfloat16)
    torch.manual_seed(0)
    dense_model = copy.deepcopy(model)
    with_branches(dense_model, torch.bfloat16)
    truth = dense_model(**inputs)
    quantize(model)
    for one in model.modules():
        if isinstance(one, Fp8Linear):
            one.scaled = True
    torch.manual_seed(0)
    layers = with_branches(model, torch.bfloat16)
    plainly = model(**inputs)
    installed(monkeypatch, model)
    assert any(layer.gain is not None for layer in layers)
    assert distance(model(**inputs), truth) < 1.2 * distance(plainly, truth) + (0 if CUDA else 0.08)


def test_a_layer_with_branches_moves_whole(narrow):
    model, _ = small_model(torch.float32)
    layers = with_branches(model, torch.float32)
    move(model, torch.device(DEVICE))
    joined = [layer for layer in layers if layer.wide is not None]
    assert joined and all(layer.base.weight.data_ptr() == layer.wide.data_ptr() for layer in joined)
    move(model, torch.device("meta"))
    for name, layer in model.named_modules():
        if isinstance(layer, BranchedLinear) and not name.endswith(MODULATION):
            assert layer.wide is None and {x.device.type for x in (*layer.parameters(), *layer.buffers())} == {"meta"}


# A below W


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("kind", [dense, scaled])
def test_a_layer_as_wide_as_its_input_has_its_branches_below_the_weight(kind, scale):
    base = kind(768, 512)
    before = base.weight.clone()
    layer = branched(base, torch.float32 if kind is dense else torch.bfloat16, rank=20, size=0.2)
    assert layer.below is not None and layer.wide is None and torch.equal(layer.base.weight, before)
    layer.factor.copy_(scale * layer.unit)
    layer.refresh()
    x = draw(2, 5, 768, dtype=layer.up.dtype)
    truth = exact(layer, x)
    own = distance(base(x), exact(base_alone(base), x)) if kind is scaled else near(torch.float32)
    assert distance(layer(x), truth) < 1.2 * own + 2e-3
    if kind is dense:
        assert distance(layer.multiply_columns(x[..., :256], x[..., 256:]), truth) < near(torch.float32)
    layer.add("bias", [Shift(torch.ones(100, dtype=layer.up.dtype, device=DEVICE), 7)])
    more = torch.zeros(512, dtype=torch.float64, device=DEVICE)
    more[7:107] = 1
    assert distance(layer(x), truth + more) < 1.2 * own + 3e-3
    layer.remove("bias"), layer.remove(layer.owners[0][0])
    assert (
        layer.below is None
        and torch.equal(base.weight, before)
        and base.weight.untyped_storage().nbytes() == (before.untyped_storage().nbytes())
    )


def base_alone(base):
    """The layer with branches that add nothing."""
    layer = BranchedLinear(base)
    layer.down, layer.up = (nn.Parameter(torch.zeros(*size, device=DEVICE)) for size in ((1, 768), (512, 1)))
    layer.factor = torch.zeros(1, device=DEVICE)
    return layer
