"""A handle and its model: nothing stays behind, whatever fails, is dropped, copied or cast in between."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from random_lora import PREFIX, factors, write
from safetensors.torch import load_file
from tiny import tiny_variant
from torch import nn

from flux_core.errors import UsageError
from flux_core.linears import branch
from flux_core.linears.branch import BranchedLinear
from flux_core.lora import attach, attached
from flux_core.lora.merged import MergedLayer, Written
from flux_core.model import Flux

PARAMS = tiny_variant().params
QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
MERGE = pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])


def new_model():
    torch.manual_seed(0)
    return Flux(PARAMS).eval().requires_grad_(False)


@pytest.fixture
def model():
    return new_model()


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / f"{seed}.safetensors", factors(PARAMS, seed=seed, alpha=2.0)) for seed in range(2)]


def state_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())


def failing(function, at):
    """The function, which runs out of memory at that call."""
    calls = []

    def call(*args):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("out of memory")
        return function(*args)

    return call


PLACES = {"beside": (BranchedLinear, "add"), "merged": (MergedLayer, "write"), "scaled": (BranchedLinear, "refresh")}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("others", [0, 1])
def test_memory_that_runs_out_leaves_no_trace(model, files, monkeypatch, where, others):
    kept = [attach(model, path, merge=where == "merged") for path in files[:others]]
    before, (kind, name) = state_of(model), PLACES[where]
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(kind, name, failing(getattr(kind, name), 30 if where == "scaled" else 6))
        attach(model, files[1], 0.5, merge=where == "merged")
    assert same(model, before) and attached(model) == kept
    for handle in kept:
        handle.remove()
    assert same(model, state_of(new_model()))


@MERGE
def test_a_scale_that_was_half_written_is_written_again(model, files, monkeypatch, merge):
    handle = attach(model, files[0], merge=merge)
    kind, name = PLACES["merged" if merge else "scaled"]
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(kind, name, failing(getattr(kind, name), 6))
        handle.scale = 0.5
    handle.scale = 0.5
    other = new_model()
    attach(other, files[0], 0.5, merge=merge)
    assert same(model, state_of(other))


@MERGE
def test_a_dropped_model_is_freed_at_once(files, merge):
    model = new_model()
    handle = attach(model, files[0], merge=merge)
    watched = [weakref.ref(x) for x in (model, model.get_submodule(QKV), model.get_parameter("img_in.bias"))]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [found() for found in watched] == [None] * 3
    finally:
        gc.enable()
    handle.scale = 0.5  # of nothing
    handle.remove()
    assert not handle.is_attached


@MERGE
def test_a_copy_has_handles_of_its_own(model, files, merge):
    clip = nn.ModuleDict({"q": nn.Linear(2, 2)})
    handle = attach(model, files[0], 0.5, merge=merge, text={"clip": clip})
    before, other = state_of(model), copy.deepcopy(model)
    (mine,) = attached(other)
    assert mine.networks == {"transformer": other} and mine.scale == 0.5 and mine is not handle
    mine.scale = 0.25
    assert same(model, before) and not same(other, before)
    handle.remove()
    assert same(model, state_of(new_model())) and attached(other) == [mine]
    quarter = new_model()
    attach(quarter, files[0], 0.25, merge=merge)
    assert same(other, state_of(quarter))
    mine.remove()
    assert same(other, state_of(new_model())) and not attached(other)


def test_names_and_hooks_while_it_is_attached(model, files):
    """As docs/lora.md says it."""
    handle, seen = attach(model, files[0]), []
    layer = model.get_submodule(QKV)
    layer.register_forward_hook(lambda *_: seen.append("wrapped"))
    layer.base.register_forward_hook(lambda *_: seen.append("base"))
    assert f"{QKV}.base.weight" in model.state_dict()
    layer(torch.ones(1, 16))
    assert sorted(seen) == ["base", "wrapped"]
    handle.remove()
    model.get_submodule(QKV)(torch.ones(1, 16))
    assert seen[2:] == ["base"] and f"{QKV}.weight" in model.state_dict()


def test_a_pickled_model_has_its_branches_and_no_handles(model, files):
    handle = attach(model, files[0], 0.5)
    torch.save(model, data := io.BytesIO())
    data.seek(0)
    other = torch.load(data, weights_only=False)
    assert same(other, state_of(model)) and not attached(other) and attached(model) == [handle]


def test_merging_sums_each_weight_once(model, files, monkeypatch):
    summed, kept = [], []
    of, sum_up = MergedLayer.of, MergedLayer._summed
    monkeypatch.setattr(MergedLayer, "of", lambda layer: kept.append(1) or of(layer))
    monkeypatch.setattr(MergedLayer, "_summed", lambda layer, weight: summed.append(1) or sum_up(layer, weight))
    for count, path in enumerate(files, 1):
        handle = attach(model, path, 0.3 * count, merge=True)
        assert len(summed) == count * len(handle.places["transformer"]) and len(kept) == 23


def test_a_merged_difference_goes_where_the_weight_is():
    """As when the file was read onto another device than that of a layer that takes turns."""

    class Elsewhere:
        def to(self, like):
            return torch.ones(2, 2).to(like)

    class Difference:
        start, rows = 0, 2

        def beside(self, weight):
            return self

        def changes(self, what):
            return what == "weight"

        def dense(self):
            return Elsewhere()

    layer = nn.Linear(2, 2)
    before, merged = layer.weight.clone(), MergedLayer.of(layer)
    merged.written["one"] = Written([Difference()], 0.5)
    merged.write()
    assert torch.equal(layer.weight, before + 0.5)


def test_a_cast_leaves_scales_what_they_are(model, tmp_path):
    tensors = {f"{PREFIX}{QKV}.lokr_w1": torch.ones(4, 4), f"{PREFIX}{QKV}.lokr_w2": torch.ones(12, 4)}
    handle = attach(model, write(tmp_path / "lokr.safetensors", tensors), 0.3)
    model.bfloat16()
    (term,) = model.get_submodule(QKV).terms
    assert torch.equal(term.scale, torch.tensor(0.3)) and term.unit.dtype == torch.float32
    handle.scale = 0.7
    assert torch.equal(term.scale, torch.tensor(0.7))


@MERGE
def test_a_model_that_was_cast_is_of_one_dtype_again(model, files, merge):
    handle = attach(model, files[0], 0.5, merge=merge)
    model.bfloat16()
    handle.scale = 0.3
    if merge:
        whole = new_model().get_submodule(QKV).weight + 0.3 * product(QKV, load_file(files[0])) / 2
        assert torch.equal(model.get_submodule(QKV).weight, whole.bfloat16())  # rounded once
    handle.remove()
    assert same(model, state_of(new_model().bfloat16()))


@pytest.fixture
def control(tmp_path):
    tensors = factors(PARAMS, seed=3) | {f"{PREFIX}img_in.lora_down.weight": torch.randn(4, 128)}
    return write(tmp_path / "control.safetensors", tensors)


def test_an_input_that_was_made_wider_is_cast_with_the_model(model, control):
    handle = attach(model, control)
    model.bfloat16()
    handle.remove()
    assert same(model, state_of(new_model().bfloat16()))


@MERGE
@pytest.mark.parametrize("first", ["control", "other"])
@pytest.mark.parametrize("whole", [True, False], ids=["all", "without the input"])
def test_a_control_lora_and_another_in_either_order(model, control, tmp_path, merge, first, whole):
    """The right product, or with the other merged into the input an error before anything is attached."""
    tensors = {name: x for name, x in factors(PARAMS, seed=4).items() if whole or "img_in" not in name}
    other, before = write(tmp_path / "other.safetensors", tensors), state_of(model)

    def add(name):
        return attach(model, control) if name == "control" else attach(model, other, merge=merge)

    order = ["control", "other"] if first == "control" else ["other", "control"]
    handles = [add(order[0])]
    if merge and whole:
        between = state_of(model)
        with pytest.raises(UsageError, match="without merging it"):
            add(order[1])
        assert same(model, between)
    else:
        handles.append(add(order[1]))
        weight = F.pad(before["img_in.weight"], (0, 64)) + product("img_in", load_file(control))
        weight += F.pad(product("img_in", tensors), (0, 64)) if whole else 0
        x = torch.randn(1, 3, 128)
        assert torch.allclose(model.img_in(x), F.linear(x, weight, before["img_in.bias"]), atol=1e-5)
        x = torch.randn(1, 3, 16)
        weight = before[f"{QKV}.weight"] + sum(product(QKV, found) for found in (load_file(control), tensors))
        assert torch.allclose(model.get_submodule(QKV)(x), F.linear(x, weight, before[f"{QKV}.bias"]), atol=1e-5)
    for handle in handles:
        handle.remove()
    assert same(model, before)


def product(name, tensors):
    up, down = (tensors[f"{PREFIX}{name}.lora_{x}.weight"] for x in ("up", "down"))
    return up @ down


def test_autocast_decides_the_dtype(model, tmp_path):
    tensors = factors(PARAMS) | {f"{PREFIX}{QKV}.diff_b": torch.ones(48)}
    x, layer = torch.randn(1, 2, 16), model.get_submodule(QKV)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        attach(model, write(tmp_path / "a.safetensors", tensors))
        assert model.get_submodule(QKV)(x).dtype == torch.bfloat16


def test_under_autocast_nothing_is_added_in_place(monkeypatch):
    """A device's autocast casts operands of a Linear, not of an addmm_."""
    monkeypatch.setattr(branch, "add_product", lambda *_: pytest.fail("added in place"))
    y, x, up = (torch.empty(shape, device="meta") for shape in ((1, 2, 8), (1, 2, 4), (8, 4)))
    with pytest.raises(pytest.fail.Exception):
        branch.plus_product(y, x, up)
    monkeypatch.setattr(branch.F, "linear", lambda x, weight: x @ weight.to(x.dtype).t())
    assert branch.plus_product(y.bfloat16(), x.bfloat16(), up).dtype == torch.bfloat16
