"""Every kernel that widens ggml's blocks is the plain function, to the bit."""

import pytest
import torch
from golden_files import read
from triton_device import CUDA, DEVICE  # skips where there is no Triton

from flux_core.kernels.gguf import KERNELS, LARGE, SMALL, unpack
from flux_core.linears import gguf as plain
from flux_core.linears.gguf import GgufLinear
from flux_core.linears.gguf_types import TYPES

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def blocks(kind, count):
    """The golden file's blocks, again and again."""
    raw = read("gguf/peer").tensors[f"raw.{kind}"]
    return raw.repeat(-(-count // len(raw)), 1)[:count].flatten()


def rounded(x, dtype):
    """As the device rounds: the interpreter cuts to bf16."""
    if dtype == torch.bfloat16 and not CUDA:
        return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return x.to(dtype)


@DTYPES
@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_is_its_plain_twin_to_the_bit(kind, dtype):
    per_program = SMALL if TYPES[kind].block == 32 else LARGE
    for count in (0, 1, per_program, 2 * per_program + 3):
        codes = blocks(kind, count)
        expected = rounded(plain.unpack(codes, kind, torch.float32), dtype)
        found = unpack(codes.to(DEVICE), kind, dtype).cpu()
        assert found.dtype == dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", [kind for kind in plain.UNPACK if kind not in KERNELS])
def test_other_types_are_widened_by_the_plain_function(kind):
    codes = torch.randint(0, 60, (5 * TYPES[kind].size,), dtype=torch.uint8)
    found = unpack(codes.to(DEVICE), kind, torch.float32).cpu()
    assert torch.equal(found, plain.unpack(codes, kind, torch.float32))


def test_a_layer_takes_it_plain_and_compiled():
    torch._dynamo.reset()
    one = GgufLinear(blocks("Q6_K", 24).to(DEVICE), "Q6_K", (24, 256), None)
    x = torch.randn(3, 256, device=DEVICE, requires_grad=True)
    expected = one(x)
    one.unpack = unpack
    torch.testing.assert_close(one(x), expected)
    one(x).sum().backward()
    torch.testing.assert_close(x.grad, one.widen(torch.float32).sum(0).expand(3, -1))
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.detach()), expected.detach())
    torch._dynamo.reset()
