"""Prodigy and schedule-free AdamW, by their libraries: resumed to the bit, judged and saved where they say."""

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, examples, small_adapter

from flux_core.errors import UsageError
from flux_core.training import train
from flux_core.training.loop import State, checkpoints, validate
from flux_core.training.optimizers import COUNTED, LIBRARIES, OPTIMIZERS, Ema

RECIPES = {
    "prodigy": replace(RECIPE, optimizer="prodigy", lr=1.0),
    "adamw_schedulefree": replace(RECIPE, optimizer="adamw_schedulefree", schedule="constant", lora_plus=4.0),
}


def run(recipe, folder=None, on_step=None):
    adapter = small_adapter()
    return train(adapter, examples(), recipe, folder, every=4, on_step=on_step), adapter


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_was_stopped_and_looked_at_goes_on_to_the_bit(name, tmp_path):
    """Validation between steps leaves nothing behind: a mean of weights has no way back to the bit."""
    recipe = RECIPES[name]
    whole, _ = run(recipe, tmp_path / "whole")
    for stop in (1, 7):
        adapter = small_adapter()

        def look(done, adapter=adapter, stop=stop):
            validate(adapter, examples(2), recipe)
            return done.step == stop

        assert train(adapter, examples(), recipe, tmp_path / "parts", every=4, on_step=look) == whole[:stop]
    assert run(recipe, tmp_path / "parts")[0] == whole
    ends = [checkpoints(tmp_path / x)[-1].read_bytes() for x in ("whole", "parts")]
    assert ends[0] == ends[1]
    numbers = load_file(checkpoints(tmp_path / "whole")[-1])
    counts = {key.rpartition(".")[2] for key in numbers if key.startswith("group.0.")}
    assert counts == ({"k", "d", "d_max", "d_numerator"} if name == "prodigy" else {"k", "weight_sum", "lr_max"})
    assert numbers["group.0.k"] == RECIPE.steps and counts <= set(COUNTED)
    assert name != "prodigy" or numbers["group.0.d_numerator"] != 0


def test_prodigy_finds_a_rate():
    """On the way down a bowl, from a rate of 1e-6."""
    x = torch.nn.Parameter(torch.full((8,), 3.0))
    optimizer = OPTIMIZERS["prodigy"]([x], 1.0, 0.0)
    for _ in range(100):
        x.grad = x.detach().clone()
        optimizer.step()
    assert optimizer.param_groups[0]["d"] > 1e-2 and x.abs().max() < 1


def test_schedule_free_keeps_the_mean_of_its_steps():
    """x is the mean of all z at a constant rate; what is judged and saved is x, and what learns goes on as it was."""
    adapter = small_adapter()
    recipe = replace(RECIPES["adamw_schedulefree"], warmup=0, lora_plus=1.0, weight_decay=0.0)
    state, draw, seen = State(adapter, recipe), torch.Generator().manual_seed(0), []
    for _ in range(5):
        for x in state.parameters:
            x.grad = torch.randn(x.shape, generator=draw)
        state.update(recipe.lr, str, [])
        seen.append([state.optimizer.state[x]["z"].clone() for x in state.parameters])
    learned = [x.detach().clone() for x in state.parameters]
    with pytest.raises(KeyboardInterrupt), adapter.averaged():
        for x, z in zip(state.parameters, zip(*seen, strict=True), strict=True):
            torch.testing.assert_close(x.detach(), torch.stack(z).mean(0), rtol=1e-4, atol=1e-5)
        raise KeyboardInterrupt
    assert all(torch.equal(x, y) for x, y in zip(state.parameters, learned, strict=True))
    for x in state.parameters:
        x.grad = torch.ones_like(x)
    state.update(recipe.lr, str, [])  # it learns on


def test_schedule_free_keeps_no_other_mean():
    with pytest.raises(UsageError, match="keeps a mean of its own"):
        replace(RECIPES["adamw_schedulefree"], ema=0.9)
    assert isinstance(State(small_adapter(), replace(RECIPES["prodigy"], ema=0.9)).adapter.average, Ema)


@pytest.mark.parametrize("name, module", LIBRARIES.items())
def test_a_library_that_is_not_there(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"{name} needs {module}. Next: pip install {module}"):
        OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(2))], 1e-2, 0.0)


def test_prodigy_says_nothing(capsys):
    State(small_adapter(), RECIPES["prodigy"])
    assert capsys.readouterr() == ("", "")
