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
