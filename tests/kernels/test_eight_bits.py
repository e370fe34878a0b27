"""Attention in eight bits: its kernels against plain PyTorch, on CUDA if it is there, else by Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from golden_files import distance
from tiny import tiny_pipeline
from triton_device import CUDA, DEVICE, e4m3_rounds_right  # noqa: F401  skips where there is no Triton

from flux_core.hooks.taps import Taps
from flux_core.kernels import codes, describe, eight_bits, flash, put
from flux_core.kernels.attention import EIGHT, in_eight_bits
from flux_core.kernels.eight_bits import BLOCK, FORMS
from flux_core.linears.int8 import hadamard
from flux_core.model import Flux, ops
from flux_core.model.rope import embed_nd
from flux_core.request.fields import ATTENTION
from flux_core.sampling.graph import has_user_code

pytestmark = pytest.mark.usefixtures("e4m3_rounds_right")
MOST = {"int8": 0.03, "fp8": 0.07}
"""relative error to exact attention; e4m3's numbers are off by 2.6 %"""


def test_a_form_is_in_every_list_of_forms():
    assert {*FORMS} == EIGHT.keys() == {*ATTENTION.choices} - {"auto", "exact"}


def heads(B, H, L, D, dtype=torch.float32):
    """q, k, v as `norm_rope` leaves them, tokens outside heads; keys are alike, and some features large."""
    draw = torch.Generator().manual_seed(L + D)
    q, k = (torch.randn(B, L, H, D, generator=draw) for _ in range(2))
    v = torch.randn(B, L, 3 * H, D, generator=draw)[:, :, H : 2 * H]  # a slice of a wider product
    large = 1 + 3 * (torch.arange(D) % 16 == 5)
    k = k * large + 4 * torch.randn(H, D, generator=draw)
    return tuple(x.to(DEVICE, dtype).transpose(1, 2) for x in (q * large, k, v + 0.5))


def in_order(v):
    """Values in the units' order of tokens: of each 16 the number n3 n2 n1 n0 in base 2 becomes n2 n1 n3 n0."""
    return v.view(torch.uint8).unflatten(-1, (-1, 2, 4, 2)).transpose(-2, -3).flatten(-4).view(v.dtype)


def in_blocks(eight, tokens, keys):
    """`eight_bits.attend_codes` in int8, with p rounded by the largest logit of the blocks so far."""
    most, total, sums = -torch.inf, 0.0, 0.0
    for start in range(0, tokens, keys):
        here = slice(start, min(start + keys, tokens))
        s = eight.q[:, :, :tokens].float() @ eight.k[:, :, here].float().mT * eight.q.shape[-1] ** -0.5
        s = s * eight.q_scale[:, :, :tokens, None] * eight.k_scale[:, :, start // BLOCK, None, None]
        now = torch.clamp(s.amax(-1, keepdim=True), min=most)
        p, fade = torch.exp(s - now) * 256, torch.exp(most - now)
        v = eight.v[..., here].mT
        sums = sums * fade + p.to(v.dtype).float() @ v.float()
        most, total = now, total * fade + p.sum(-1, keepdim=True)
    return (sums / total * eight.v_scale[:, :, None]).transpose(1, 2).flatten(2)


def near(found, plain):
    """The same codes: another order of sums moves a number over the middle of two codes, rarely."""
    for field in found._fields:
        ours, theirs = (getattr(x, field).float() for x in (found, plain))
        if field.endswith("scale"):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
            continue
        off, step = (ours - theirs).abs(), theirs.abs().clamp(min=8) / 8
        assert ours.shape == theirs.shape and (off <= step.clamp(min=1)).all() and (off > 0).double().mean() < 2e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 2, 130, 64), (1, 2, 600, 128)], ids=["64", "128"])
def test_kernels_write_the_codes_of_plain_functions(form, shape):
    q, k, v = heads(*shape)
    found, plain = codes.quantize(q, k, v, form), eight_bits.quantize(q, k, v, form)
    if form == "int8":
        return near(found, plain._replace(v=in_order(plain.v)))
    scale, inverse = found.v_scale.tolist()
    assert scale * inverse == pytest.approx(1)
    near(found._replace(v_scale=found.v_scale[:1]), plain)


def test_values_of_a_large_batch_are_looked_at_by_few_programs(monkeypatch):
    q, k, v = heads(2, 2, 600, 64)
    many = codes.quantize(q, k, v, "fp8")
    monkeypatch.setattr(codes, "MAXIMA", 8)
    assert codes.statistics(k, v, "fp8")[1].numel() == 8 < codes.statistics(k, v, "int8")[1].numel() // 64
    few = codes.quantize(q, k, v, "fp8")
    assert torch.equal(few.v_scale, many.v_scale) and torch.equal(few.v.view(torch.uint8), many.v.view(torch.uint8))


@pytest.mark.parametrize("shape", [(2, 2, 130, 64), (1, 1, 256, 128)], ids=["tail", "whole"])
@pytest.mark.parametrize("keys", [64, 32])
def test_the_kernel_attends_with_codes_as_sums_over_blocks(shape, keys):
    plain = eight_bits.quantize(*heads(*shape), "int8")
    tiles = flash.TILES._replace(n=keys)
    found = flash.attend_codes(plain._replace(v=in_order(plain.v)), shape[2], torch.float32, tiles)
    assert distance(found, in_blocks(plain, shape[2], keys)) < (5e-3 if CUDA else 2e-3)  # p between two codes
    assert distance(found, eight_bits.attend_codes(plain, shape[2], "int8")) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16] if CUDA else [torch.float32])  # interpreted, no bf16 products
def test_it_is_attention(dtype):
    """By the kernel and by plain functions, of any number of tokens."""
    q, k, v = heads(2, 2, 77, 128, dtype)
    exact = ops.attend(q.float(), k.float(), v.float())
    for name, found in (
        ("int8", flash.attend(q, k, v)), *((form, eight_bits.attend(q, k, v, form)) for form in FORMS),
    ):  # fmt: skip
        assert found.shape == exact.shape and found.dtype == dtype
        assert distance(found.float(), exact) < MOST[name]


def test_what_is_in_e4m3_times_its_scale():
    x = (torch.randn(3, 5, 77) * 100).to(DEVICE)
    e4m3 = eight_bits.to_e4m3(x)
    found = codes.widened(e4m3, torch.tensor([0.3, 7.0], device=DEVICE), torch.float32)
    assert torch.equal(found, e4m3.float() * torch.tensor(0.3, device=DEVICE))


@pytest.mark.gpu
def test_sums_over_many_keys_keep_their_bits():
    """Hopper's units add e4m3 with 14 bits: in one sum over 4608 keys, 5 % of the result would be gone."""
    q, k, v = heads(1, 2, 4608, 128, torch.bfloat16)
    exact = ops.attend(q.float(), k.float(), v.float())
    plain = distance(eight_bits.attend(q, k, v, "int8").float(), exact)
    assert distance(flash.attend(q, k, v).float(), exact) < 1.1 * plain


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_centring_and_rotation_change_nothing_but_the_rounding(name):
    """The identities that eight bits rest on: (q R)(k R) = q k, and keys less any vector."""
    q, k, v = heads(1, 2, 40, 128)
    R = torch.block_diag(hadamard(64, torch.float32, DEVICE), hadamard(64, torch.float32, DEVICE))
    assert distance(R @ R.mT, torch.eye(128, device=DEVICE)) < 1e-6
    moved = ops.attend(q @ R, (k - k.mean(2, keepdim=True)) @ R, v)
    torch.testing.assert_close(moved, ops.attend(q, k, v), rtol=1e-4, atol=1e-4)
    shifted = eight_bits.attend(q, k + 100 * torch.ones_like(k[:, :, :1]), v, name)
    assert distance(shifted, eight_bits.attend(q, k, v, name)) < 0.01  # where uncentred keys would have no bits


def test_a_flat_row_gives_the_mean_and_large_logits_one_value():
    v = heads(1, 1, 70, 64)[2]
    zero = torch.zeros(1, 1, 70, 64, device=DEVICE)
    found = flash.attend(zero, zero, v)
    assert distance(found, v.mean(2).expand(1, 70, 64)) < 0.03 and found.isfinite().all()
    one = torch.eye(70, 64, device=DEVICE)[None, None] * 100
    assert distance(flash.attend(one, one, v)[:, :64], v[0, :, :64]) < 0.04  # each looks at itself


@pytest.fixture(scope="module")
def installed():
    """Functions in int8 with heads of 64 features, and a model for them."""
    params = replace(tiny_pipeline().model.params, hidden_size=128, num_heads=2, axes_dim=(16, 24, 24))
    torch.manual_seed(0)
    model = Flux(params).to(DEVICE).eval().requires_grad_(False)
    found = in_eight_bits(ops.PLAIN, "int8")
    put(model, found)
    return found, model


def test_one_set_of_functions_that_pictures_record(installed):
    found, model = installed
    assert in_eight_bits(ops.PLAIN, "int8") == found
    assert describe(model)["attention"] == "int8"
    assert describe(tiny_pipeline().model)["attention"] == "own"


def inputs_of(block):
    """Arguments of a double block's forward: 20 tokens of text, 16 of a picture."""
    draw = torch.Generator().manual_seed(0)
    img, txt, vec = (torch.randn(1, *size, 128, generator=draw).to(DEVICE) for size in ((16,), (20,), ()))
    pe = embed_nd(torch.rand(1, 36, 3, generator=draw).to(DEVICE) * 20, (16, 24, 24), 10_000)
    return img, txt, *block.modulation(vec), pe


def same(attend, q, k, v):
    return attend(q, k, v)


@torch.no_grad()
def test_blocks_pass_codes_and_plans_that_reach_into_attention_get_the_exact_one(installed):
    found, model = installed
    block = model.double_blocks[0]
    given = inputs_of(block)
    own, block.ops = block(*given), ops.PLAIN
    exact, block.ops = block(*given), found
    assert 0 < distance(own[0], exact[0]) < 0.03

    def tapped(*sites, reads=()):
        functions = {site: ((same if site == "attend" else torch.clone, ()),) for site in sites}
        return block(*given, Taps(20, functions, frozenset(reads)))

    for site in ("q", "img.q", "txt.k", "img.v", "attend"):
        assert torch.equal(tapped(site)[0], exact[0])
    assert torch.equal(tapped("img.mlp", "txt.attn")[0], own[0])
    assert distance(tapped(reads=("q", "k"))[0], own[0]) < 1e-3  # tensors, quantized apart: another order of sums


def test_single_blocks_too(installed):
    found, model = installed
    block, draw = model.single_blocks[0], torch.Generator().manual_seed(0)
    x, vec = torch.randn(1, 36, 128, generator=draw).to(DEVICE), torch.randn(1, 128, generator=draw).to(DEVICE)
    pe = embed_nd(torch.rand(1, 36, 3, generator=draw).to(DEVICE) * 20, (16, 24, 24), 10_000)
    own = block(x, *block.modulation(vec), pe)
    with_gradient = block(x.clone().requires_grad_(), *block.modulation(vec), pe)
    block.ops = ops.PLAIN
    exact = block(x, *block.modulation(vec), pe)
    block.ops = found
    assert 0 < distance(own, exact) < 0.03
    assert distance(with_gradient.detach(), exact) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("site", ["img.mlp", "img.q"])
@torch.no_grad()
def test_compiled_blocks_hold_either(installed, site):
    """Without a break of the graph."""
    block = installed[1].double_blocks[0]
    given, taps = inputs_of(block), Taps(20, {site: ((torch.neg, ()),)}, frozenset())
    plain = block(*given, taps)
    compiled = torch.compile(block.forward, fullgraph=True, backend="aot_eager")(*given, taps)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


def test_a_model_with_them_is_recorded_as_a_graph(installed):
    """Nothing in it counts as the user's code."""
    assert not has_user_code(installed[1]) and not has_user_code(tiny_pipeline().model)
