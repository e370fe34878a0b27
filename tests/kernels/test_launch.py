"""How kernels are launched: no compiler is imported for them, and one that comes later finds their operators."""

import os
import subprocess
import sys
import threading
import time

import torch
import triton_device  # noqa: F401  skips where there is no Triton

from flux_core.kernels import launch


def test_kernels_wait_for_no_compiler():
    """torch._dynamo takes seconds to import; a compiler that comes later still finds operators."""
    code = """
import sys, torch
from flux_core.kernels import codes, cudnn_fp8, decode, flash, fused, gguf, int8, int8_product, launch, nf4, products
from flux_core.kernels import quantized, thin
x, row = torch.ones(2, 3, 16, dtype=torch.float32), torch.ones(2, 1, 16, dtype=torch.float32)
found = fused.gated_sum(x, row, x)
assert not {"torch._dynamo", "sympy"} & {*sys.modules}
assert all(map(launch.known, [*launch._unknown])) and not launch._unknown
assert torch.equal(torch.ops.flux_core.gated_sum(x, row, x), found)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_an_operator_becomes_known_once(monkeypatch):
    made, begun = [], threading.Event()

    def slowly():
        begun.set()
        time.sleep(0.1)
        made.append(None)

    monkeypatch.setitem(launch._unknown, "slow", slowly)
    first = threading.Thread(target=launch.known, args=("slow",))
    first.start()
    begun.wait()
    assert launch.known("slow") and len(made) == 1
    first.join()


def test_threads_call_an_operator_while_another_compiles_it(request):
    before = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(before))
    sys.setswitchinterval(1e-5)
    x, errors = torch.ones(4), []
    for number in range(5):
        name, over = f"double_{os.getpid()}_{number}", threading.Event()

        def double(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        call = launch.opaque(name, torch.empty_like)(double)

        def again(call=call, over=over) -> None:
            while not over.is_set():
                try:
                    call(x)
                except Exception as error:
                    errors.append(error)
                    return

        others = [threading.Thread(target=again) for _ in range(2)]
        for thread in others:
            thread.start()
        torch._dynamo.reset()
        found = torch.compile(lambda x, call=call: call(x) + 1, backend="eager", fullgraph=True)(x)
        over.set()
        for thread in others:
            thread.join()
        assert torch.equal(found, x * 2 + 1) and not errors
