"""A budget of a device's memory: whatever it is, the same pixels; blocks are there while they compute, and go home."""

import weakref
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from capped import Capped
from random_lora import factors, write
from torch import nn

from flux_core.device.budget import CONTEXT, Budget, bytes_for, bytes_of
from flux_core.device.memory import Picture
from flux_core.device.plan import make_plan, spread
from flux_core.errors import MemoryShortage, UsageError
from flux_core.hooks import Custom, Lora, Skip
from flux_core.linears.formats import quantize
from flux_core.main import main
from flux_core.pipeline import Pipeline, load_pipeline
from flux_core.pipeline import bundle as bundles
from flux_core.pipeline.bundle import Bundle
from flux_core.pipeline.ring import Ring
from flux_core.pipeline.stream import Stream
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread", "small")
DEVICE = torch.device("cpu", 0)
"""the CPU by another name, as in `test_offload.py`"""
FAST = {"num_steps": 3, "width": 32, "height": 32, "force": True}


def load(format=None):
    pipeline = load_pipeline("flux-mini", "cpu", "float32")
    if format:
        quantize(pipeline.model, format)
    return pipeline


def draw(pipeline, **fields):
    return pipeline.generate("a red apple", 1, **FAST, **fields)[0].tobytes()


def near(picture, other):
    """Whether two pictures differ by one of 255 levels at most: with LoRAs the CPU has been seen to round a last bit
    otherwise, once in a dozen runs. A scale that is lost differs by tens."""
    a, b = (np.frombuffer(x, dtype=np.uint8).astype(int) for x in (picture, other))
    return np.abs(a - b).max() <= 1


def within(loaded, budget):
    """The same networks, in so many bytes."""
    return Pipeline(loaded.variant, loaded.components, DEVICE, torch.float32, offload=True, budget=Budget(budget))


def blocks_of(loaded):
    return [*loaded.model.double_blocks, *loaded.model.single_blocks]


def sizes(loaded):
    """Bytes of a buffer for each block."""
    return [
        Bundle([x for name, x in block.named_parameters() if "mod" not in name]).size for block in blocks_of(loaded)
    ]


@cache
def plain_sizes():
    """Of the model as it is without a format."""
    return sizes(load())


def addresses(loaded):
    return [x.data_ptr() for block in blocks_of(loaded) for x in block.parameters()]


def stream_of(pipeline):
    """The transformer's, while it denoises."""
    (stream,) = pipeline.placement._streams.values()
    return stream


@pytest.mark.parametrize("format", [None, "fp8", "int8", "nf4"])
def test_the_pixels_are_the_same_in_every_budget(format):
    loaded = load(format)
    expected, home, largest = draw(loaded), addresses(loaded), max(plain_sizes())
    whole = sum(plain_sizes())
    for budget in (largest, 2 * largest, 3 * largest, whole, 10 * whole):
        assert draw(within(loaded, budget)) == expected
        assert addresses(loaded) == home


def test_as_many_blocks_are_resident_as_fit_and_the_others_take_turns_in_room_for_two():
    loaded, seen = load(), []
    each = sizes(loaded)
    assert each[0] == each[1] > each[2] == each[3] == each[4]
    for budget, resident, slots in [
        (each[0], 0, 1),
        (2 * each[0], 0, 2),
        (2 * each[0] + each[2], 1, 2),
        (sum(each) - 1, 1, 2),
        (sum(each), 5, 0),
    ]:
        pipeline = within(loaded, budget)

        def look(step, pipeline=pipeline):
            stream = stream_of(pipeline)
            ring = stream.ring
            assert stream.held + (ring.size if ring else 0) <= pipeline.placement.budget.size
            seen.append((len(stream.resident), ring.size // each[0] if ring else 0))

        pipeline.generate("a red apple", 1, on_step=look, **FAST)
        assert set(seen) == {(resident, slots)}
        seen.clear()


def test_below_one_block_the_error_says_so():
    loaded = load()
    with pytest.raises(MemoryShortage, match=r"are left for blocks of 0\.00 GB each\. Next: a larger --memory"):
        draw(within(loaded, max(sizes(loaded)) - 1))


def test_resident_blocks_are_spread_among_the_others():
    for room, places in [(0, []), (9, []), (10, [0]), (30, [0, 3, 6]), (45, [0, 2, 4, 6]), (90, list(range(9)))]:
        assert spread([10] * 9, room) == places


def test_plans_and_true_guidance_are_drawn_the_same():
    loaded = load()
    plan = [Skip(blocks="layer.1"), Custom(sites="*.img.out", fn=lambda x, at: 1.1 * x)]
    for fields in ({"plan": plan}, {"negative_prompt": "a pig", "true_cfg_scale": 2.0}):
        expected = draw(loaded, **fields)
        assert draw(within(loaded, 3 * max(sizes(loaded))), **fields) == expected


@pytest.mark.parametrize("format", [None, "int8"])
def test_a_lora_comes_with_its_block(tmp_path, format):
    """Attached when blocks are known already, with a scale that changes from step to step, and removed."""
    file = write(tmp_path / "some.safetensors", factors(VARIANTS["flux-mini"].params))
    loaded, plain, budget = load(format), load(format), 3 * max(plain_sizes())
    before = draw(plain)
    pipeline = within(loaded, budget)
    assert draw(pipeline) == before
    ours, theirs = pipeline.load_lora(file, 0.5), plain.load_lora(file, 0.5)
    with_lora = draw(plain)
    assert near(draw(pipeline), with_lora) and not near(with_lora, before)
    ours.scale = theirs.scale = 0.25
    assert near(draw(pipeline), draw(plain))
    ours.remove(), theirs.remove()
    assert draw(pipeline) == before
    plan = [Lora(file=str(file), scale=0.5, steps=["1-2"], blocks=["layer.0", "layer.3"]), Lora(file=str(file))]
    assert near(draw(pipeline, plan=plan), draw(plain, plan=plan))


@pytest.mark.parametrize("budget", [2, pytest.param(3, marks=pytest.mark.slow), 9])
def test_what_is_set_on_the_device_is_not_lost_when_blocks_go_home(tmp_path, budget):
    """Scales are set between two forwards, when resident blocks are there; the next picture begins at home."""
    file = write(tmp_path / "some.safetensors", factors(VARIANTS["flux-mini"].params))
    loaded, plain = load(), load()
    pipeline = within(loaded, budget * max(plain_sizes()))
    for scale in (0.7, 0.7, 0.3, 0.3):
        plan = [Lora(file=str(file), scale=scale)]
        assert near(draw(pipeline, plan=plan), draw(plain, plan=plan))
    handles = [one.load_lora(file, 0.5) for one in (pipeline, plain)]

    def turn(step):
        for handle in handles:
            handle.scale = 0.2

    pictures = [one.generate("a red apple", 1, on_step=turn, **FAST)[0].tobytes() for one in (pipeline, plain)]
    handles[0].scale = handles[1].scale = 0.2
    last = draw(plain)
    assert near(draw(pipeline), last) and not near(last, pictures[0])


@pytest.mark.parametrize("budget", [2, 9])
def test_a_lora_is_merged_into_blocks_that_were_there(tmp_path, budget):
    file = write(tmp_path / "some.safetensors", factors(VARIANTS["flux-mini"].params))
    loaded, plain = load(), load()
    pipeline = within(loaded, budget * max(plain_sizes()))
    for one in (pipeline, plain):
        draw(one)
    ours, theirs = (one.load_lora(file, 0.5, merge=True) for one in (pipeline, plain))
    assert near(draw(pipeline), draw(plain))
    ours.scale = theirs.scale = 0.25
    assert near(draw(pipeline), draw(plain))
    ours.remove(), theirs.remove()
    assert near(draw(pipeline), draw(plain))


def test_a_lora_is_merged_after_a_picture_that_was_left_in_the_middle(tmp_path):
    """Then blocks are still in the ring, at rest."""
    file = write(tmp_path / "some.safetensors", factors(VARIANTS["flux-mini"].params))
    loaded, plain = load(), load()
    pipeline, before = within(loaded, 2 * max(plain_sizes())), draw(plain)

    def leave(step):
        raise KeyboardInterrupt

    def left():
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate("a red apple", 1, on_step=leave, **FAST)

    left()
    ours, theirs = (one.load_lora(file, 0.5, merge=True) for one in (pipeline, plain))
    assert near(draw(pipeline), draw(plain)) and not near(draw(plain), before)
    left()
    ours.scale = theirs.scale = 0.25
    assert near(draw(pipeline), draw(plain))
    left()
    ours.remove()
    assert near(draw(pipeline), before)


def test_no_block_computes_at_home(monkeypatch):
    """Where memory was taken that the budget promised: blocks that found none come through a ring."""
    loaded = load()
    expected, each = draw(loaded), sizes(loaded)
    pipeline, taken = within(loaded, sum(each)), []
    begin = Stream.begin

    def watched(stream, block):
        if not taken and stream.ring is None:
            stream.settle(each[0])  # as if little had been left
            taken.append(len(stream.resident))
        begin(stream, block)
        bundle = stream.of[id(block)]
        assert bundle.entered and (id(bundle) in stream.resident or stream.ring is not None)

    monkeypatch.setattr(Stream, "begin", watched)
    assert draw(pipeline) == expected and taken == [1]


def test_numbers_written_to_a_block_in_the_ring_stay_when_it_is_brought_again():
    one = Counted(1)
    ring = Ring(torch.device("cpu"), one.size)
    ring.bring(one)
    one.views[0].tensor.fill_(7)
    ring.bring(one)
    assert one.values == {7}


class Fails:
    """Stands before a block: these of its calls run out of memory."""

    def __init__(self, block, *failing):
        self.block, self.failing, self.calls, self.forward = block, failing, 0, block.forward
        block.forward = self

    def __call__(self, *args, **fields):
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return self.forward(*args, **fields)


@pytest.mark.parametrize(("missing", "left"), [(0, [5, 3, 3]), (1, [1, 0, 0])])
def test_where_an_allocation_fails_two_blocks_go_home_and_that_block_is_computed_again(missing, left):
    loaded = load()
    expected, whole = draw(loaded), sum(sizes(loaded))
    counts = [Fails(block, *([1] if i == 3 else [])) for i, block in enumerate(blocks_of(loaded))]
    pipeline, resident = within(loaded, whole - missing), []
    pipeline.generate("a red apple", 1, on_step=lambda _: resident.append(len(stream_of(pipeline).resident)), **FAST)
    assert [one.calls for one in counts] == [3, 3, 3, 4, 3]
    assert resident == left
    for one in counts:
        del one.block.forward
    assert draw(pipeline) == expected


def test_with_nothing_to_send_home_the_ring_becomes_as_small_as_it_can_be():
    loaded = load()
    expected, each = draw(loaded), sizes(loaded)
    failing, rings = Fails(loaded.model.single_blocks[0], 1), []
    pipeline = within(loaded, 2 * each[0])
    look = lambda _: rings.append(stream_of(pipeline).ring_size)  # noqa: E731
    assert pipeline.generate("a red apple", 1, on_step=look, **FAST)[0].tobytes() == expected
    assert rings == [2 * each[0], each[0], each[0]] and failing.calls == 4


def test_with_nothing_to_send_home_it_is_a_shortage():
    loaded = load()
    Fails(loaded.model.single_blocks[0], *range(99))
    with pytest.raises(MemoryShortage):
        draw(within(loaded, sum(sizes(loaded))))


def test_t5_streams_where_it_does_not_fit():
    loaded = load()
    pipeline, blocks = within(loaded, 10**9), list(loaded.t5.model.encoder.block)
    expected = [x.clone() for x in pipeline.prompts("a red apple")]
    size = sum(x.nbytes for x in loaded.t5.model.parameters())
    for budget in (size - 1, Bundle(list(blocks[0].parameters())).size):
        pipeline = within(loaded, budget)
        found = pipeline.prompts("a red apple")
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert [len(block._forward_hooks) for block in blocks] == [1] * len(blocks)
        pipeline.placement._exchange(())
        assert [len(block._forward_hooks) for block in blocks] == [0] * len(blocks)


def test_what_shares_memory_at_home_shares_it_in_a_buffer():
    wide = torch.arange(24.0).reshape(4, 6)
    layer, up = nn.Linear(5, 4, bias=False, device="cpu", dtype=torch.float32), wide[:, 5:]
    layer.weight.data = wide[:, :5]
    bundle, home = Bundle([layer.weight, up, wide]), wide.data_ptr()
    buffer = torch.zeros(bundle.size, dtype=torch.uint8)
    bundle.copy(buffer)
    bundle.enter(buffer)
    assert wide.data_ptr() == layer.weight.data_ptr() == buffer.data_ptr() and up.data_ptr() == wide.data_ptr() + 20
    wide += 1
    assert torch.equal(layer.weight[0], torch.arange(1.0, 6)) and up[0, 0] == 6
    bundle.leave()
    assert wide.data_ptr() == home and layer.weight[0, 0] == 1  # what was written comes along


@pytest.mark.parametrize("can_be_locked", [True, False])
def test_small_pieces_move_into_locked_memory_and_large_ones_that_cannot_be_locked(monkeypatch, can_be_locked):
    """Locked memory is CUDA's: here other memory stands in for it."""

    def lock(home):
        if not can_be_locked:
            raise RuntimeError("memory cannot be locked")

    monkeypatch.setattr(bundles, "Lock", lock)
    monkeypatch.setattr(bundles, "locked", lambda size: torch.empty(size, dtype=torch.uint8))
    tensors = [torch.full((size,), float(i)) for i, size in enumerate([3, bundles.LARGE, 5, bundles.LARGE + 8])]
    homes = [x.data_ptr() for x in tensors]
    bundle = Bundle(tensors)
    bundle.pin()
    stays = [x.data_ptr() == home for x, home in zip(tensors, homes, strict=True)]
    assert stays == [False, can_be_locked, False, can_be_locked] and len(bundle.spans) == 3
    buffer = torch.zeros(bundle.size, dtype=torch.uint8)
    bundle.copy(buffer)
    for act in (lambda: bundle.enter(buffer), bundle.leave):
        act()
        assert all((x == i).all() for i, x in enumerate(tensors))


class Counted(Bundle):
    """A block of so many floats, and how often it was copied."""

    def __init__(self, value, size=128):
        super().__init__([torch.full((size,), float(value))])
        self.copies = 0

    def copy(self, buffer):
        self.copies += 1
        super().copy(buffer)

    @property
    def values(self):
        return set(self.views[0].tensor.tolist())


def test_a_block_that_is_on_its_way_is_not_copied_twice():
    blocks = [Counted(i) for i in range(4)]
    ring = Ring(torch.device("cpu"), 2 * blocks[0].size)
    for _ in range(2):
        for i, one in enumerate(blocks):
            ring.bring(one)
            assert one.values == {i} and ring.prefetch(blocks[(i + 1) % 4]) and not ring.prefetch(blocks[(i + 2) % 4])
            assert ring.memory.data_ptr() <= one.views[0].tensor.data_ptr() < ring.memory.data_ptr() + ring.size
            ring.done(one)
        ring.rest()
    assert [one.copies for one in blocks] == [3, 2, 2, 2]  # the first is on its way again
    blocks[0].views[0].tensor.fill_(7)  # at home: what was copied is not true any more
    ring.bring(blocks[0])
    assert blocks[0].values == {7} and blocks[0].copies == 4


def test_more_small_blocks_are_ahead_than_large_ones():
    large, small = [Counted(i, 256) for i in range(2)], [Counted(2 + i) for i in range(5)]
    ring = Ring(torch.device("cpu"), 2 * large[0].size)
    ring.bring(large[0])
    assert ring.prefetch(large[1]) and not ring.prefetch(small[0])
    ring.done(large[0])
    assert [ring.prefetch(one) for one in small] == [True, True, False, False, False]
    ring.bring(large[1])
    ring.done(large[1])
    assert [ring.prefetch(one) for one in small] == [True, True, True, True, False]
    for i, one in enumerate(small[:4]):
        ring.bring(one)
        assert one.values == {2 + i}
    ring.forget(small[0])
    assert ring.prefetch(small[4]) and small[0].values == {2}


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("7.5GiB", 8053063680), ("900 MB", 9 * 10**8), ("1024", 1024), ("12g", 12e9)],
)
def test_sizes(text, size):
    assert bytes_of(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1GB", "0GB", "nan", "1e9", "８GB"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="--memory must be a size, as in 8GB or"):
        bytes_of(text, "--memory")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--memory", "50MB"], "--memory 50MB (0.05 GB) is too little for 128x128 pixels: it takes at least 0.13 GB"),
        (["--memory", "lots"], "--memory must be a size"),
        (["--reserve", "1GB"], "--reserve goes with --memory auto"),
        (["--memory", "8GB", "--reserve", "1GB"], "--reserve goes with --memory auto"),
    ],
)
def test_wrong_flags(capsys, flags, said):
    assert main(["--prompt", "a", *flags, "--device", "cpu"]) == (5 if "too little" in said else 2)
    assert said in capsys.readouterr().err


def test_t5_is_freed_with_its_blocks():
    """By the command's last turn of encoding; what a budget knows of its blocks does not keep it."""
    loaded = load()
    whole = sum(x.nbytes for x in loaded.t5.model.parameters())
    for budget in (10**9, whole - 1):
        pipeline, gone = within(loaded, budget), weakref.ref(loaded.t5.ready())
        expected = pipeline.prompts("a pig")[0]
        pipeline.free_t5()
        assert gone() is None
        assert torch.equal(within(loaded, budget).prompts("a pig")[0], expected)


def test_two_pipelines_of_a_process_take_turns():
    loaded, other = load(), load("int8")
    first, second = (within(one, 3 * max(plain_sizes())) for one in (loaded, other))
    expected = draw(loaded), draw(other)
    for _ in range(2):
        assert (draw(first), draw(second)) == expected
        assert not first.placement._present and second.placement._present


def test_blocks_in_few_bits_choose_how_to_multiply_once(monkeypatch):
    """Where they come: a move to the CPU would choose its way, and they do not come by moves again."""
    from flux_core.linears.int8 import Int8Linear

    loaded = load("int8")
    pipeline = within(loaded, 3 * max(plain_sizes()))
    first = draw(pipeline)
    monkeypatch.setattr(Int8Linear, "choose_matmul", lambda self: pytest.fail("chosen again"))
    assert draw(pipeline) == first


def test_blocks_that_went_home_when_memory_ran_out_do_not_come_to_stay():
    loaded = load()
    pipeline = within(loaded, sum(sizes(loaded)))

    def look(step):
        stream = stream_of(pipeline)
        if not step.index:
            assert stream.evict()
        stream.settle(pipeline.placement.budget.size)
        assert 1 <= len(stream.resident) <= 3 and stream.ring is not None

    expected = draw(loaded)
    assert pipeline.generate("a red apple", 1, on_step=look, **FAST)[0].tobytes() == expected


def test_where_all_fits_nothing_moves_until_memory_runs_out():
    loaded = load("int8")
    expected = draw(loaded)
    budget = 3 * max(plain_sizes())
    pipeline = Pipeline(loaded.variant, loaded.components, DEVICE, torch.float32, budget=Budget(budget))
    assert draw(pipeline) == expected and pipeline.placement.is_fixed and not pipeline.placement._bundles
    pipeline.fallback.offload = True  # as out of memory does
    assert draw(pipeline) == expected and not pipeline.placement.is_fixed and pipeline.placement._bundles


@pytest.mark.parametrize("number", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_random_budgets_under_an_allocator_that_runs_out(number):
    """Blocks take all of the budget first, so what a forward needs has to be freed, in the middle of it."""
    loaded, random, least, failures = load(), Random(0), {}, 0
    for _ in range(number):
        guided = {"negative_prompt": "a pig", "true_cfg_scale": 2.0} if random.random() < 0.3 else {}
        size = {"width": random.choice([32, 64, 128]), "height": random.choice([32, 64, 128])}
        request = GenerationRequest(prompt="a red apple", seed=1, **FAST | size, **guided)
        key = request.model_dump_json()
        if key not in least:
            expected = loaded.denoiser.denoise([request])
            with torch.no_grad(), Capped() as allocator:
                within(loaded, 2 * max(sizes(loaded))).denoiser.denoise([request])
            least[key] = expected, allocator.peak
        expected, smallest = least[key]
        budget = random.randint(smallest, smallest + 2 * sum(sizes(loaded)))
        pipeline = within(loaded, budget)
        with torch.no_grad(), Capped(budget) as allocator:
            found = pipeline.denoiser.denoise([request])
        assert torch.equal(found, expected), (budget, smallest, key)
        failures += allocator.failures
    assert failures > number // 4


def test_a_budget_that_cuda_takes_for_itself_is_refused():
    card = torch.device("cuda")
    assert bytes_for(str(CONTEXT + 1), None, card) == 1
    with pytest.raises(UsageError, match=r"--memory 0\.5GB leaves nothing for a model: CUDA itself takes 0\.9 GB"):
        bytes_for("0.5GB", None, card)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_on_a_card_the_pixels_are_the_same_in_every_budget(tmp_path, dtype):
    """With a LoRA on blocks that come and go, plans and true guidance; from the smallest budget on that is printed."""
    file = str(write(tmp_path / "some.safetensors", factors(VARIANTS["flux-mini"].params)))
    whole = load_pipeline("flux-mini", "cuda", dtype)
    plan = make_plan(whole.variant, 0, dtype, None, Picture(64, 64, rows=2))
    requests = (
        {},
        {"plan": [Skip(blocks="layer.1")]},
        {"plan": [Lora(file=file, scale=0.5, steps=["1-2"])]},
        {"negative_prompt": "a pig", "true_cfg_scale": 2.0},
    )
    how = {"num_steps": 3, "width": 64, "height": 64, "force": True}
    expected = [whole.generate("a red apple", 1, **how, **fields)[0].tobytes() for fields in requests]
    del whole
    for budget in (plan.smallest, plan.smallest + sum(plan.blocks) // 2):
        ours = load_pipeline("flux-mini", "cuda", dtype, memory=str(budget))
        assert ours.fallback.offload
        assert [ours.generate("a red apple", 1, **how, **fields)[0].tobytes() for fields in requests] == expected
        del ours


@pytest.mark.gpu
def test_compiled_blocks_come_and_go():
    how = {"num_steps": 3, "width": 64, "height": 64, "force": True}
    smallest = make_plan(VARIANTS["flux-mini"], 0, "bfloat16", None, Picture(64, 64)).smallest
    pictures = []
    for memory in (None, str(smallest)):
        pipeline = load_pipeline("flux-mini", "cuda", "bfloat16", compile=True, memory=memory)
        pictures.append(pipeline.generate("a red apple", 1, **how)[0].tobytes())
        del pipeline
    assert pictures[0] == pictures[1]
