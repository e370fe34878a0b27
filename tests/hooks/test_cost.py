"""The cost of hooks: nothing without a plan, no graph for a skip, else one for each kind of block, no graph breaks."""

import sys
from pathlib import Path

import pytest
import torch
from golden_files import flux_of, read
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from flux_core.hooks import (
    AttentionMaps,
    AttentionMask,
    Capture,
    Custom,
    FirstBlockCache,
    HookRun,
    Scale,
    ShareKV,
    Skip,
    traceable,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from hook_cost import without_taps

GOLDEN = read("transformer_dev")
INPUTS = GOLDEN.group("in.")
ALL = "layer.*"


class Operators(TorchDispatchMode):
    """The names of all operators, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(fn):
    with Operators() as mode:
        fn()
    return mode.names


def test_without_a_plan_the_operators_are_those_of_blocks_that_have_no_taps():
    model = flux_of(GOLDEN)
    plain = without_taps(model)
    expected = operators(lambda: plain(**INPUTS))
    assert operators(lambda: model(**INPUTS)) == expected
    assert operators(lambda: model(**INPUTS, run=HookRun([], model.params))) == expected
    skipping = operators(lambda: model(**INPUTS, run=HookRun([Skip(blocks=ALL)], model.params)))
    assert len(skipping) < len(expected) / 4


def test_an_empty_plan_changes_no_bit():
    model = flux_of(GOLDEN)
    assert torch.equal(model(**INPUTS, run=HookRun([], model.params)), model(**INPUTS))


@pytest.mark.parametrize(
    ("cache", "waits"), [({"threshold": 0.05}, 1), ({"threshold": 0}, 1), ({"schedule": "1-5/2"}, 0)]
)
def test_deciding_to_cache_waits_for_the_device_once_in_a_forward_at_most(cache, waits):
    """Every number that Python asks of a tensor passes through one operator, and stops the queue of a GPU."""
    model, seen = flux_of(GOLDEN), []
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0]
    run = HookRun([FirstBlockCache(**cache)], model.params, sigmas)
    for sigma in sigmas[:-1]:
        run.begin(sigma)
        names = operators(lambda: model(**INPUTS, run=run))
        seen.append(sum("_local_scalar_dense" in name or "nonzero" in name for name in names))
    assert seen[0] == 0 and max(seen) == waits, seen


@pytest.fixture
def compiled():
    """A model with every block compiled whole, and a function that counts the graphs that a plan adds."""
    torch._dynamo.reset()
    model, counter = flux_of(GOLDEN), CompileCounter()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend=counter, fullgraph=True)

    def graphs(*plan, branches=("image",)):
        before = counter.frame_count
        model(**INPUTS, run=HookRun(plan, model.params, branches=branches) if plan else None)
        return counter.frame_count - before

    assert graphs() == 2  # one for each kind of block
    yield graphs
    torch._dynamo.reset()


def test_skipping_and_caching_compile_nothing(compiled):
    assert compiled(Skip(blocks="layer.0,layer.3")) == 0
    assert compiled(Skip(blocks=ALL)) == 0
    assert compiled(FirstBlockCache()) == 0


def test_values_that_the_loop_computes_compile_nothing(compiled):
    sites = "vec,*.gate,*.img.in,*.txt.out"
    assert compiled(Custom(sites=sites, fn=lambda x, at: 2 * x)) == 0
    assert compiled(Scale(sites=sites, value=0.5)) == 0


def test_sharing_keys_and_values_compiles_one_graph_for_each_kind_of_block(compiled):
    branches = ("source", "edit")
    assert compiled(ShareKV(blocks="layer.0"), branches=branches) == 1
    assert compiled(ShareKV(blocks=ALL), branches=branches) == 1
    for other in ("layer.1-2", "single_blocks.2", ALL):
        assert compiled(ShareKV(blocks=other, source="edit"), branches=branches) == 0


def slow(*args):
    return pytest.param(*args, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "make",
    [
        slow(lambda blocks: Capture(sites=[f"{blocks}.img.q"], into={})),
        lambda blocks: Capture(sites=[f"{blocks}.*"], into={}),
        lambda blocks: AttentionMaps(blocks=[blocks], into={}),
        lambda blocks: AttentionMask(blocks=[blocks], value=torch.rand(1, 1, 1, 1) > 2),
        slow(lambda blocks: Scale(sites=[f"{blocks}.head.1"], value=len(blocks))),
        slow(lambda blocks: Scale(sites=[f"{blocks}.img.attn"], value=len(blocks))),
        slow(lambda blocks: Custom(sites=[f"{blocks}.img.v"], fn=half)),
        lambda blocks: Custom(sites=[f"{blocks}.attend"], fn=half_attention),
    ],
    ids=["capture one", "capture all", "maps", "mask", "head", "scale", "function", "attention"],
)
def test_one_block_or_all_is_the_same_graph(compiled, make):
    assert compiled(make("double_blocks.1")) == 1
    assert compiled(make("single_blocks.0")) == 1
    for others in ("double_blocks.*", "single_blocks.*", "double_blocks.0"):
        assert compiled(make(others)) == 0


@traceable
def half(x):
    return x / 2


@traceable
def half_attention(attend, q, k, v):
    return attend(q, k, v) / 2


def test_a_function_that_may_not_trace_runs_eagerly_and_that_is_said_once(compiled):
    def strange(x, at):
        return x * float(at.step + 1)  # would be another graph at every step

    with pytest.warns(UserWarning, match="strange.*not marked @traceable") as said:
        assert compiled(Custom(sites="*.img.q", fn=strange)) == 0
    assert len(said) == 1
