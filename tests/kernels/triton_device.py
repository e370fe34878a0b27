"""Where kernels are tested: on CUDA, else on the CPU by Triton's interpreter. Importing this skips a file elsewhere."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on the CPU the kernels run with TRITON_INTERPRET=1 only", allow_module_level=True)
pytest.importorskip("triton", reason="the CPU build of torch comes without Triton")
if not CUDA and not hasattr(torch._library.triton, "_is_interpreted_triton_kernel"):
    pytest.skip("this torch's wrap_triton takes no interpreted kernels", allow_module_level=True)
