"""The loop: it learns, it goes on where it was stopped, to the bit, and it says what is wrong."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from small import LONG, RECIPE, examples, small_adapter

from flux_core.errors import FileError, NonFiniteError, UsageError
from flux_core.lora import attach
from flux_core.training import PRESETS, Recipe, train
from flux_core.training.adapter import matching
from flux_core.training.loop import checkpoints, drawn, factor, generator, levels, loss_of


def bytes_of(folder):
    """Of the newest checkpoint."""
    return hashlib.sha256(checkpoints(folder)[-1].read_bytes()).hexdigest()


def run(folder=None, recipe=RECIPE, some=None, **options):
    adapter = small_adapter()
    return train(adapter, some or examples(), recipe, folder, **options), adapter.state()


def test_equal_runs_are_equal_and_other_seeds_are_not(tmp_path):
    first, second, other = (
        run(tmp_path / name, recipe) for name, recipe in [("a", RECIPE), ("b", RECIPE), ("c", replace(RECIPE, seed=6))]
    )
    assert first[0] == second[0] != other[0] and len(first[0]) == RECIPE.steps
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert all(torch.equal(x, second[1][name]) for name, x in first[1].items())


@pytest.mark.parametrize("stops", [(1,), (5, 6), (3, 11)])
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, stops):
    whole = run(tmp_path / "whole")
    for stop in stops:
        losses, _ = run(tmp_path / "parts", on_step=lambda done, stop=stop: done.step == stop)
        assert losses == whole[0][:stop]
    assert run(tmp_path / "parts")[0] == whole[0]
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_finished_run_computes_nothing(tmp_path):
    losses, state = run(tmp_path)
    again = run(tmp_path, on_step=lambda done: pytest.fail("a step"))
    assert again[0] == losses and all(torch.equal(x, again[1][name]) for name, x in state.items())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_bit(tmp_path):
    """kill -9 at 20 random moments of one run: of a step, of writing, of loading."""
    whole, random, kills, done = run(tmp_path / "whole", LONG), Random(0), 0, False
    command = [sys.executable, str(Path(__file__).parent / "small.py"), str(tmp_path / "parts")]
    while not done:
        with subprocess.Popen(
            command, stdout=-1, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ) as process:
            for _ in range(random.randint(1, 6)):
                process.stdout.readline()
            time.sleep(random.random() / 50)
            if kills < 20:
                process.send_signal(signal.SIGKILL)
            process.communicate()
            done = process.returncode == 0
        kills += not done
    assert kills == 20 and checkpoints(tmp_path / "parts")[-1].name == "step-0000150.safetensors"
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert run(tmp_path / "parts", LONG)[0] == whole[0]


def test_it_learns():
    """One picture at one level by heart."""
    recipe = Recipe(steps=60, lr=3e-2, seed=1)
    losses, _ = run(None, recipe, examples(1))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("kind", ["blocks", "second"])
def test_blocks_that_are_computed_again_give_the_same_numbers(kind):
    assert run(None, replace(RECIPE, checkpointing=kind))[0] == run()[0]


def test_accumulation_is_the_mean_of_what_one_batch_sees():
    recipe = replace(RECIPE, batch=1, accumulation=4, steps=1)
    together = replace(recipe, batch=4, accumulation=1)
    names = [one.name for micro in range(4) for one in drawn(examples(), recipe, micro)]
    assert [one.name for one in drawn(examples(), together, 0)] == names


def test_each_picture_is_seen_once_before_any_is_seen_again():
    some, seen = examples(5), []
    for micro in range(10):
        seen += [one.name for one in drawn(some, replace(RECIPE, batch=1), micro)]
    assert len(set(seen[:5])) == len(set(seen[5:])) == 5 and seen[:5] != seen[5:]


def test_levels_and_noise_hang_on_their_number_alone():
    torch.manual_seed(3)
    first = levels(RECIPE, 7, 4), torch.randn(3, generator=generator(RECIPE, "noise", 7))
    torch.manual_seed(4)
    assert torch.equal(levels(RECIPE, 7, 4), first[0]) and not torch.equal(levels(RECIPE, 8, 4), first[0])
    assert torch.equal(torch.randn(3, generator=generator(RECIPE, "noise", 7)), first[1])
    assert (1000 * first[0] % 1 < 1e-3).all() or (1000 * first[0] % 1 > 0.999).any()


def test_the_rate():
    recipe = Recipe(steps=13, warmup=3, schedule="cosine")
    rates = [factor(recipe, step) for step in range(13)]
    assert (
        rates[:4] == [1 / 3, 2 / 3, 1, 1]
        and rates[8] == pytest.approx(0.5)
        and rates == [*rates[:3], *sorted(rates[3:])[::-1]]
    )
    assert {factor(Recipe(steps=4), step) for step in range(4)} == {1}


def test_what_differs_is_named(tmp_path):
    run(tmp_path, replace(RECIPE, steps=2))
    for change, said in [({"lr": 1e-3}, r"with lr 0\.01, not 0\.001"), ({"steps": 3}, "with steps 2, not 3")]:
        with pytest.raises(UsageError, match=said):
            run(tmp_path, replace(RECIPE, **{"steps": 2} | change))
    with pytest.raises(UsageError, match=r"with modules 7, .* not 3, "):
        train(small_adapter(("to_q",)), examples(), replace(RECIPE, steps=2), tmp_path)
    with pytest.raises(UsageError, match="with examples"):
        run(tmp_path, replace(RECIPE, steps=2), examples(4))


def test_what_is_wrong_is_said(tmp_path):
    for wrong, said in [({"weighting": "snr"}, "weighting must be one of none, sigma_sqrt, cosmap, not 'snr'"),
                        ({"steps": 0}, "steps must be at least 1")]:  # fmt: skip
        with pytest.raises(UsageError, match=said):
            replace(RECIPE, **wrong)
    with pytest.raises(UsageError, match="nothing to train on"):
        train(small_adapter(), [], RECIPE)
    first, *others = examples()
    with pytest.raises(UsageError, match="of 2 shapes"):
        train(small_adapter(), [first._replace(latents=torch.zeros(16, 2, 2)), *others], RECIPE)
    with pytest.raises(
        NonFiniteError, match=r"step 2: the loss of \d\.png, 2\.png is nan|step \d: the loss of .*2\.png"
    ):
        run(None, RECIPE, [*others, first._replace(name="2.png", latents=first.latents * torch.nan)])
    (tmp_path / "step-0000001.safetensors").write_bytes(b"half a file")
    with pytest.raises(FileError, match="the checkpoint could not be read"):
        run(tmp_path)


@torch.no_grad()
def test_what_is_saved_is_what_was_trained(tmp_path):
    """Loaded as any LoRA, beside the same weights."""
    adapter, (some, *_) = small_adapter(), examples()
    train(adapter, examples(), RECIPE)
    for name in ("a", "b"):
        path = adapter.save(tmp_path / name)
    assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    trained = loss_of(adapter, [some], RECIPE, 0)
    adapter.remove()
    plain = loss_of(adapter, [some], RECIPE, 0)
    with attach(adapter.model, tmp_path / "a"):
        loaded = loss_of(adapter, [some], RECIPE, 0)
    assert loaded.item() == pytest.approx(trained.item(), rel=1e-6) != plain.item()


def test_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path, every=5, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000010.safetensors", "step-0000012.safetensors"]


def test_presets_name_what_they_say():
    from small import PARAMS

    assert len(matching(PARAMS, PRESETS["attention"])) == 4 + 3 * PARAMS.depth_single_blocks
    blocks = matching(PARAMS, PRESETS["blocks"])
    assert len(blocks) == 14 * PARAMS.depth + 6 * PARAMS.depth_single_blocks and "proj_out" not in blocks
    with pytest.raises(UsageError, match=r"no Linear of the transformer is named 'to_x'\. Did you mean to_"):
        matching(PARAMS, ["to_x"])
