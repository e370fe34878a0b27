"""Blocks that come and go while a LoRA learns: the same numbers in every budget, and few copies."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from capped import Capped
from random_model import random_weights, small_variant
from small import RECIPE, examples

from flux_core.errors import MemoryShortage, UsageError
from flux_core.linears.formats import quantize
from flux_core.model import Flux, ops
from flux_core.training import PRESETS, Example, adapt, train
from flux_core.training.loop import validate
from flux_core.training.streaming import streaming

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = torch.device("cpu", 0)
"""the CPU by another name: what moves there gets memory of its own"""
PARAMS = replace(small_variant("flux-dev").params, context_in_dim=16, vec_in_dim=8)
"""two double blocks and three single ones, which are smaller"""
BLOCKS = PARAMS.depth + PARAMS.depth_single_blocks
PATTERNS = {
    "attention": PRESETS["attention"],
    "everything": (*PRESETS["blocks"], "norm_out.linear", "x_embedder"),
    "to_q": ("to_q",),
    "modulation": ("norm.linear",),
    "time": ("time_text_embed.*",),
    "one": ("single_transformer_blocks.1.attn.to_v",),
}
SHORT = replace(RECIPE, steps=3, checkpointing="blocks")


def adapter_of(patterns="attention", format=None, params=PARAMS, dtype=torch.float32, std=0.1, **kind):
    model = random_weights(Flux(params), std=std)
    if format not in (None, "bf16"):
        quantize(model, format)
    model.to(torch.bfloat16 if format == "bf16" else dtype)
    return adapt(model, PATTERNS[patterns], 2, 4, torch.Generator().manual_seed(0), **kind)


def some(format=None):
    wide = torch.bfloat16 if format == "bf16" else torch.float32
    return [Example(one.name, one.latents, one.txt.to(wide), one.vec.to(wide)) for one in examples()]


def blocks_of(adapter):
    return [*adapter.model.double_blocks, *adapter.model.single_blocks]


def sizes(patterns="attention", format=None, params=PARAMS):
    """Bytes of a buffer for the frozen numbers of each block."""
    with streaming(adapter_of(patterns, format, params).model, DEVICE, 10**9, 0) as trip:
        return [bundle.size for bundle in trip.bundles]


def result(adapter, losses):
    return losses, {name: x.clone() for name, x in adapter.state().items()}


def equal(one, other):
    return one[0] == other[0] and all(torch.equal(x, other[1][name]) for name, x in one[1].items())


def plain(recipe=SHORT, format=None, **fields):
    adapter = adapter_of(format=format, **fields)
    return result(adapter, train(adapter, some(format), recipe))


def streamed(budget, recipe=SHORT, format=None, at_work=0, look=None, **fields):
    adapter = adapter_of(format=format, **fields)
    with streaming(adapter.model, DEVICE, budget, at_work) as trip:
        losses = train(adapter, some(format), recipe, fetch=trip.fetch, on_step=lambda _: look and look(trip))
    return result(adapter, losses)


@pytest.mark.parametrize(
    ("format", "patterns"),
    [
        (None, "attention"),
        pytest.param(None, "everything", marks=pytest.mark.slow),
        (None, "one"),
        ("bf16", "everything"),
        ("int8", "everything"),
        pytest.param("nf4", "attention", marks=pytest.mark.slow),
        ("nf4", "everything"),
    ],
)
def test_the_numbers_are_the_same_in_every_budget(format, patterns):
    each = sizes(patterns, format)
    largest, whole, seen = max(each), sum(each), []
    expected = plain(format=format, patterns=patterns)
    for budget in (largest, 2 * largest, 2 * largest + each[-1], whole):
        look = lambda trip: seen.append((len(trip.resident), trip.ring_size // largest))  # noqa: E731
        assert equal(streamed(budget, format=format, patterns=patterns, look=look), expected)
    assert list(dict.fromkeys(seen)) == [(0, 1), (0, 2), (1, 2), (BLOCKS, 0)]


@pytest.mark.parametrize(
    "change",
    [{"precision": "fp16"}, {"batch": 1, "accumulation": 3}, {"ema": 0.9}, {"checkpointing": "mlp"}],
)
def test_in_every_recipe(change):
    recipe = replace(SHORT, **change)
    assert equal(streamed(2 * max(sizes()), recipe), plain(recipe))


def test_dora_reads_weights_that_come():
    assert equal(streamed(2 * max(sizes()), dora=True), plain(dora=True))


def copies(slots, params):
    """What is copied in a step: numbers of blocks, and where in the order of visits it happens."""
    adapter, copied, found = adapter_of("to_q", params=params), [], []
    with streaming(adapter.model, DEVICE, slots * max(sizes("to_q", params=params)), 0) as trip:
        for i, bundle in enumerate(trip.bundles):

            def copy(buffer, i=i, plain=bundle.copy):
                copied.append((i, trip.at))
                plain(buffer)

            bundle.copy = copy

        def look(_):
            found.append(copied.copy())
            copied.clear()

        train(adapter, some(), replace(SHORT, accumulation=1), fetch=trip.fetch, on_step=look)
    assert found[1] == found[2]
    return found[1]


def test_at_the_turns_nothing_is_copied_twice():
    """Of five equal blocks. A ring of one place copies when a block is called; a larger one while another computes."""
    params = replace(PARAMS, depth=0, depth_single_blocks=5)
    assert copies(1, params) == [(1, 1), (2, 2), (3, 3), (4, 4), (3, 6), (2, 7), (1, 8), (0, 9)]
    assert copies(2, params) == [(2, 1), (3, 2), (4, 3), (2, 6), (1, 7), (0, 8)]


@pytest.mark.parametrize("slots", [1, 2])
def test_no_block_is_copied_more_than_twice(slots):
    """Where large and small blocks share a ring."""
    counts = Counter(number for number, _ in copies(slots, PARAMS))
    assert max(counts.values()) == 2 and counts[BLOCKS - 1] == 1


def test_where_only_late_blocks_learn_the_others_compute_once():
    adapter = adapter_of("one")
    with streaming(adapter.model, DEVICE, max(sizes()), 0) as trip:
        visits, begin = [], trip.begin
        trip.begin = lambda block: (visits.append(trip.place[id(trip.of[id(block)])]), begin(block))
        train(adapter, some(), replace(SHORT, accumulation=1, steps=1), fetch=trip.fetch)
    assert visits == [0, 1, 2, 3, 4, 4, 3]


def velocity(model, fetch=iter):
    draw = torch.Generator().manual_seed(1)
    img, txt, y = (torch.randn(1, *shape, generator=draw) for shape in ((6, 64), (3, 16), (8,)))
    with torch.no_grad():
        ids, level, guidance = (torch.zeros(1, 6, 3), torch.zeros(1, 3, 3)), torch.tensor([0.5]), torch.tensor([3.5])
        return model(img, ids[0], txt, ids[1], level, y, guidance, fetch=fetch)


@pytest.mark.parametrize("format", [None, "int8"])
def test_what_has_learned_is_at_home_again(format):
    adapter, other = adapter_of("everything", format), adapter_of("everything", format)
    homes = {name: x.data_ptr() for name, x in adapter.model.named_parameters() if "_blocks" in name}
    with streaming(adapter.model, DEVICE, 2 * max(sizes()), 0) as trip:
        train(adapter, some(), SHORT, fetch=trip.fetch)
        trip.rest()
        assert validate(adapter, some()[:1], SHORT) > 0  # at rest all blocks are at home
    train(other, some(), SHORT)
    assert torch.equal(velocity(adapter.model), velocity(other.model))
    after = {name: x.data_ptr() for name, x in adapter.model.named_parameters()}
    assert all(after[name] == home for name, home in homes.items() if "factors" not in name)


def test_without_gradients_blocks_stream_in_order():
    adapter = adapter_of()
    expected = velocity(adapter.model)
    with streaming(adapter.model, DEVICE, 2 * max(sizes()), 0) as trip:
        assert torch.equal(velocity(adapter.model, trip.fetch), expected) and len(trip.order) == BLOCKS


# Where memory runs out ---------------------------------------------------------------------------------


class Fails:
    """Stands before a block: these of its calls run out of memory, at their beginning or behind their end."""

    def __init__(self, block, *failing, late=False):
        self.block, self.failing, self.late, self.calls, self.forward = block, failing, late, 0, block.forward
        block.forward = self

    def __call__(self, *args):
        self.calls += 1
        fails = self.calls - 1 in self.failing
        found = None if fails and not self.late else self.forward(*args)
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return found


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("call", [0, 1])
def test_where_an_allocation_fails_two_blocks_go_home_and_that_block_is_computed_again(call, late):
    """In the forward, and in the recomputation, half of which may be done."""
    expected, adapter, left = plain(), adapter_of(), []
    with streaming(adapter.model, DEVICE, sum(sizes()), 0) as trip:
        failing = Fails(blocks_of(adapter)[3], call, late=late)
        look = lambda _: left.append((len(trip.resident), trip.ring is not None))  # noqa: E731
        losses = train(adapter, some(), SHORT, fetch=trip.fetch, on_step=look)
    assert equal(result(adapter, losses), expected)
    assert left == [(3, True)] * 3 and failing.calls == 2 * 2 * 3 + 1


def test_with_nothing_to_send_home_it_is_the_error():
    adapter = adapter_of()
    with streaming(adapter.model, DEVICE, sum(sizes()), 0) as trip:
        Fails(blocks_of(adapter)[3], *range(99))
        with pytest.raises(torch.OutOfMemoryError):
            train(adapter, some(), SHORT, fetch=trip.fetch)
    assert all(not bundle.entered for bundle in trip.bundles)


def test_under_an_allocator_that_runs_out():
    """Wherever in a block that is, its gradient included: resident blocks take what a step needs."""
    recipe, largest, failures = replace(SHORT, steps=1), max(sizes()), 0
    expected = plain(recipe)
    with Capped() as allocator:
        streamed(2 * largest, recipe)
    for spare in (0, largest):
        with Capped(allocator.peak + spare) as limited:
            assert equal(streamed(2 * largest + spare + largest // 2, recipe), expected)
        failures += limited.failures
    assert failures > 0


# What is refused ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said():
    adapter = adapter_of()
    said = pytest.raises(MemoryShortage, match="are left for blocks of")
    with said, streaming(adapter.model, DEVICE, max(sizes()) + 10, 11):
        pass
    assert velocity(adapter.model).isfinite().all()


def test_what_is_before_the_modulation_cannot_learn():
    adapter = adapter_of("time")
    said = pytest.raises(UsageError, match=r"time_in, .*vector_in cannot learn.*Next: leave time_text_embed out")
    with said, streaming(adapter.model, DEVICE, 10**9, 0):
        pass


def test_factors_beside_modulation_learn_where_they_are():
    """Its layers are at home, copied for the call; `meta` stands in for a device."""
    adapter = adapter_of("modulation", dora=True)
    (layer,) = (x for name, x in adapter.model.named_modules() if name == "single_blocks.0.modulation.lin")
    layer.factors.to("meta")
    ops.modulation(layer, torch.empty(2, PARAMS.hidden_size, device="meta")).sum().backward()
    grads = [x.grad for x in layer.factors.parameters()]
    assert len(grads) == 3 and all(x is not None and x.is_meta for x in grads)
    assert layer.base.weight.device.type == "cpu" and layer.base.weight.grad is None


# Compiled, and on a card -------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_blocks_come_and_go():
    found, recipe = [], replace(SHORT, steps=1)
    for budget in (2 * max(sizes()), 10**9):
        adapter = adapter_of("to_q")
        for block in blocks_of(adapter):
            block.compile(backend="aot_eager", fullgraph=True)
        with streaming(adapter.model, DEVICE, budget, 0) as trip:
            losses = train(adapter, some(), recipe, fetch=trip.fetch)
        found.append(result(adapter, losses))
    assert equal(*found)
    assert found[0][0] == pytest.approx(plain(recipe, patterns="to_q")[0], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "int8", "nf4"])
def test_on_a_card_a_budget_changes_no_bit(format):
    """A ring of two places, or all blocks resident. They are large, of 50 MB in bf16, beside what a step needs."""
    card = torch.device("cuda")
    params = replace(PARAMS, hidden_size=1024, num_heads=8, axes_dim=(16, 56, 56), mlp_ratio=4.0)
    at_work, found, peaks = 2**28, [], []  # cuBLAS has workspaces for two threads
    for slots in (2, 99):
        adapter = adapter_of("everything", format, params, torch.bfloat16, std=0.02)
        with streaming(adapter.model, card, 2**33, 0) as trip:
            largest, whole = max(bundle.size for bundle in trip.bundles), sum(bundle.size for bundle in trip.bundles)
            outside = torch.cuda.memory_allocated() - trip.held
        budget = outside + at_work + min(slots * largest, whole) + 2**20
        torch.cuda.reset_peak_memory_stats()
        with streaming(adapter.model, card, budget, at_work) as trip:
            assert (trip.ring_size, trip.held) == ((2 * largest, 0) if slots == 2 else (0, whole))
            losses = train(adapter, some("bf16"), SHORT, fetch=trip.fetch)
            peaks.append(torch.cuda.max_memory_allocated())
        assert peaks[-1] <= budget
        found.append(result(adapter, losses))
        del adapter, trip
    assert equal(*found)
    assert peaks[0] < peaks[1] - largest
