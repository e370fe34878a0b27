"""Processes that train together do what one does: the same losses up to the order of sums, and checkpoints for both."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import RECIPE, examples, small_adapter
from together import DEALT, SHARDED, SPLIT, STOP

from flux_core.errors import UsageError
from flux_core.session.stopping import Stop
from flux_core.training import train
from flux_core.training.loop import checkpoints
from flux_core.training.plan import plan_of
from flux_core.training.ranks import Ranks, own_device
from flux_core.training.run import Run
from flux_core.training.settings import Settings
from flux_core.variants import VARIANTS


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(2, 2, 2), (4, 1, 2), (1, 4, 2), (2, 6, 4), (6, 1, 3),
                                                              (9, 4, 6), (3, 2, 1)])  # fmt: skip
def test_each_picture_of_a_step_is_one_ranks(batch, accumulation, world):
    recipe, found = replace(RECIPE, batch=batch, accumulation=accumulation), []
    for rank in range(world):
        share = Ranks(rank, world).share(recipe)
        mine = [(i, row) for i in range(accumulation)[share.micros] for row in range(batch)[share.rows]]
        assert len(mine) == batch * accumulation // world
        assert 1 / share.parts == len(range(batch)[share.rows]) / batch
        found += mine
    assert sorted(found) == [(i, row) for i in range(accumulation) for row in range(batch)]


def test_what_cannot_be_shared_is_said():
    with pytest.raises(UsageError, match=r"6 pictures .* cannot be dealt out evenly to 4 .*Next: a multiple of 4"):
        Ranks(0, 4).share(replace(RECIPE, batch=3, accumulation=2))


def test_a_gradient_that_one_rank_lacks_is_the_others(monkeypatch):
    """And nobody's is none: as where a word learns, of which not all texts are."""
    own, lacking, nobodys = every = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    own.grad = torch.tensor([1.0, 2.0])
    theirs = iter([torch.tensor([1, 1, 0]), torch.tensor([1.0, 1.0, 5.0, 6.0])])
    monkeypatch.setattr("flux_core.training.ranks._reduce", lambda x: x.add_(next(theirs)))
    Ranks(0, 2).add_gradients(every)
    assert own.grad.tolist() == [2, 3] and lacking.grad.tolist() == [5, 6] and nobodys.grad is None


def test_each_process_has_a_device_of_its_own(monkeypatch):
    assert own_device("auto") == "auto" and own_device("cuda:1") == "cuda:1"
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--device cuda:0 is one for 4 processes"):
        own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"2 processes, but 1 GPUs. Next: torchrun --nproc-per-node 1"):
        own_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda") == "cuda:1"


def test_a_base_is_spread_over_processes_only():
    with pytest.raises(UsageError, match=r"--shard spreads .* this is one. Next: torchrun"):
        Run(Settings({"data": "pictures", "shard": True}))
    with pytest.raises(UsageError, match="--shard and --memory are two ways"):
        Run(Settings({"data": "pictures", "shard": True, "memory": "8GB"}))


def test_the_plan_of_a_part():
    def plan(**options):
        return plan_of(VARIANTS["flux-dev"], (512, 512), "bfloat16", None, ["to_q"], 4, 1, 1, "blocks", "adamw",
                       **options)  # fmt: skip

    whole, part = plan(), plan(shards=4)
    assert part.weights == whole.weights // 4 + 2 * whole.largest
    assert part._replace(weights=whole.weights) == whole


def test_a_second_signal_of_torchrun_does_not_end_a_step_half_way(capfd):
    stop = Stop("step", at_once=False)
    with stop.listening(), stop.finishing():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested and capfd.readouterr().err == "\nthis step is finished first\n"


def alone(recipe, folder=None, **options):
    adapter = small_adapter()
    return train(adapter, examples(), recipe, folder, **options), adapter


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Micro-batches dealt out and split, a run that one began, one that either was told to stop, a spread base."""
    alone(SPLIT, tmp_path / "begun alone", on_step=lambda done: done.step == 5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).parent / "together.py"), str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "only the first one speaks\n"
    found, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert found == second

    for name, recipe in {"dealt": DEALT, "split": SPLIT, "begun alone": SPLIT, "sharded": SHARDED}.items():
        losses, adapter = alone(recipe, tmp_path / f"{name}, alone")
        assert found[name] == pytest.approx(losses, rel=1e-5), name
        saved, expected = (load_file(checkpoints(tmp_path / x)[-1]) for x in (name, f"{name}, alone"))
        assert saved.keys() == expected.keys()
        for key, x in saved.items():
            torch.testing.assert_close(x, expected[key], rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")
    assert found["stopped"] == found["dealt"][:STOP] and len(checkpoints(tmp_path / "stopped")) == 1
    assert alone(DEALT, tmp_path / "stopped")[0] == pytest.approx(found["dealt"], rel=1e-5)

    assert found["part"] == [0.5]
    assert found["whole"] == adapter.model.double_blocks[0].img_mlp[0].weight.flatten().tolist()
    changes = dict(adapter.changes())
    assert dict(found["changes"]) == pytest.approx(changes, rel=1e-3)
    assert "3.png" in found["unstable"] and "is nan" in found["unstable"]
    assert "the same factors" in found["apart"] and not (tmp_path / "apart").exists()
