"""Every Triton kernel against its plain function: on CUDA if it is there, else on the CPU by Triton's interpreter."""

import pytest
import torch
from golden_files import distance, flux_of, read
from triton_device import CUDA, DEVICE, DTYPES  # skips where there is no Triton

from flux_core import kernels
from flux_core.kernels import fused, install, products, put, quantized
from flux_core.linears.contract import QuantizedTokens
from flux_core.linears.formats import quantize
from flux_core.linears.fp8 import Fp8Linear, has_fp8_units, quantize_rows
from flux_core.model import ops
from flux_core.model.blocks import split_heads
from flux_core.model.rope import embed_nd

ANYWHERE = ("modulate", "gated_sum", "norm_rope", "norm_rope_join")
# The CPU's epilogue has another GELU, the interpreter no bf16 product.
FUSED = kernels._triton() if CUDA else ops.PLAIN._replace(**{name: getattr(fused, name) for name in ANYWHERE})


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def agree(ours, plain, *args):
    """fp32: to its last places. bf16: to one rounding, and on a card no farther from fp32 than the plain twin is.

    The interpreter cuts to bf16 where a card rounds: up to 2^-8 of a value, on average 3.3e-3 of all.
    """
    ours = ours if isinstance(ours, tuple) else (ours,)
    plainly, truth = plain(*args), plain(*(as_fp32(x) for x in args))
    if isinstance(plainly, torch.Tensor):
        plainly, truth = (plainly,), (truth,)
    assert len(ours) == len(plainly)
    for one, twin, exact in zip(ours, plainly, truth, strict=True):
        assert one.shape == twin.shape and one.dtype == twin.dtype and one.device == twin.device
        if one.dtype == torch.float32:
            assert distance(one, twin) < 1e-6
        else:
            assert distance(one, twin) < 8e-3
            assert distance(one, exact) < (1.05 * distance(twin, exact) + 1e-9 if CUDA else 2**-8)


def as_fp32(x):
    if isinstance(x, tuple):
        return tuple(map(as_fp32, x))
    return x.float() if isinstance(x, torch.Tensor) else x


@DTYPES
@pytest.mark.parametrize(("rows", "dim"), [(1, 256), (5, 3072), (3, 200)])
def test_modulate(dtype, rows, dim):
    mods = draw(2, 1, 6 * dim, dtype=dtype).chunk(6, dim=-1)  # slices, as a Modulation gives them
    joined = 3 * draw(2, rows + 4, dim, dtype=dtype) + 1
    for x in (joined, joined[:, 4:]):
        args = x, mods[3], mods[1]
        agree(fused.modulate(*args), ops.modulate, *args)


@DTYPES
@pytest.mark.parametrize(("rows", "dim"), [(1, 256), (5, 3072), (3, 200)])
def test_gated_sum(dtype, rows, dim):
    gate = draw(2, 1, 6 * dim, dtype=dtype).chunk(6, dim=-1)[2]
    joined, y = draw(2, rows + 4, dim, dtype=dtype), draw(2, rows, dim, dtype=dtype)
    for x in (joined[:, :rows], joined[:, 4:]):
        agree(fused.gated_sum(x, gate, y), ops.gated_sum, x, gate, y)


def test_the_norm_keeps_its_precision_far_from_zero():
    x = draw(1, 3, 3072) + 1000
    args = x, draw(1, 1, 3072), draw(1, 1, 3072)
    exact = ops.modulate(*(a.double() for a in args))
    assert distance(fused.modulate(*args), exact) < 1e-3


def stream(rows, heads, dim, dtype, more=0):
    """q, k, v as a block sees them: strided views of a product [2, rows, 3 * heads * dim + more]."""
    product = draw(2, rows, 3 * heads * dim + more, dtype=dtype)
    return split_heads(product[..., : 3 * heads * dim], heads)


def rotations(rows, dim, batch=2):
    ids = torch.rand(batch, rows, 3) * 60
    axes = {16: (4, 6, 6), 64: (16, 24, 24), 128: (16, 56, 56)}[dim]
    return embed_nd(ids, axes, 10_000).to(DEVICE)


@DTYPES
@pytest.mark.parametrize("heads", [1, 4, 24])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_norm_rope(dtype, heads, dim):
    q, k, _ = stream(5, heads, dim, dtype, more=72)
    scales = draw(dim, dtype=dtype), draw(dim, dtype=dtype)
    pe = rotations(9, dim)[:, :, 4:]  # the image's part of the joined sequence
    args = q, k, *scales, pe
    out = fused.norm_rope(*args)
    agree(out, ops.norm_rope, *args[:4], pe)
    assert all(x.transpose(1, 2).is_contiguous() for x in out)  # attention's output then needs no permutation


def test_norm_rope_of_tensors_that_are_not_one_product():
    q, k = draw(2, 3, 5, 64), draw(2, 5, 64, 3).permute(0, 3, 1, 2)  # what a hook may have put there
    args = q, k, draw(64), draw(64), rotations(5, 64, batch=1)
    agree(fused.norm_rope(*args), ops.norm_rope, *args)
    q, k = draw(2, 3, 64, 5).transpose(2, 3), draw(2, 3, 5, 64)[:1].expand(2, -1, -1, -1)
    args = q, k, *args[2:4], args[4].transpose(-1, -2)
    agree(fused.norm_rope(*args), ops.norm_rope, *args)


@DTYPES
@pytest.mark.parametrize(("txt", "img"), [(1, 4), (3, 5)])
def test_norm_rope_join(dtype, txt, img):
    txt_heads, img_heads = stream(txt, 3, 64, dtype), stream(img, 3, 64, dtype)
    scales = [(draw(64, dtype=dtype), draw(64, dtype=dtype)) for _ in range(2)]
    args = txt_heads, img_heads, *scales, rotations(txt + img, 64)
    out = fused.norm_rope_join(*args)
    agree(out, ops.norm_rope_join, *args)
    assert torch.equal(out[2], torch.cat((txt_heads[2], img_heads[2]), dim=2))


def linear(inputs, outputs, dtype=torch.float32):
    return torch.nn.Linear(inputs, outputs).requires_grad_(False).to(DEVICE, dtype)


def scaled(inputs, outputs):
    """An Fp8Linear that multiplies in fp8."""
    one = Fp8Linear.of(linear(inputs, outputs, torch.bfloat16))
    one.scaled = True
    return one


@DTYPES
def test_mlp_and_linear1_activate_in_the_product(dtype):
    layers = torch.nn.Sequential(linear(256, 1024, dtype), torch.nn.GELU(approximate="tanh"), linear(1024, 256, dtype))
    gelu = torch.nn.GELU(approximate="tanh" if CUDA else "none")  # the CPU's epilogue has that form
    for x in (draw(2, 7, 256, dtype=dtype), draw(2, 9, 256, dtype=dtype)[:, 2:]):
        plain = layers[2](gelu(layers[0](x)))
        assert distance(products.mlp(layers, x), plain) < (1e-3 if dtype == torch.float32 else 8e-3)
        qkv, hidden = products.linear1(layers[0], x, [768, 256])
        plain_qkv, plain_hidden = ops.linear1(layers[0], x, [768, 256])
        assert distance(qkv, plain_qkv) < 8e-3
        assert distance(hidden.hidden, gelu(plain_hidden)) < 8e-3


@DTYPES
def test_linear2_adds_up_two_products(dtype):
    one, attn, hidden = linear(72 + 200, 72, dtype), draw(2, 5, 72, dtype=dtype), draw(2, 5, 200, dtype=dtype)
    activated = torch.nn.functional.gelu(hidden, approximate="tanh")
    found, plain = products.linear2(one, attn, products.Activated(activated)), ops.linear2(one, attn, hidden)
    assert distance(found, plain) < (8e-3 if dtype == torch.bfloat16 else 1e-3 if CUDA else 1e-6)


def test_a_linear_that_is_more_than_its_weights_is_called():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    one, two = Doubled(64, 96).to(DEVICE), Doubled(64 + 32, 64).to(DEVICE)
    layers = torch.nn.Sequential(Doubled(64, 128), torch.nn.GELU(approximate="tanh"), torch.nn.Linear(128, 64)).to(
        DEVICE
    )
    x, attn = draw(2, 5, 64), draw(2, 5, 64)
    torch.testing.assert_close(products.mlp(layers, x), ops.mlp(layers, x))
    (qkv, hidden), (plain_qkv, plain_hidden) = products.linear1(one, x, [64, 32]), ops.linear1(one, x, [64, 32])
    torch.testing.assert_close(qkv, plain_qkv)
    torch.testing.assert_close(products.linear2(two, attn, hidden), ops.linear2(two, attn, plain_hidden))
    torch.testing.assert_close(products.modulation(one, x[0]), ops.modulation(one, x[0]))
    watched, seen = linear(64, 96), []
    watched.register_forward_hook(lambda *_: seen.append(1))
    products.linear1(watched, x, [64, 32]), products.modulation(watched, x[0])
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if CUDA else [])])
@pytest.mark.parametrize(
    ("steps", "batch", "dim", "wide"), [(1, 1, 256, 768), (5, 1, 200, 72), (3, 2, 64, 96), (40, 1, 64, 64)]
)
def test_the_modulation_of_many_steps_is_that_of_each_to_the_bit(dtype, steps, batch, dim, wide):
    """The interpreter multiplies by NumPy, which keeps no such promise, and knows no bf16."""
    one, vec = linear(dim, wide, dtype), draw(steps, batch, dim, dtype=dtype)
    table = products.modulation(one, vec)
    assert table.shape == (steps, batch, wide)
    for row, step in zip(table, vec, strict=True):
        alone = products.modulation(one, step)
        assert torch.equal(row, alone) if CUDA else distance(row, alone) < 1e-6
    assert distance(table, ops.modulation(one, vec)) < (1e-3 if CUDA else 1e-6)


# Rows for fp8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 200, 3072, 15360])
def test_quantize_is_that_of_the_plain_function(width):
    x = draw(2, 5, width, dtype=torch.bfloat16)
    for one in (x, x[:, 2:], torch.zeros_like(x)):
        found, plain = quantized.quantize(one), quantize_rows(one)
        assert torch.equal(found.scale, plain.scale)
        if CUDA:
            assert torch.equal(found.codes.float(), plain.codes.float())
        else:
            close_rows(found, one.double())


def close_rows(found, exact):
    """Quantized tokens against exact ones, in fp64: within half a unit of e4m3. The interpreter rounds it worse."""
    back = found.codes.double() * found.scale.double()
    if CUDA:
        assert ((back - exact).abs() <= 2**-4 * exact.abs() + 2**-9 * found.scale).all()
    assert (back - exact).norm() <= (0.04 if CUDA else 0.1) * exact.norm()


@pytest.mark.parametrize("dim", [64, 200, 3072])
def test_modulate_rows(dim):
    x, mods = 3 * draw(2, 7, dim, dtype=torch.bfloat16) + 1, draw(2, 1, 6 * dim, dtype=torch.bfloat16).chunk(6, dim=-1)
    for one in (x, x[:, 3:]):
        args = one, mods[3], mods[1]
        close_rows(quantized.modulate(*args, scaled(dim, 16)), ops.modulate(*(a.double() for a in args)))


@pytest.mark.parametrize(("dim", "mlp_dim"), [(0, 256), (256, 1024), (3072, 12288), (72, 1104)])
def test_join_gelu_rows(dim, mlp_dim):
    attn, product = draw(2, 3, dim, dtype=torch.bfloat16), 3 * draw(2, 3, 3 * dim + mlp_dim, dtype=torch.bfloat16)
    hidden = product[..., 3 * dim :]
    exact = torch.cat((attn.double(), torch.nn.functional.gelu(hidden.double(), approximate="tanh")), dim=2)
    found = QuantizedTokens(*quantized.join_gelu_op(attn, hidden))
    assert found.codes.shape == (2, 3, dim + mlp_dim) and found.scale.shape == (2, 3, 1)
    close_rows(found, exact)


def test_gelu_at_the_ends():
    hidden = (
        torch.tensor([-3e38, -1e4, -10.0, -0.0, 0.0, 10.0, 1e4, 3e38], device=DEVICE).reshape(1, -1, 1).expand(1, 8, 16)
    )
    found = QuantizedTokens(*quantized.join_gelu_op(hidden[..., :0], hidden))
    back = found.codes.float() * found.scale
    torch.testing.assert_close(back, hidden.clamp(min=0), rtol=0.07, atol=1e-4)


def one_picture(golden):
    """Of the inputs the first row: the interpreter takes its time."""
    return {name: x[:1] for name, x in golden.group("in.").items()}


def test_a_model_of_fp8_linears_takes_rows(monkeypatch):
    golden = read("transformer_dev")
    model, inputs = flux_of(golden, torch.bfloat16).to(DEVICE), one_picture(golden)
    inputs = {name: (x if name.endswith("ids") else x.bfloat16()).to(DEVICE) for name, x in inputs.items()}
    truth = model(**inputs)
    quantize(model)
    for one in model.modules():
        if isinstance(one, Fp8Linear):
            one.scaled = True  # which the CPU computes, too, slowly
    plainly = model(**inputs)
    monkeypatch.setattr(kernels, "fused_ops", lambda device: FUSED)
    monkeypatch.setattr(Fp8Linear, "scales_on", lambda self, device: True)
    found = install(model, DEVICE)
    assert found.modulate is quantized.modulate and model.final_layer.ops is found
    assert kernels.describe(model)["kernels"] == "triton fp8"
    put(model, found if CUDA else found._replace(modulation=ops.modulation))  # the interpreter has no bf16 product
    assert distance(model(**inputs), truth) < 1.2 * distance(plainly, truth) + (0 if CUDA else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if CUDA else [])])
def test_a_whole_model(dtype):
    golden = read("transformer_dev")
    model, inputs = flux_of(golden, dtype).to(DEVICE), one_picture(golden)
    inputs = {name: (x if name.endswith("ids") else x.to(dtype)).to(DEVICE) for name, x in inputs.items()}
    plainly = model(**inputs)
    put(model, FUSED)
    assert distance(model(**inputs), plainly) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_where_a_gradient_is_wanted_the_plain_twin_computes():
    x, shift, scale = draw(1, 3, 64).requires_grad_(), draw(1, 1, 64), draw(1, 1, 64)
    fused.modulate(x, shift, scale).sum().backward()
    assert x.grad is not None
    y = draw(1, 3, 64).requires_grad_()
    fused.gated_sum(x.detach(), scale, y).sum().backward()
    assert y.grad is not None
    q, one = draw(1, 2, 3, 64).requires_grad_(), linear(64, 96).requires_grad_()
    sum(y.sum() for y in fused.norm_rope(q, q, shift[0, 0], scale[0, 0], rotations(3, 64, batch=1))).backward()
    sum(y.sum() for y in products.linear1(one, x.detach(), [64, 32])).backward()
    assert q.grad is not None and one.weight.grad is not None
    with torch.no_grad():
        assert not fused.modulate(x, shift, scale).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["dense", "fp8"])
def test_compiled_blocks_take_the_kernels_whole_and_share_two_graphs(form):
    if form == "fp8" and not has_fp8_units(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("this card has no fp8 units")
    golden = read("transformer_dev")
    model, inputs = flux_of(golden).to(DEVICE), {k: x.to(DEVICE) for k, x in golden.group("in.").items()}
    plainly = model(**inputs)
    if form == "fp8":
        quantize(model.bfloat16())
        inputs = {name: x if name.endswith("ids") else x.bfloat16() for name, x in inputs.items()}
    install(model, DEVICE)
    assert kernels.describe(model)["kernels"] == ("triton" if form == "dense" else "triton fp8")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True)
    assert distance(model(**inputs), plainly) < (1e-3 if form == "dense" else 0.1)  # TF32 or not
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
