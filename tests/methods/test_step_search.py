"""The search for steps that run: its estimate in closed form, where it ends, and every way to stop it."""

import itertools
import json

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.errors import FileError, UsageError
from flux_core.hooks import StepCache
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.methods import step_search
from flux_core.methods.step_search import Estimate, Journal, Picture, Search, by_hand, cache_of, decibels, moved
from flux_core.pipeline import Pipeline
from flux_core.sampling import euler, get_schedule
from flux_core.session.sharing import try_lock

pytestmark = pytest.mark.usefixtures("one_thread")
SIGMAS = get_schedule(8, 256)


@pytest.fixture(autouse=True)
def short_walks(monkeypatch):
    monkeypatch.setattr(step_search, "MOVES", 60)


def curved(seed):
    """A velocity that bends with sigma and depends on x."""
    a, b, mix = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda x, sigma: a * sigma**2 + b * np.sin(5 * sigma) + torch.tanh(x @ mix) * 0.3


def pictures(count=3):
    return [Picture(curved(i), torch.full((1, 4, 4), 0.5 + i, dtype=torch.float64), SIGMAS) for i in range(count)]


def search(folder, forwards=4, count=3):
    return Search(pictures(count), forwards, Journal(folder / "journal", {"about": 1}))


def last(found):
    return list(found)[-1]


@pytest.mark.parametrize("forwards", [(0, 2, 5), (0, 1, 2, 4, 7), (0, 4)])
def test_the_estimate_is_exact_where_the_velocity_depends_on_sigma_alone(forwards):
    picture = Picture(
        lambda x, sigma: torch.tensor([[[sigma**2, np.cos(3 * sigma), 1.0]]]), torch.zeros(1, 1, 3), SIGMAS
    )
    estimate = Estimate(picture.products()[None], SIGMAS, [1.0] * 8)
    for slopes in (estimate.slopes(forwards), np.zeros(8 - len(forwards))):
        true = picture.error(cache_of(forwards, 8, slopes.tolist()))
        assert estimate.errors(forwards, slopes).tolist() == pytest.approx([true], rel=1e-4)


def test_slopes_of_a_steep_velocity_are_those_that_a_plan_may_have(tmp_path):
    steep = Picture(lambda x, sigma: torch.full_like(x, np.exp(-12 * sigma)), torch.zeros(1, 1, 1), SIGMAS)
    free = Estimate(steep.products()[None], SIGMAS, [1.0] * 8).slopes((0, 1, 2))
    assert max(abs(free)) == 10
    assert last(Search([steep], 3, Journal(tmp_path / "journal", {})).run(3))


def test_slopes_find_a_velocity_that_is_linear_in_sigma():
    picture = Picture(lambda x, sigma: torch.full_like(x, 2 - sigma), torch.zeros(1, 1, 1, dtype=torch.float64), SIGMAS)
    estimate = Estimate(picture.products()[None], SIGMAS, [1.0] * 8)
    assert estimate.slopes((0, 1, 4, 6)).tolist() == pytest.approx([1] * 4)
    assert estimate.errors((0, 1, 4, 6)).tolist() == pytest.approx([0], abs=1e-14)


def test_forwards_are_shared_and_pictures_those_of_their_own():
    shared, (ran, velocity) = pictures(1)[0], ([], curved(0))
    shared.velocity = lambda x, sigma: ran.append(sigma) or velocity(x, sigma)
    shared.final()
    for steps, forwards in (("3,5", 3), ("3,5-6", 1), ("3,5", 0), ("7", 0)):
        ran.clear()
        alone, cache = pictures(1)[0], StepCache(steps=steps)
        assert torch.equal(shared.drawn(cache), euler(cache.following(alone.velocity, SIGMAS), alone.noise, SIGMAS))
        assert len(ran) == forwards, steps


def test_enough_tries_end_where_no_move_is_better(tmp_path):
    found = search(tmp_path, count=1)
    (picture,), (cache, score) = pictures(1), last(found.run(tries=1000))
    forwards = tuple(step for step in range(8) if step not in cache.steps)
    assert cache == found.cache(forwards) and score == decibels(picture.error(cache))
    near = list(moved(forwards, 8))
    assert len(near) == 3 * 4 and all(decibels(picture.error(found.cache(one))) <= score for one in near)


def test_a_stopped_search_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    whole = list(search(tmp_path).run(12))
    journal = tmp_path / "journal"
    data, drawn = journal.read_bytes(), []
    assert list(search(tmp_path).run(12)) == whole and journal.read_bytes() == data
    for size in (0, 1, 40, len(data) // 3, 2 * len(data) // 3, len(data) - 1):
        journal.write_bytes(data[:size])
        again = search(tmp_path)
        assert list(again.run(12)) == whole and journal.read_bytes() == data, size
        drawn.append(sum(len(picture._known) for picture in again.pictures))
    assert drawn[-1] < drawn[0]
    assert last(search(tmp_path).run(20))[1] >= whole[-1][1]  # more tries go on from it, too


def test_a_journal_of_something_else_or_damaged_is_refused(tmp_path):
    Journal(tmp_path / "journal", {"a": 1})
    with pytest.raises(UsageError, match="journal of another search"):
        Journal(tmp_path / "journal", {"a": 2})
    for line in (b"\xff", b'{"about": {"a": 1}}\n{"score": 1}', b'{"about": {"a": 1}}\n[1]'):
        (tmp_path / "journal").write_bytes(line + b"\n")
        with pytest.raises(FileError, match="damaged"):
            Journal(tmp_path / "journal", {"a": 1})
    with pytest.raises(FileError, match="could not be read: Is a directory"):
        Journal(tmp_path, {"a": 1})


@pytest.mark.parametrize(("forwards", "names"), [
    (14, {"even": "1-27/2", "1 of 3 from step 7": "7-27/3,8-27/3"}),
    (10, {"1 of 3 from step 1": "1-27/3,2-27/3", "1 of 4 from step 4": "4-27/4,5-27/4,6-27/4"}),
])  # fmt: skip
def test_schedules_that_people_write(forwards, names):
    found = by_hand(forwards, 28)
    assert all(28 - len(cache.steps) == forwards for cache in found.values())
    for (name, steps), (how, slope) in itertools.product(names.items(), {"reuse": 0.0, "linear": 1.0}.items()):
        assert found[f"{name}, {how}"] == StepCache(steps=steps, slope=slope, num_steps=28)


FLAGS = ["--num-steps=6", "--width=32", "--height=32", "--force", "--limit=2", "--held-out=2", "--tries=5"]
SEARCH = ["cache", "search", "--forwards=3", *FLAGS]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_a_file_that_pictures_are_drawn_with(tiny, capsys):
    assert main([*SEARCH, "--output", "found.json"]) == 0
    printed = capsys.readouterr().out
    assert "searched\n" in printed and "even, linear" in printed and printed.endswith("found.json\n")
    found = json.loads((tiny / "found.json").read_text(encoding="utf-8"))
    assert found["searched"]["forwards"] == 3 and len(found["steps"]) == len(found["slope"]) == 3
    assert not set(found["searched"]["prompts"]) & set(found["searched"]["held_out_prompts"])
    flags = ["--prompt", "x", "--seed", "1", "--width=32", "--height=32", "--force", "--cache", "found.json"]
    assert main([*flags, "--num-steps", "6"]) == 0
    (picture,) = tiny.glob("output/*.png")
    assert read_request(picture).plan[0].steps == tuple(found["steps"])
    assert "was searched for" not in capsys.readouterr().err
    assert main([*flags, "--num-steps", "6", "--guidance", "2", "--height=64"]) == 0
    assert "was searched for 32x32 and guidance 3.5: for this picture it is a guess" in capsys.readouterr().err
    assert main([*flags, "--num-steps", "5"]) == 2
    assert "chosen for 6 steps, not for 5" in capsys.readouterr().err
    assert main([*flags, "--num-steps", "6", "--plan", "found.json"]) == 2
    assert "two step_caches leave out steps" in capsys.readouterr().err
    assert main(["--prompt", "x", "--num-steps", "1", "--cache", "fast", *flags[2:7]]) == 0
    assert "step_cache fast leaves out none of 1 step(s)" in capsys.readouterr().err


def test_a_killed_command_leaves_no_file_and_ends_with_the_same(tiny, monkeypatch, capsys):
    assert main([*SEARCH, "--output", "whole.json"]) == 0
    for fail_at in (1, 9, 20):
        calls, psnr, error = [], Picture.psnr, Picture.error

        def stopping(measure, calls=calls, fail_at=fail_at):
            def measured(*args):
                calls.append(None)
                if len(calls) == fail_at:
                    raise KeyboardInterrupt
                return measure(*args)

            return measured

        with monkeypatch.context() as patch:
            patch.setattr(Picture, "psnr", stopping(psnr))
            patch.setattr(Picture, "error", stopping(error))
            assert main([*SEARCH, "--output", "again.json"]) == 130
        assert not (tiny / "again.json").exists()
        assert "Next: the same command goes on from them" in capsys.readouterr().err
    assert main([*SEARCH, "--output", "again.json"]) == 0
    assert (tiny / "again.json").read_bytes() == (tiny / "whole.json").read_bytes()
    assert sorted(path.name for path in tiny.iterdir()) == ["again.json", "whole.json"]


def test_a_journal_goes_on_for_the_same_pictures_alone(tiny, monkeypatch, capsys):
    """Attention and T5's precision change pictures, and no two processes search at once."""
    command = [*SEARCH, "--output", "found.journal"]

    def interrupted(*args):
        raise KeyboardInterrupt

    def in_nf4(*args, **fields):
        pipeline = tiny_pipeline(*args, **fields)
        pipeline.t5_precision = "nf4"
        return pipeline

    with monkeypatch.context() as patch:
        patch.setattr(Picture, "psnr", interrupted)
        assert main(command) == 130
    assert [path.name for path in tiny.iterdir()] == ["found.journal.journal"]
    for place, name, value in ((Pipeline, "attention", "int8"), (flux_core.pipeline, "load_pipeline", in_nf4)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert main(command) == 2
        assert "found.journal.journal is the journal of another search" in capsys.readouterr().err
    with try_lock(tiny / ".found.journal.lock"):
        assert main(command) == 2
    assert "another process searches for found.journal. Next: wait" in capsys.readouterr().err
    assert main(command) == 0
    assert "found.journal" in {path.name for path in tiny.iterdir()}
    assert not list(tiny.glob("*.journal.journal"))


@pytest.mark.parametrize(("flags", "code", "finding"), [
    (["--forwards=3", "--name=flux-dev-fill"], 2, "flux-dev-fill takes a picture, and a search draws from"),
    ([], 2, "--forwards is missing: how many of the steps may run"),
    (["--forwards=6", "--num-steps=6"], 2, "--forwards 6 leaves out none of 6 steps"),
    (["--forwards=1"], 2, "--forwards must be a whole number from 2"),
    (["--forwards=3", "--limit=60"], 2, "has 64 prompts, 76 are needed. Next: lower --limit or --held-out"),
    (["--forwards=3", "--prompts=none.json"], 4, "none.json"),
    (["--forwards=3", "--output=there.json"], 2, "there.json exists already"),
    (["--forwards=3", "--output=."], 2, "--output . is a folder. Next: a file in it"),
])  # fmt: skip
def test_wrong_flags_are_told_before_a_model_is_loaded(flags, code, finding, tiny, monkeypatch, capsys):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", None)
    (tiny / "there.json").touch()
    assert main(["cache", "search", *flags]) == code
    assert finding in capsys.readouterr().err
