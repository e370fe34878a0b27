"""Where kernels are tested: on CUDA, else on the CPU by Triton's interpreter, which `tests/conftest.py` asks for.

Importing this skips a file on systems that Triton is not built for.
"""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no Triton for this system", allow_module_level=True)
if not CUDA and not hasattr(torch._library.triton, "_is_interpreted_triton_kernel"):
    pytest.skip("this torch's wrap_triton takes no interpreted kernels", allow_module_level=True)


@pytest.fixture
def e4m3_rounds_right(monkeypatch):
    """The interpreter rounds to e4m3 as cards do: its own loses the carry from mantissa to exponent, 1.99 -> 1."""
    if CUDA:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(x, source, target, rounding):
        if source != tl.float32 or target != tl.float8e4nv:
            return own(x, source, target, rounding)
        codes = torch.from_numpy(np.array(x, dtype=np.float32)).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
