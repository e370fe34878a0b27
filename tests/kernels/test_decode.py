"""The autoencoder's Triton kernels against the plain functions: on CUDA, else on the CPU by Triton's interpreter."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from golden_files import distance
from random_model import random_weights
from torch import nn
from triton_device import CUDA, DEVICE, DTYPES  # skips where there is no Triton

from flux_core.kernels import decode, put_decode
from flux_core.model import AutoEncoder, ae_ops
from flux_core.variants import VARIANTS

SIZES = pytest.mark.parametrize(
    ("batch", "side", "channels"), [(1, (8, 8), 64), (2, (5, 7), 32), (1, (1, 1), 128), (2, (9, 5), 64)], ids=str
)


@pytest.fixture(autouse=True)
def the_same_numbers(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if not CUDA:
        monkeypatch.setattr(decode, "CHUNKS", 16)  # the interpreter takes its time over empty ones, too


def draw(batch, channels, side, dtype=torch.float32):
    return torch.randn(batch, channels, *side).to(DEVICE, dtype)


def layer(made, dtype=torch.float32):
    return random_weights(made, std=0.3).requires_grad_(False).to(DEVICE, dtype)


def group_norm(channels, dtype=torch.float32):
    return layer(nn.GroupNorm(32, channels, eps=1e-6), dtype)


def conv3(inputs, outputs, dtype=torch.float32):
    return layer(nn.Conv2d(inputs, outputs, 3, padding=1), dtype)


def agree(name, *args):
    """fp32: to its last places. bf16: no farther from fp32 than the plain function; the interpreter cuts off."""
    found, plain = getattr(decode, name)(*args), getattr(ae_ops, name)(*args)
    exact = getattr(ae_ops, name)(*(x.float() if isinstance(x, torch.Tensor) else as_fp32(x) for x in args))
    assert found.shape == plain.shape and found.dtype == plain.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    if found.dtype == torch.float32:
        assert distance(found, plain) < 2e-6
    else:
        assert distance(found, exact) < (1.1 * distance(plain, exact) + 1e-3 if CUDA else 8e-3)


def as_fp32(made):
    return deepcopy(made).float()


@DTYPES
@SIZES
@pytest.mark.parametrize("name", ["norm", "norm_silu"])
def test_group_norm(name, dtype, batch, side, channels):
    x = 2 * draw(batch, channels, side, dtype) + 1
    if side != (1, 1):
        agree(name, group_norm(channels, dtype), x)
    agree(name, group_norm(channels, dtype), x.to(memory_format=torch.channels_last))


@DTYPES
@SIZES
def test_the_norm_behind_a_convolution_takes_its_bias(dtype, batch, side, channels):
    agree("conv_norm_silu", conv3(32, channels, dtype), group_norm(channels, dtype), draw(batch, 32, side, dtype))


@DTYPES
@SIZES
def test_the_sum_takes_the_bias(dtype, batch, side, channels):
    x, residual = draw(batch, 32, side, dtype), draw(batch, channels, side, dtype)
    kept = residual.clone()
    agree("conv_add", conv3(32, channels, dtype), x, residual)
    agree("conv_add", layer(nn.Conv2d(32, channels, 1), dtype), x, residual.to(memory_format=torch.channels_last))
    assert torch.equal(residual, kept)


@DTYPES
@SIZES
def test_upsampling(dtype, batch, side, channels):
    agree("upsample_conv", conv3(channels, 32, dtype), draw(batch, channels, side, dtype))


@DTYPES
@pytest.mark.parametrize(("batch", "side", "rows"), [(1, (8, 8), 4096), (2, (5, 7), 16), (1, (1, 1), 4)])
def test_attention(monkeypatch, dtype, batch, side, rows):
    monkeypatch.setattr(decode, "QUERIES", rows)
    agree("attend", *(3 * draw(batch, 32, side, dtype) for _ in range(3)))


def test_the_norm_keeps_its_precision_far_from_zero():
    x, norm = draw(1, 64, (16, 16)) + 1000, group_norm(64)
    exact = as_fp32(norm).double()(x.double())
    assert distance(decode.norm(norm, x), exact) < 1e-3
    x = torch.where(torch.arange(64, device=DEVICE).reshape(1, -1, 1, 1) % 2 == 0, x, x - 2000)  # within a group
    assert distance(decode.norm(norm, x), norm.double()(x.double())) < 1e-6


def test_many_chunks_of_odd_length(monkeypatch):
    monkeypatch.setattr(decode, "CHUNKS", 8)
    x = draw(2, 32, (23, 17)) * torch.linspace(0, 9, 23, device=DEVICE).reshape(-1, 1)
    agree("norm_silu", group_norm(32), x)


def test_a_layer_that_is_more_than_its_weights_is_called():
    seen, conv, norm = [], conv3(32, 64), group_norm(64)
    conv.register_forward_hook(lambda *_: seen.append("conv"))
    norm.register_forward_hook(lambda *_: seen.append("norm"))
    x = draw(1, 32, (4, 4))
    torch.testing.assert_close(decode.conv_norm_silu(conv, norm, x), ae_ops.conv_norm_silu(conv, norm, x))
    torch.testing.assert_close(decode.upsample_conv(conv, x), ae_ops.upsample_conv(conv, x))
    assert seen == 2 * ["conv", "norm"] + 2 * ["conv"]


def test_other_channels_than_powers_of_two():
    conv, norm, x = conv3(32, 96), group_norm(96), draw(1, 32, (4, 4))
    y = draw(1, 96, (4, 4))
    for name, args in (("conv_norm_silu", (conv, norm, x)), ("conv_add", (conv, x, y)), ("norm", (norm, y))):
        torch.testing.assert_close(getattr(decode, name)(*args), getattr(ae_ops, name)(*args))


def test_where_a_gradient_is_wanted_the_plain_functions_compute():
    conv, norm, x = conv3(32, 64), group_norm(64), draw(1, 32, (4, 4)).requires_grad_()
    y = decode.conv_add(conv3(64, 64), decode.conv_norm_silu(conv, norm, x), decode.norm(norm, conv(x)))
    decode.attend(*3 * [decode.upsample_conv(conv, x) + y.repeat(1, 1, 2, 2)]).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_the_same_bits_every_time():
    norm, x = group_norm(64), draw(1, 64, (9, 65))
    assert torch.equal(decode.norm_silu(norm, x), decode.norm_silu(norm, x))


@DTYPES
@pytest.mark.parametrize("batch", [1, 2] if CUDA else [1])
def test_a_whole_autoencoder(dtype, batch):
    params = replace(VARIANTS["flux-dev"].ae_params, ch=32, ch_mult=(1, 2, 1, 1), num_res_blocks=1)
    ae = random_weights(AutoEncoder(params), std=0.05).requires_grad_(False)
    z, pixels = torch.randn(batch, 16, 2, 3).to(DEVICE), draw(batch, 3, (16, 24))
    ae = ae.to(DEVICE)
    exact = ae.decode(z), ae.encode(pixels)
    ae.to(dtype)
    plain = ae.decode(z.to(dtype)), ae.encode(pixels.to(dtype))
    put_decode(ae, decode.OPS)
    found = ae.decode(z.to(dtype)), ae.encode(pixels.to(dtype))
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        if dtype == torch.float32:
            assert distance(ours, theirs) < 1e-5
        else:
            assert distance(ours, truth) < (1.1 if CUDA else 3) * distance(theirs, truth)


@pytest.mark.gpu
def test_compiled_the_kernels_are_taken_whole():
    params = replace(VARIANTS["flux-dev"].ae_params, ch=32, ch_mult=(1, 2, 1, 1), num_res_blocks=1)
    ae = random_weights(AutoEncoder(params), std=0.05).requires_grad_(False).to(DEVICE)
    z = draw(1, 16, (4, 6))
    exact, z = ae.decode(z), z.bfloat16()
    put_decode(ae.bfloat16(), decode.OPS)
    torch._dynamo.reset()
    compiled = torch.compile(ae.decode, fullgraph=True)(z)
    assert distance(compiled, exact) < 1.2 * distance(ae.decode(z), exact)
