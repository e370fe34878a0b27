"""Every Triton kernel against its plain twin: on CUDA where it is there, else run on the CPU by Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_fused.py

Triton reads that variable when it is imported, so `test_fused_ops.py` starts this file in a process of its own.
"""

import os

import pytest
import torch
from golden_files import distance, flux_of, read

from flux_core.kernels import put
from flux_core.model import ops
from flux_core.model.blocks import split_heads
from flux_core.model.rope import embed_nd

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on the CPU the kernels run with TRITON_INTERPRET=1 only", allow_module_level=True)
pytest.importorskip("triton", reason="the CPU build of torch comes without Triton")
if not CUDA and not hasattr(torch._library.triton, "_is_interpreted_triton_kernel"):
    pytest.skip("this torch's wrap_triton takes no interpreted kernels", allow_module_level=True)

from flux_core.kernels import fused  # noqa: E402  it needs Triton

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FUSED = ops.PLAIN._replace(modulate=fused.modulate, norm_rope=fused.norm_rope, join_gelu=fused.join_gelu)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def held(ours, plain, *args):
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
    return x.float() if isinstance(x, torch.Tensor) else tuple(map(as_fp32, x))


@DTYPES
@pytest.mark.parametrize(("rows", "dim"), [(1, 256), (5, 3072), (3, 200)])
def test_modulate(dtype, rows, dim):
    mods = draw(2, 1, 6 * dim, dtype=dtype).chunk(6, dim=-1)  # slices, as a Modulation gives them
    joined = 3 * draw(2, rows + 4, dim, dtype=dtype) + 1
    for x in (joined, joined[:, 4:]):
        args = x, mods[3], mods[1]
        held(fused.modulate(*args), ops.modulate, *args)


def test_the_norm_keeps_its_precision_far_from_zero():
    x = draw(1, 3, 3072) + 1000
    args = x, draw(1, 1, 3072), draw(1, 1, 3072)
    assert distance(fused.modulate(*args), ops.modulate(*(a.double() for a in args))) < 1e-3


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
    held(out, ops.norm_rope, *args[:4], pe)
    assert all(x.transpose(1, 2).is_contiguous() for x in out)  # attention's output then needs no permutation


def test_norm_rope_of_tensors_that_are_not_one_product():
    q, k = draw(2, 3, 5, 64), draw(2, 5, 64, 3).permute(0, 3, 1, 2)  # what a hook may have put there
    args = q, k, draw(64), draw(64), rotations(5, 64, batch=1)
    held(fused.norm_rope(*args), ops.norm_rope, *args)
    q, k = draw(2, 3, 64, 5).transpose(2, 3), draw(2, 3, 5, 64)[:1].expand(2, -1, -1, -1)
    args = q, k, *args[2:4], args[4].transpose(-1, -2)
    held(fused.norm_rope(*args), ops.norm_rope, *args)


@DTYPES
@pytest.mark.parametrize(("txt", "img"), [(1, 4), (3, 5)])
def test_norm_rope_join(dtype, txt, img):
    txt_heads, img_heads = stream(txt, 3, 64, dtype), stream(img, 3, 64, dtype)
    scales = [(draw(64, dtype=dtype), draw(64, dtype=dtype)) for _ in range(2)]
    args = txt_heads, img_heads, *scales, rotations(txt + img, 64)
    out = fused.norm_rope_join(*args)
    held(out, ops.norm_rope_join, *args)
    assert torch.equal(out[2], torch.cat((txt_heads[2], img_heads[2]), dim=2))


@DTYPES
@pytest.mark.parametrize(("dim", "mlp_dim"), [(256, 1024), (3072, 12288), (72, 1100)])
def test_join_gelu(dtype, dim, mlp_dim):
    attn, product = draw(2, 3, dim, dtype=dtype), 3 * draw(2, 3, 3 * dim + mlp_dim, dtype=dtype)
    args = attn, product[..., 3 * dim :]
    out = fused.join_gelu(*args)
    held(out, ops.join_gelu, *args)
    assert torch.equal(out[..., :dim], attn)


def test_gelu_at_the_ends():
    mlp = torch.tensor([-3e38, -1e4, -10.0, -0.0, 0.0, 10.0, 1e4, 3e38], device=DEVICE).reshape(1, 1, -1)
    out = fused.join_gelu(mlp, mlp)[0, 0, 8:]
    assert out.isfinite().all()
    torch.testing.assert_close(out, mlp[0, 0].clamp(min=0), atol=1e-20, rtol=0)
    assert fused.join_gelu(mlp, torch.full_like(mlp, torch.nan))[..., 8:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if CUDA else [])])
def test_a_whole_model(dtype):
    golden = read("transformer_dev")
    model, inputs = flux_of(golden, dtype).to(DEVICE), golden.group("in.")
    inputs = {name: (x if name.endswith("ids") else x.to(dtype)).to(DEVICE) for name, x in inputs.items()}
    plainly = model(**inputs)
    put(model, FUSED)
    assert distance(model(**inputs), plainly) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_where_a_gradient_is_wanted_the_plain_twin_computes():
    x, shift, scale = draw(1, 3, 64).requires_grad_(), draw(1, 1, 64), draw(1, 1, 64)
    fused.modulate(x, shift, scale).sum().backward()
    assert x.grad is not None
    q, mlp = draw(1, 2, 3, 64).requires_grad_(), draw(1, 3, 64).requires_grad_()
    sum(y.sum() for y in fused.norm_rope(q, q, shift[0, 0], scale[0, 0], rotations(3, 64, batch=1))).backward()
    fused.join_gelu(shift.expand(1, 3, 64), mlp).sum().backward()
    assert q.grad is not None and mlp.grad is not None
    with torch.no_grad():
        assert not fused.modulate(x, shift, scale).requires_grad


@pytest.mark.gpu
def test_compiled_blocks_take_the_kernels_whole_and_share_two_graphs():
    golden = read("transformer_dev")
    model, inputs = flux_of(golden).to(DEVICE), {k: x.to(DEVICE) for k, x in golden.group("in.").items()}
    plainly = model(**inputs)
    put(model, FUSED)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True)
    assert distance(model(**inputs), plainly) < 1e-3  # TF32 or not
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
