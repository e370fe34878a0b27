"""A stage may be cut anywhere, and what it hands on fits the files it travels in."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "recipe"))

import trainer
from trainer import Trainer, read_shards, restore, write_shards


def train(stage, steps):
    for _ in range(steps):
        x = torch.full((2, 3), float(stage.step + 1))
        stage.update((stage.module(x) ** 2).mean())


def new_stage():
    torch.manual_seed(0)
    return Trainer(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), lr=1e-2, steps=20, minutes=60, warmup=3)


def test_a_stage_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path):
    whole, first, second = new_stage(), new_stage(), new_stage()
    train(whole, 7)
    train(first, 4)
    first.save(tmp_path / "state.safetensors")
    second.resume(tmp_path / "state.safetensors")
    assert second.step == 4
    train(second, 3)
    for a, b in zip(whole.params + whole.ema, second.params + second.ema, strict=True):
        assert torch.equal(a, b)


def test_the_rate_rises_stays_and_falls():
    stage = new_stage()
    rates = []
    for stage.step in range(20):
        rates.append(stage.rate() / stage.lr)
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[12] == pytest.approx(1) and rates[16] == pytest.approx(0.5)
    assert rates[12:] == sorted(rates[12:], reverse=True)


def test_a_stage_ends_with_its_steps():
    stage = new_stage()
    for _ in stage.loop(pause=60):
        train(stage, 1)
    assert stage.step == 20


def test_shards_hold_everything_and_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SHARD_BYTES", 64)
    stage = new_stage()
    train(stage, 2)
    average = stage.average(torch.float32)
    write_shards(tmp_path, "net", average)
    assert len(list(tmp_path.glob("net-*.safetensors"))) > 1
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    restore(other, read_shards(tmp_path, "net"))
    for p, ema in zip(other.parameters(), stage.ema, strict=True):
        assert torch.equal(p, ema)


def test_a_parameter_may_learn_at_a_part_of_the_rate():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    before = [p.detach().clone() for p in module.parameters()]
    stage = Trainer(module, lr=1e-2, steps=20, minutes=60, warmup=1, rates={"0.weight": 0.125})
    train(stage, 1)
    moved = [(p - b).abs().max().item() for p, b in zip(module.parameters(), before, strict=True)]
    assert moved == pytest.approx([0.125e-2, 1e-2, 1e-2, 1e-2], rel=1e-3)  # AdamW's first step is the rate itself


def test_what_is_resumed_lies_in_memory_as_it_did(tmp_path):
    """A fused AdamW takes only moments that lie as their parameters do."""
    first, second = (
        Trainer(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), lr=1e-2, steps=9, minutes=60)
        for _ in range(2)
    )
    first.update(first.module(torch.ones(1, 3, 8, 8)).square().mean())
    first.save(tmp_path / "state.safetensors")
    second.resume(tmp_path / "state.safetensors")
    for p, before in zip(second.params, first.params, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            found = second.optimizer.state[p][key]
            assert found.stride() == p.stride() and torch.equal(found, first.optimizer.state[before][key])
