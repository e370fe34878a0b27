"""Four bits widened by a Triton kernel: the plain function's weight to the bit."""

import pytest
import torch
from golden_files import FOLDER
from safetensors.torch import load_file
from torch import nn
from triton_device import CUDA, DEVICE  # skips where there is no Triton

from flux_core.checkpoint.bnb import find_bnb
from flux_core.checkpoint.source import find_source
from flux_core.kernels import nf4
from flux_core.linears.nf4 import Nf4Linear, quantize, to_dense
from flux_core.linears.nf4 import unpack as plain

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def rounded(x, dtype):
    """As the device rounds: Triton's interpreter cuts to bf16."""
    if CUDA or dtype != torch.bfloat16:
        return x.to(dtype)
    return (x.view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype)


def layer_of(x, **options):
    tensors, details = quantize(x, **options)
    return Nf4Linear(tensors, tuple(x.shape), details, None).to(DEVICE)


def arguments(layer):
    shape = layer.out_features, layer.in_features
    return layer.weight, layer.quant_map, layer.absmax, layer.nested, shape, layer.blocksize


@DTYPES
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "blocksize"),
    [((192, 128), 64), ((5, 13), 64), ((3, 7), 32), ((1, 1), 64), ((40, 200), 4096), ((7, 3072), 64), ((33, 96), 128)],
)
def test_it_is_the_plain_function(shape, blocksize, quant_type, double, dtype):
    """Shapes of one program and of several, with a last one that is full or not, and an odd count."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = layer_of(x, blocksize=blocksize, quant_type=quant_type, double=double)
    found = nf4.unpack(*arguments(layer), dtype)
    assert found.shape == shape and found.dtype == dtype and found.device.type == DEVICE
    assert torch.equal(found, rounded(plain(*arguments(layer), torch.float32), dtype))


@DTYPES
def test_bitsandbytes_own_codes(dtype):
    path = FOLDER / "nf4" / "tensors.safetensors"
    state = load_file(path)
    for name, one in find_bnb(find_source(path))[0].items():
        tensors = {role: state[part] for role, part in one.parts.items()}
        layer = Nf4Linear.read(tensors, one.shape, one.details, None).to(DEVICE)
        found = nf4.unpack(*arguments(layer), dtype)
        assert torch.equal(found, rounded(to_dense(tensors, one.shape, one.details).to(DEVICE), dtype)), name


def test_what_is_not_finite_stays_so():
    layer = layer_of(torch.randn(4, 64), double=False)
    layer.absmax[1], layer.absmax[2] = float("nan"), float("inf")
    found, expected = (f(*arguments(layer), torch.float32) for f in (nf4.unpack, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_layer_widens_by_it_in_both_directions():
    layer = Nf4Linear.of(nn.Linear(96, 80)).to(DEVICE)
    x = torch.randn(2, 3, 96).to(DEVICE).requires_grad_()
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    calls = []
    layer.unpack = lambda *args: (calls.append(1), nf4.unpack(*args))[1]
    found = layer(x)
    assert torch.equal(found, expected) and torch.equal(torch.autograd.grad(found.sum(), x)[0], grad)
    assert len(calls) == 2


@pytest.mark.gpu
def test_compiled_it_is_taken_whole():
    layer = Nf4Linear.of(nn.Linear(96, 80).bfloat16()).to(DEVICE)
    x = torch.randn(2, 3, 96).to(DEVICE, torch.bfloat16)
    layer.unpack = nf4.unpack
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected, rtol=1e-2, atol=1e-2)
