"""FLUX.1-dev at full size, a megapixel, random weights, on a card: every fast way against the plain one."""

import sys
from pathlib import Path

import pytest
import torch
from golden_files import distance

from flux_core.kernels import install, put
from flux_core.linears.formats import quantize
from flux_core.linears.fp8 import has_fp8_units
from flux_core.model import ModulationTable, ops
from flux_core.variants import VARIANTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from parity_diffusers import in_dtype_of, random_flux, random_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SIGMA = 0.75


@torch.no_grad()
def test_the_fast_ways_agree_with_the_plain_one():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    params = VARIANTS["flux-dev"].params
    model = random_flux(params, "cuda")
    inputs = in_dtype_of(model, random_inputs(params, 64, 512, "cuda"))
    inputs["timesteps"] = torch.full_like(inputs["timesteps"], SIGMA)
    put(model, ops.PLAIN)
    plain, found = model(**inputs), {}

    assert install(model, "cuda") is not ops.PLAIN
    found["kernels"] = model(**inputs)
    table = ModulationTable(model, [1.0, SIGMA], inputs["y"], inputs["guidance"])
    assert torch.equal(model(**inputs, mods=table.at(SIGMA)), found["kernels"])  # a table changes no bit
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True)
    found["compiled"] = model(**inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert all(distance(one, plain) < 0.03 for one in found.values()), {k: distance(v, plain) for k, v in found.items()}

    if has_fp8_units(torch.device("cuda")):
        quantize(model)
        put(model, ops.PLAIN)
        with torch.compiler.set_stance("force_eager"):
            slow = model(**inputs)
            install(model, "cuda")
            fast = model(**inputs)
        assert distance(slow, plain) < 0.15
        assert distance(fast, plain) < 1.05 * distance(slow, plain)
        assert distance(model(**inputs), plain) < 1.05 * distance(slow, plain)
