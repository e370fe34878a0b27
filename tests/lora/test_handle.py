"""A handle and its model: nothing stays behind, whatever fails, is dropped, copied or cast in between."""

import copy
import gc
import io
import weakref

import pytest
import torch
from random_lora import factors, write
from tiny import tiny_variant
from torch import nn

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
