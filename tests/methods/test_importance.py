"""The importance study: what it draws, what it finds again, and the arithmetic of its table."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import write_scorer
from workshop import Workshop

from flux_core import GenerationRequest, load_pipeline
from flux_core.errors import FileError, UsageError
from flux_core.hooks.layers import layers_of
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.methods.importance import (
    PROMPTS,
    REFERENCE,
    Prompt,
    Study,
    Task,
    choose,
    default_prompts,
    read_prompts,
    rows_of,
)
from flux_core.methods.scoring import load_scorer
from flux_core.pipeline import Pipeline
from flux_core.variants import VARIANTS

ROOT = Path(__file__).parents[2]
TWO = [{"prompt": "a red apple", "seed": 3}, {"prompt": "two green pigs", "seed": 7}]
BLOCKS = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return write_scorer(tmp_path_factory.mktemp("scorer"))


@pytest.fixture
def flags(small, one_thread, scorer, tmp_path):
    """The command of a study of 2 prompts, 2 seeds and 5 blocks at 32x32, in `tmp_path/study`."""
    (tmp_path / "prompts.json").write_text(json.dumps(TWO))
    given = {"prompts": tmp_path / "prompts.json", "output-dir": tmp_path / "study", "scorer": scorer}
    given |= {"seeds": 2, "steps": 1, "width": 32, "height": 32, "batch": 2, "device": "cpu"}
    return ["importance", "--force", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def pictures_in(folder):
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "images").rglob("*.png"))}


def study_of(tmp_path, seeds=2):
    request = GenerationRequest(prompt="a pig", seed=0, num_steps=1, width=32, height=32, force=True)
    return Study(tmp_path / "study", [Prompt(**entry) for entry in TWO], seeds, request)


# Prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_model_has_64_prompts_of_its_own_or_of_anybody(name):
    prompts = read_prompts(default_prompts(name))
    assert len(prompts) == len({one.prompt for one in prompts}) == 64


def test_all_prompts_that_ship_belong_to_a_model():
    assert {path.name for path in PROMPTS.glob("*.json")} == {default_prompts(name).name for name in VARIANTS}


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("[]", "holds no prompts"),
        ('{"prompt": "a", "seed": 1}', "holds no prompts"),
        ("[", "is no JSON"),
        ('[{"prompt": "a", "sed": 1}]', "entry 1 has no key 'sed'. Did you mean seed?"),
        ('[{"prompt": "a", "seed": 1}, {"prompt": "b"}]', "entry 2 lacks 'seed'"),
        ('[{"prompt": "", "seed": 1}]', "entry 1: prompt"),
        ('[{"prompt": "a", "seed": -1}]', "entry 1: seed"),
        ('["a red apple"]', "entry 1: it"),
    ],
)
def test_wrong_prompts_are_told(tmp_path, capsys, text, finding):
    (tmp_path / "p.json").write_text(text)
    assert main(["importance", "--prompts", str(tmp_path / "p.json"), "--output-dir", str(tmp_path / "study")]) == 2
    assert finding in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_prompts_that_are_not_there_are_told(tmp_path):
    with pytest.raises(FileError, match="could not be read: No such file"):
        read_prompts(tmp_path / "none.json")


# Arithmetic ----------------------------------------------------------------------------------------


def test_the_table_is_the_closed_form(small, tmp_path):
    # two prompts of two seeds: 1 - similarity is 0.1, 0.3 and 0.5, 0.9 in the first block, 0.2 in all others
    firsts = (0.9, 0.7, 0.5, 0.1)
    rows = rows_of(study_of(tmp_path), [dict.fromkeys(BLOCKS, 0.8) | {BLOCKS[0]: one} for one in firsts])
    first = rows[0]
    assert [row.block for row in rows] == BLOCKS and [row.layer for row in rows] == list(range(5))
    assert first.importance == pytest.approx(0.45)
    assert first.spread == pytest.approx(np.std([0.1, 0.3, 0.5, 0.9], ddof=1))
    assert first.ci95 == pytest.approx(1.96 * np.std([0.2, 0.7], ddof=1) / math.sqrt(2))
    assert first.seed_spread == pytest.approx(math.sqrt((0.02 + 0.08) / 2))
    assert rows[1].importance == pytest.approx(0.2) and rows[1].spread == pytest.approx(0)


def test_with_one_seed_nothing_is_said_of_the_spread_between_seeds(small, tmp_path):
    assert rows_of(study_of(tmp_path, seeds=1), [dict.fromkeys(BLOCKS, 0.5)] * 2)[0].seed_spread is None


def test_vital_blocks_by_number_by_threshold_or_by_the_papers_share(small, tmp_path):
    by_hand = [0.1, 0.5, 0.3, 0.05, 0.2]
    rows = rows_of(study_of(tmp_path, 1), [{b: 1 - x for b, x in zip(BLOCKS, by_hand, strict=True)}] * 2)
    vital, cut = choose(rows, top=2)
    assert vital == [BLOCKS[1], BLOCKS[2]] and cut == pytest.approx(0.25)
    assert choose(rows, threshold=0.15)[0] == [BLOCKS[1], BLOCKS[2], BLOCKS[4]]
    assert choose(rows)[0] == [BLOCKS[1]]  # 9 of 57 is one of five
    assert choose(rows, top=99)[0] == BLOCKS
    equal = rows_of(study_of(tmp_path, 1), [dict.fromkeys(BLOCKS, 0.5)] * 2)
    assert choose(equal, top=2) == (BLOCKS[:2], 0.5)


def test_batches_have_every_picture_once_and_one_block_each(small, tmp_path):
    groups = study_of(tmp_path).groups(batch=3)
    tasks = [task for group in groups for task in group]
    assert len(tasks) == len(set(tasks)) == 4 * (1 + len(BLOCKS))
    assert all(len({task.block for task in group}) == 1 for group in groups)


def test_a_picture_is_claimed_by_one_process_at_a_time(small, tmp_path):
    mine, theirs = study_of(tmp_path), study_of(tmp_path)
    mine.folder.mkdir()
    first, second, *_ = mine.groups(batch=2)
    with mine.claimed(first) as claimed, theirs.claimed(second) as others, theirs.claimed([*second, *first]) as mixed:
        assert claimed == first and others == second and mixed == []  # a batch belongs to one process as a whole
    picture = mine.path(first[0])
    picture.parent.mkdir(parents=True)
    picture.touch()
    with theirs.claimed(first) as claimed:
        assert claimed == first[1:]
    mine.end()
    assert [path.name for path in mine.folder.iterdir()] == ["images"]


# The study -----------------------------------------------------------------------------------------


def test_a_study_writes_what_it_promises(flags, scorer, tmp_path, capsys):
    assert main(flags) == 0
    folder = tmp_path / "study"
    assert len(pictures_in(folder)) == 4 * 6
    assert capsys.readouterr().out.startswith("2 prompts, 2 seed(s) each, 5 blocks: 24 pictures")

    found = json.loads((folder / "importance.json").read_text())
    by_hand = {block: [] for block in BLOCKS}
    judge = load_scorer(str(scorer), torch.device("cpu"))
    for number, seed in ((0, 3), (0, 4), (1, 7), (1, 8)):
        images = folder / "images" / f"{number:03}_seed{seed}"
        reference = judge.features([Image.open(images / "reference.png")])[0]
        for block in BLOCKS:
            by_hand[block].append(1 - float(reference @ judge.features([Image.open(images / f"{block}.png")])[0]))
    for row in found["blocks"]:
        assert row["importance"] == pytest.approx(np.mean(by_hand[row["block"]]), abs=1e-5)
    assert found["other_seed"] > 0 and len(found["similarities"]) == 4

    table = (folder / "importance.csv").read_text().splitlines()
    assert table[0] == "block,layer,importance,spread,ci95,seed_spread" and len(table) == 6
    assert layers_of(str(folder / "vital.json"), "flux-mini", VARIANTS["flux-mini"].params) == found["vital"]
    with pytest.raises(UsageError, match="holds the layers of 'flux-mini', but flux-dev"):
        layers_of(str(folder / "vital.json"), "flux-dev", VARIANTS["flux-dev"].params)
    for picture in (folder / "importance.png", folder / "sheets" / "prompts_001-002.png"):
        assert len(Image.open(picture).convert("RGB").getcolors(1 << 24)) > 50


def test_without_matplotlib_all_but_the_chart_is_written(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(flags) == 0
    assert "no chart without matplotlib: pip install" in capsys.readouterr().err
    found = {path.name for path in (tmp_path / "study").iterdir()}
    assert {"importance.csv", "importance.json", "vital.json", "sheets"} <= found and "importance.png" not in found


def test_pictures_are_what_the_pipeline_draws_and_say_how(flags, tmp_path):
    assert main(flags) == 0
    pipeline = load_pipeline("flux-mini", "cpu")
    for block, skip in ((REFERENCE, []), (BLOCKS[2], [{"kind": "skip", "blocks": BLOCKS[2]}])):
        file = tmp_path / "study" / "images" / "001_seed8" / f"{block}.png"
        sizes = {"width": 32, "height": 32, "force": True}
        alone = pipeline.generate(TWO[1]["prompt"], seed=8, num_steps=1, plan=skip, **sizes)[0]
        kept = Image.open(file)
        assert np.abs(np.asarray(alone, dtype=int) - np.asarray(kept, dtype=int)).max() <= 1
        recorded = json.loads(kept.info["flux_core"])
        assert recorded.pop("batch") == {"rows": 2, "row": 1} and recorded == json.loads(alone.info["flux_core"])
        assert pipeline.draw(read_request(file)).tobytes() == kept.tobytes()  # with its batch


def test_an_ended_study_goes_on_and_draws_nothing_twice(flags, tmp_path, monkeypatch):
    draw, calls = Pipeline.draw_rows, []

    def interrupted(self, requests):
        calls.append(requests)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(self, requests)

    monkeypatch.setattr(Pipeline, "draw_rows", interrupted)
    assert main(flags) == 130
    before = pictures_in(tmp_path / "study")
    assert len(before) == 3 * 2
    next(iter(before)).unlink()  # one of a batch lost
    lost, *kept = before
    assert main(flags) == 0
    after = pictures_in(tmp_path / "study")
    assert len(after) == 24 and all(after[path] == before[path] for path in kept) and after[lost] > before[lost]
    assert sum(map(len, calls[4:])) == 24 - 4  # the lost one is a row of the same batch again


def test_more_prompts_and_seeds_may_be_added(flags, tmp_path):
    assert main([*flags, "--limit", "1", "--seeds", "1"]) == 0
    before = pictures_in(tmp_path / "study")
    assert main(flags) == 0
    after = pictures_in(tmp_path / "study")
    assert len(before) == 6 and len(after) == 24 and before.items() <= after.items()
    assert main([*flags, "--limit", "1"]) == 0  # and the first ones asked for again


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (["--steps", "2"], "holds a study with num_steps 1, this one has 2"),
        (["--guidance", "2"], "with guidance 3.5, this one has 2.0"),
        (["--width", "48"], "with width 32, this one has 48"),
    ],
)
def test_a_study_with_other_settings_is_refused(flags, tmp_path, capsys, change, finding):
    assert main(flags) == 0
    before = pictures_in(tmp_path / "study")
    assert main([*flags, *change]) == 2
    assert finding in capsys.readouterr().err
    assert pictures_in(tmp_path / "study") == before


def test_a_study_of_other_prompts_or_weights_is_refused(flags, tmp_path, capsys):
    assert main(flags) == 0
    (tmp_path / "prompts.json").write_text(json.dumps([TWO[0], {"prompt": "a cat", "seed": 7}]))
    assert main(flags) == 2
    assert "whose prompt 2 is 'two green pigs', this one's is 'a cat'" in capsys.readouterr().err
    (tmp_path / "prompts.json").write_text(json.dumps(TWO))
    settings = tmp_path / "study" / "study.json"
    settings.write_text(settings.read_text().replace('"weights": {', '"weights": {"other": "1", '))
    assert main(flags) == 2
    assert "holds a study with weights" in capsys.readouterr().err


def test_a_study_with_another_attention_is_refused(flags, tmp_path, capsys):
    assert main(flags) == 0
    settings = tmp_path / "study" / "study.json"
    assert json.loads(settings.read_text())["attention"] == "exact"
    settings.write_text(settings.read_text().replace('"attention": "exact"', '"attention": "int8"'))
    assert main(flags) == 2
    assert "holds a study with attention 'int8', this one has 'exact'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "finding"),
    [
        (["--top", "0"], 2, "--top must be a whole number from 1 to 1000, not '0'"),
        (["--top", "2", "--threshold", "0.1"], 2, "two ways to choose"),
        (["--pooling", "max"], 2, "--pooling must be one of cls, mean, not 'max'"),
        (["--limit", "none"], 2, "--limit must be a whole number"),
        (["--scorer", "nobody"], 4, "there is no scorer 'nobody'"),
        (["--top", "6"], 2, "--top 6: flux-mini has 5 blocks. Next: a smaller number"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_drawn(flags, tmp_path, capsys, change, code, finding):
    assert main([*flags, *change]) == code
    assert finding in capsys.readouterr().err
    assert not list((tmp_path / "study").glob("*"))
    assert not pictures_in(tmp_path / "study")


def test_rows_of_one_batch_differ_in_prompt_seed_and_guidance_alone(small, one_thread):
    pipeline = load_pipeline("flux-mini", "cpu")
    request = GenerationRequest(prompt="a pig", seed=0, num_steps=1, width=32, height=32, force=True)
    with pytest.raises(UsageError, match="in prompt, seed and guidance alone"):
        pipeline.draw_rows([request, request.model_copy(update={"num_steps": 2})])


# From outside --------------------------------------------------------------------------------------


def command(tmp_path, scorer, *more):
    """The real command on the model that ships: 13 pictures of one step."""
    words = ["importance", "--limit", "1", "--steps", "1", "--width", "128", "--height", "128", "--batch", "1"]
    return [*words, "--scorer", str(scorer), "--output-dir", str(tmp_path / "study"), *more]


@pytest.mark.slow
def test_a_killed_study_resumes_and_processes_share_the_rest(scorer, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(
        [sys.executable, "cli.py", *command(tmp_path, scorer)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(pictures_in(tmp_path / "study")) < 2 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = pictures_in(tmp_path / "study")
    assert 2 <= len(before) < 13
    for path in before:
        Image.open(path).load()  # whole, whenever the end came

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, "cli.py", *command(tmp_path, scorer)], cwd=ROOT, env=environment, check=True, timeout=300
    )
    after = pictures_in(tmp_path / "study")
    assert len(after) == 13 and before.items() <= after.items()
    assert not list((tmp_path / "study" / "images").rglob("*_1.png"))
    assert (tmp_path / "study" / "importance.png").is_file()


SMALL_MODEL = """
from pathlib import Path
from random_model import small_variant
import flux_core.commands.importance, flux_core.pipeline
from flux_core.hub import places
from flux_core.variants import VARIANTS
flux_core.pipeline.load_pipeline = flux_core.pipeline.load.load_pipeline
places.ROOTS = (Path({root!r}),); VARIANTS["flux-mini"] = small_variant()
flux_core.commands.importance.WAIT = 0.1
"""
HANGING = """
import time
from flux_core.methods.importance import Study
Study.draw = lambda *_: time.sleep(600)
"""


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.slow
def test_what_a_killed_process_had_claimed_is_drawn_by_the_first_one(flags, small_root, tmp_path):
    workshop, folders = Workshop(), [tmp_path / "second", tmp_path / "first"]
    try:
        ready = SMALL_MODEL.format(root=str(small_root))
        for folder in folders:
            folder.mkdir()
        second = workshop.start(folders[0], *flags, before=ready + HANGING, RANK="1", WORLD_SIZE="2")
        until(lambda: list((tmp_path / "study").glob(".claims/*.lock")))
        first = workshop.start(folders[1], *flags, before=ready, RANK="0", WORLD_SIZE="2")
        until(lambda: "waiting for 2 pictures" in (folders[1] / "log").read_text())
        assert len(pictures_in(tmp_path / "study")) == 22  # all but the batch that the second process hangs in
        os.kill(second, signal.SIGKILL)
        assert workshop.wait(second, folders[0]).code == -signal.SIGKILL
        code, log = workshop.wait(first, folders[1])
    finally:
        workshop.close()
    assert code == 0 and len(pictures_in(tmp_path / "study")) == 24, log
    assert (tmp_path / "study" / "vital.json").is_file() and not (tmp_path / "study" / ".claims").exists()


def test_a_scorer_on_the_hub_without_a_network_is_told(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "cli.py", *command(tmp_path, "facebook/dinov2-base")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4 and "the scorer of facebook/dinov2-base is not on this disk" in done.stderr
    assert "Traceback" not in done.stderr


def test_tasks_have_a_file_each(small, tmp_path):
    study = study_of(tmp_path)
    paths = {study.path(Task(number, seed, block)) for number, seed in study.pairs for block in BLOCKS}
    assert len(paths) == 20 and {path.name for path in paths} == {f"{block}.png" for block in BLOCKS}
