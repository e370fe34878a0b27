"""Explorations: what they draw, the record that repeats it, and every way in which they can end before their end
(users.md 4c, rows 24 to 26, 28, 29, 53).
"""

import errno
import gc
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from workshop import Workshop

import flux_core.pipeline
from flux_core.images.metadata import png_bytes, read_request
from flux_core.main import main
from flux_core.pipeline import Pipeline
from flux_core.pipeline.denoiser import Denoiser
from flux_core.session.exploration import Exploration, Point, plan_exploration, seeds_of
from flux_core.session.folder import new_folder
from flux_core.session.latents import read_latents
from flux_core.session.record import mend, read_rows
from flux_core.session.sharing import only_session

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
SMALL = ["--width=32", "--height=32", "--force"]
EXPLORE = ["explore", "--prompt", "a red apple", *SMALL, "--seeds", "1,2", "--steps", "1,2"]
LOAD = flux_core.pipeline.load_pipeline
PICTURES = ["exploration_images/seed_1.png", "exploration_images/seed_2.png", "inference_steps_images/steps_2.png"]
"""as they are drawn; the first one lies in the other folder, too"""
SHARED = "inference_steps_images/steps_1.png"
GRIDS = ["exploration_grid.png", "inference_steps_grid.png"]


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def workshop():
    shop = Workshop()
    yield shop
    shop.close()


@pytest.fixture(scope="module")
def whole_folder(workshop, tmp_path_factory):
    """A session of `EXPLORE` that nothing disturbs. Tests leave it as it is."""
    return undisturbed(workshop, tmp_path_factory.mktemp("whole"), EXPLORE)


def undisturbed(workshop, folder, flags):
    """A session's folder."""
    done = workshop.run(folder, *flags)
    assert done.code == 0, done.log
    return only(folder / "output")


@pytest.fixture(scope="module")
def whole(whole_folder):
    return contents(whole_folder)


@pytest.fixture
def session(whole_folder, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(whole_folder, tmp_path / "session"))


def only(folder):
    (one,) = folder.iterdir()
    return one


def explored(*flags):
    """Run a session here; its folder."""
    before = set(Path("output").glob("*"))
    assert main([*EXPLORE, *flags]) == 0
    (new,) = set(Path("output").glob("*")) - before
    return new


def contents(folder):
    """Every file of a session, its table without the times."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    rows = [{**row, "Time": ""} for row in read_rows(folder / "metadata.csv")]
    return {name: data for name, data in files.items() if not name.endswith(".lock")} | {"metadata.csv": rows}


def planned(prompts=("a",), seeds="1,2,3", steps="1,2", guidance="1.5,3.5", **options):
    fields = {"width": 32, "height": 32, "force": True}
    lists = [None if text is None else [text] for text in (seeds, steps, guidance)]
    return plan_exploration(prompts, fields, *lists, **options)


def count_draws(monkeypatch, fail_at=None, error=KeyboardInterrupt):
    """The requests that are drawn from now on; the one of that number fails."""
    draw, drawn = Pipeline.draw, []

    def counted(self, request, *rest):
        drawn.append(request)
        if len(drawn) == fail_at:
            raise error
        return draw(self, request, *rest)

    monkeypatch.setattr(Pipeline, "draw", counted)
    return drawn


# What is drawn -------------------------------------------------------------------------------------


def test_one_axis_moves_at_a_time_and_what_they_share_is_drawn_once():
    places = planned().places
    assert list(places) == [
        Point(0, 1, 1, 1.5), Point(0, 2, 1, 1.5), Point(0, 3, 1, 1.5), Point(0, 1, 2, 1.5), Point(0, 1, 1, 3.5)
    ]  # fmt: skip
    first, *others = places.values()
    assert first == ["exploration_images/seed_1", "inference_steps_images/steps_1", "guidance_images/guidance_1.5"]
    assert [stem for stems in others for stem in stems] == [
        "exploration_images/seed_2", "exploration_images/seed_3", "inference_steps_images/steps_2",
        "guidance_images/guidance_3.5",
    ]  # fmt: skip


def test_crossed_axes_draw_every_combination_once():
    places = planned(cross=True).places
    assert len(places) == 12 and places[Point(0, 3, 2, 3.5)] == ["exploration_images/seed_3_steps_2_guidance_3.5"]
    assert len({stem for stems in places.values() for stem in stems}) == 12
    assert [sheet.name for sheet in planned(cross=True).sheets()] == [f"exploration_grid_seed_{i}" for i in (1, 2, 3)]


def test_an_axis_of_one_value_has_no_folder_unless_it_is_all_there_is():
    assert [view.folder for view in planned(seeds="1", steps=None).views] == ["guidance_images"]
    assert [view.folder for view in planned(seeds="1", steps=None, guidance=None).views] == ["exploration_images"]


def test_prompts_are_rows_of_every_grid():
    session = planned([f"prompt {i}" for i in range(12)], guidance=None)
    assert [(len(sheet.rows), len(sheet.rows[0])) for sheet in session.sheets()] == [(12, 3), (12, 2)]
    assert session.places[Point(2, 3, 1, 3.5)] == ["exploration_images/prompt_03_seed_3"]
    assert [point.prompt for point in session.places] == sorted([*range(12)] * 4)  # each is encoded once


@pytest.mark.parametrize("guidance", ["3.5,0.1,10,4.0,0.1234567,0.12345671,1e-9", "1"])
def test_no_two_pictures_share_a_name(guidance):
    for cross in (False, True):
        stems = [stem for stems in planned(guidance=guidance, cross=cross).places.values() for stem in stems]
        assert len(stems) == len(set(stems))


def test_the_manifest_is_the_whole_plan():
    session = planned(["a", "b\n\x00ü"], cross=True, save_latents="every")
    again = Exploration.model_validate_json(session.text())
    assert again == session and again.places == session.places
    assert [again.request_of(p) for p in again.places] == [session.request_of(p) for p in session.places]


def test_random_seeds_are_as_many_as_asked_and_told(capsys):
    assert len(set(seeds_of(["auto:200"]))) == 200 and len(seeds_of(None)) == len(seeds_of(["-1"])) == 1
    folder = explored("--seeds", "auto:3")
    seeds = json.loads((folder / "session.json").read_text())["seeds"]
    assert f"seed {' '.join(map(str, seeds))}, steps 1 2" in capsys.readouterr().out
    assert {int(row["Seed"]) for row in read_rows(folder / "metadata.csv")} == set(seeds)


def test_what_stands_there_twice_is_drawn_once_and_told(capsys):
    assert len(planned(["a", "b", "a"], seeds="1, 1,2", guidance="3.50,3.5").places) == 2 * 3
    err = capsys.readouterr().err
    assert all(f"{what} are drawn once" in err for what in ("--seeds: repeated values", "--guidance: repeated values"))
    assert "repeated prompts are drawn once" in err


WRONG = [
    ([], "say what to explore"),
    (["--prompt", "a", "--prompts", "b"], "say what to explore"),
    (["--prompts", "none.json"], "none.json, entry 2 has no prompt. Next: write a text"),
    (["--prompts", "list.jsonl"], "list.jsonl, line 1 has no prompt. Next: write a text"),
    (["--prompt", "a", "--seeds", "1,,2"], "--seeds must be a whole number from 0 to 4294967295, not ''"),
    (["--prompt", "a", "--seeds", "-2"], "--seeds must be"),
    (["--prompt", "a", "--seeds", "auto:0"], "--seeds auto:N must be a whole number from 1 to 1000"),
    (["--prompt", "a", "--steps", "4.5"], "--steps must be"),
    (["--prompt", "a", "--guidance", "1,nan"], "--guidance must be a number from 0 to 100, not 'nan'"),
    (["--prompt", "a", "--save-latents", "all"], "--save-latents must be one of last, every"),
    (["--prompt", "a", "--width", "8"], "--width 8 is not among"),
    (["--prompt", " "], "--prompt has no words"),
    (["--prompt", "a", "--seeds", "auto:1000", "--steps", "1,2,3,4,5,6,7,8,9,10,11", "--cross"], "11,000 pictures"),
    (["--prompt", "a", "--name", "flux-schnell", "--guidance", "1,2"], "flux-schnell takes no guidance"),
    (["--resume", "x", "--prompt", "a"], "--resume draws what the session's folder says: leave out --prompt"),
]


def test_everything_wrong_is_told_before_torch_is_imported_and_nothing_is_made(tmp_path):
    code = (
        "import io, json, sys; from flux_core.main import main\n"
        "for words in json.load(sys.stdin):\n"
        "    sys.stderr = io.StringIO(); code = main(['explore', *words]); err = sys.stderr.getvalue()\n"
        "    print(json.dumps([code, err, 'torch' in sys.modules]))"
    )
    given = json.dumps([words for words, _ in WRONG])
    (tmp_path / "none.json").write_text('["a", {}]')
    (tmp_path / "list.jsonl").write_text('{"prompt": ["a"]}')
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(WRONG), done.stderr
    for (code, err, with_torch), (words, finding) in zip(answers, WRONG, strict=True):
        assert (code, with_torch) == (2, False) and finding in err and err.count("\n") == 1, (words, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.jsonl", "none.json"]


# A session -----------------------------------------------------------------------------------------


def test_a_session_holds_what_it_promises(whole_folder):
    rows = read_rows(whole_folder / "metadata.csv")
    head = "Time,Seed,Width,Height,Steps,Guidance,LoraScale,Prompt,"
    assert (whole_folder / "metadata.csv").read_text().startswith(head)
    assert [row["File"] for row in rows] == PICTURES
    assert [tuple(row.values())[1:8] for row in rows][2] == ("1", "32", "32", "2", "3.5", "", "a red apple")
    for row in rows:
        data = (whole_folder / row["File"]).read_bytes()
        assert row["SHA256"] == hashlib.sha256(data).hexdigest()
        assert read_request(whole_folder / row["File"]).model_dump_json(exclude_none=True) == row["Request"]
    assert (whole_folder / PICTURES[0]).samefile(whole_folder / SHARED)
    folders = {"exploration_images", "inference_steps_images"}
    assert {path.name for path in whole_folder.iterdir() if not path.name.startswith(".")} == {
        *GRIDS, "metadata.csv", "session.json", *folders
    }  # fmt: skip
    assert not list(whole_folder.rglob("*.tmp")) and not (whole_folder / ".claims").exists()


def test_its_pictures_are_those_that_the_pipeline_draws(whole_folder):
    pipeline = tiny_pipeline()
    for name in PICTURES:
        request = read_request(whole_folder / name)
        steps = {"num_steps": request.num_steps, "width": 32, "height": 32, "force": True}
        again = pipeline.generate(request.prompt, seed=request.seed, **steps)[0]
        assert png_bytes(again) == (whole_folder / name).read_bytes()


def test_grids_show_every_picture_under_its_axis(whole_folder):
    for grid, names in ((GRIDS[0], PICTURES[:2]), (GRIDS[1], [SHARED, PICTURES[2]])):
        sheet = Image.open(whole_folder / grid)
        assert b"trainedAlgorithmicMedia" in sheet.info["xmp"]
        pixels = np.asarray(sheet.convert("RGB"))
        windows = np.lib.stride_tricks.sliding_window_view(pixels, (32, 32, 3))[:, :, 0]
        for name in names:
            found = (windows == np.asarray(Image.open(whole_folder / name))).all((2, 3, 4))
            assert found.sum() == 1
            top, left = np.argwhere(found)[0]
            assert pixels[top - 30 : top, left : left + 32].min() < 100  # ink above it


def test_latents_decode_to_their_picture():
    folder = explored("--save-latents", "every")
    for name in (*PICTURES, SHARED):
        path = folder / name.replace(".png", ".safetensors")
        steps = {"step_1"} if name == PICTURES[2] else set()
        assert load_file(path).keys() == {"latents"} | steps
        assert load_file(path)["latents"].shape == (1, 16, 4, 4)
        assert png_bytes(tiny_pipeline().picture(*read_latents(path))) == (folder / name).read_bytes()


def test_without_metadata_pictures_say_only_that_a_machine_made_them():
    folder = explored("--no-metadata", "--save-latents")
    assert not (folder / "metadata.csv").exists()
    for name in (*PICTURES, *GRIDS):
        assert set(Image.open(folder / name).info) <= {"xmp", "XML:com.adobe.xmp"}
    assert b"apple" not in b"".join(path.read_bytes() for path in (folder / "exploration_images").iterdir())
    (folder / PICTURES[1]).unlink()
    assert main(["explore", "--resume", str(folder)]) == 0 and (folder / PICTURES[1]).is_file()


def test_stepwise_pictures_lie_in_a_folder_for_each_picture(monkeypatch):
    count_draws(monkeypatch, fail_at=3)
    assert main([*EXPLORE, "--stepwise-dir", "steps"]) == 130
    folder = only(Path("output"))
    assert main(["explore", "--resume", str(folder), "--stepwise-dir", "steps"]) == 0
    steps = Path("steps") / folder.name / "inference_steps_images/steps_2"
    names = ["seed_1_composite.png", "seed_1_step1of2.png", "seed_1_step2of2.png"]
    assert sorted(path.name for path in steps.iterdir()) == names
    assert Image.open(steps / names[2]).tobytes() == Image.open(folder / PICTURES[2]).tobytes()


def test_memory_is_given_back(monkeypatch, session):
    kept = []

    def loaded(*args, **fields):
        pipeline = tiny_pipeline(*args, **fields)
        kept.append(weakref.ref(pipeline.model))
        return pipeline

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", loaded)
    (session / PICTURES[1]).unlink()
    gc.disable()
    try:
        assert main(["explore", "--resume", str(session)]) == 0
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_job_file_explores():
    job = {"command": "explore", "prompt": "a", "seeds": [1, 2], "steps": 1, "save_latents": True, "force": True}
    Path("job.json").write_text(json.dumps({**job, "width": 32, "height": 32}))
    assert main(["run", "job.json"]) == 0
    names = {path.name for path in (only(Path("output")) / "exploration_images").iterdir()}
    assert names == {f"seed_{i}.{suffix}" for i in (1, 2) for suffix in ("png", "safetensors")}


# Repeating -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["metadata.csv", "--row", "3"], [PICTURES[2]]], ids=["row", "picture"])
def test_a_row_and_a_picture_repeat_to_the_byte(whole_folder, words, capsys):
    assert main(["repeat", str(whole_folder / words[0]), *words[1:], "--force", "--output-dir", "again"]) == 0
    path, last = capsys.readouterr().out.splitlines()[-2:]
    assert Path(path).read_bytes() == (whole_folder / PICTURES[2]).read_bytes() and last.endswith("byte for byte")


def test_a_record_without_a_precision_is_told_the_one_it_is_drawn_in(whole_folder, capsys):
    picture = Image.open(whole_folder / PICTURES[2])
    asked = {key: value for key, value in json.loads(picture.info["flux_core"]).items() if key != "dtype"}
    text = PngImagePlugin.PngInfo()
    text.add_itxt("flux_core", json.dumps(asked))
    picture.save("hand.png", pnginfo=text)
    assert main(["repeat", "hand.png", "--force"]) == 0
    assert "float32 on cpu" in capsys.readouterr().out


def test_it_is_told_when_the_pixels_are_others(session, monkeypatch, capsys):
    def retrained(*args, **fields):
        pipeline = tiny_pipeline(*args, **fields)
        pipeline.model.final_layer.linear.weight.data *= 2
        pipeline.weights = {"flux-mini.safetensors": "def"}
        return pipeline

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", retrained)
    for words in ([PICTURES[0]], ["metadata.csv", "--row", "1"]):
        assert main(["repeat", str(session / words[0]), *words[1:], "--force"]) == 0
        err = capsys.readouterr().err
        assert (
            "pixels may differ: it was drawn with other weights" in err
            and f"other pixels than {session / PICTURES[0]}" in err
        )


def test_repeating_from_latents_denoises_nothing(small, monkeypatch, capsys):
    """With a model on the disk, of which only the autoencoder is loaded."""
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", LOAD)
    folder = explored("--save-latents", "every")
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", None)
    monkeypatch.setattr(Denoiser, "velocity", None)
    for words in (["metadata.csv", "--row", "3"], [PICTURES[2]], [PICTURES[2].replace("png", "safetensors")]):
        latents = [] if words[0].endswith("safetensors") else ["--from-latents"]
        assert main(["repeat", str(folder / words[0]), *words[1:], *latents, "--force"]) == 0
        path, last = capsys.readouterr().out.splitlines()[-2:]
        assert Path(path).read_bytes() == (folder / PICTURES[2]).read_bytes() and last.endswith("byte for byte")


def test_damaged_latents_are_told(session, capsys):
    text = Image.open(session / PICTURES[0]).info["flux_core"]
    for tensors, recorded, code, finding in (
        ({"latents": torch.zeros(1, 16, 4, 6)}, text, 4, "it is damaged"),
        ({"latents": torch.zeros(1, 16, 4, 4)}, "{}", 2, "cannot be used"),
        ({"other": torch.zeros(1)}, text, 4, "holds no latents of a session"),
        ({"latents": torch.full((1, 16, 4, 4), math.nan)}, text, 7, "in the decoded picture"),
    ):
        save_file(tensors, "x.safetensors", {"flux_core": recorded})
        assert main(["repeat", "x.safetensors", "--force"]) == code
        assert finding in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "finding"),
    [
        (["metadata.csv"], 2, "metadata.csv has 3 row(s): say which with --row"),
        (["metadata.csv", "--row", "4"], 2, "has 3 row(s)"),
        (["metadata.csv", "--row", "0"], 2, "--row must be a whole number from 1"),
        (["metadata.csv", "--row", "1"], 2, "--width 32 is not among"),
        (["metadata.csv", "--row", "1", "--from-latents", "--force"], 4, "seed_1.safetensors does not exist"),
        (["exploration_grid.png"], 2, "was not made by flux_core"),
        (["exploration_grid.png", "--row", "1"], 2, "--row goes with a metadata.csv"),
        (["none.csv", "--row", "1"], 4, "none.csv could not be read"),
        (["none.png"], 4, "does not exist"),
        (["none.safetensors"], 4, "none.safetensors"),
    ],
)
def test_what_cannot_be_repeated_is_told(words, code, finding, whole_folder, capsys, monkeypatch):
    monkeypatch.chdir(whole_folder)
    assert main(["repeat", *words]) == code
    assert finding in capsys.readouterr().err


# Ends before the end -------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_resuming_draws_what_is_missing_and_nothing_twice(end, whole, monkeypatch):
    drawn = count_draws(monkeypatch, fail_at=end)
    assert main(EXPLORE) == 130
    folder = only(Path("output"))
    assert len(read_rows(folder / "metadata.csv")) == end - 1
    assert main(["explore", "--resume", str(folder)]) == 0
    assert len(drawn) == 3 + 1 and contents(folder) == whole


def test_a_whole_session_loads_no_model_again(session, whole, monkeypatch):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", None)
    (session / GRIDS[0]).unlink()
    (session / "metadata.csv").unlink()
    (session / SHARED).unlink()  # a second place of a picture that is there
    assert main(["explore", "--resume", str(session)]) == 0
    assert contents(session) == whole


def test_other_weights_do_not_go_on_with_a_session(session, monkeypatch, capsys):
    def retrained(*args, **fields):
        pipeline = tiny_pipeline(*args, **fields)
        pipeline.weights = {"flux-mini.safetensors": "def"}
        return pipeline

    (session / PICTURES[1]).unlink()
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", retrained)
    assert main(["explore", "--resume", str(session)]) == 2
    err = capsys.readouterr().err
    assert "was begun with float32" in err and "2 of 3 pictures are drawn. Next: explore --resume" in err


def test_another_attention_does_not_go_on_with_a_session(session, monkeypatch, capsys):
    (session / PICTURES[1]).unlink()
    monkeypatch.setattr(flux_core.pipeline.Pipeline, "attention", "int8")
    assert main(["explore", "--resume", str(session)]) == 2
    assert "exact attention and" in capsys.readouterr().err


def test_a_disk_that_is_full_again_and_again_costs_nothing_but_time(whole, monkeypatch, capsys):
    """Row 24: a session is resumed until it is whole; the first write fails, then the second one of the next, …"""
    real, calls, failing, codes, folders = os.fsync, [], 0, [], []

    def fsync(file):
        calls.append(file)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "full")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    while not codes or codes[-1]:
        failing += 1
        calls.clear()
        codes.append(main(["explore", "--resume", str(folders[0])] if folders else EXPLORE))
        folders = [path.parent for path in Path("output").glob("*/session.json")]
        assert not list(Path("output").rglob("*.tmp"))
        for path in Path("output").rglob("*.png"):
            Image.open(path).load()
        assert all(path.read_bytes().endswith(b"\n") for path in Path("output").rglob("*.csv"))
    assert set(codes[:-1]) == {6} and len(codes) > 5
    assert "the disk is full: free some space" in capsys.readouterr().err
    assert contents(folders[0]) == whole


@pytest.mark.parametrize(
    ("size", "limit", "what"),
    [
        (64, 3000, "exploration_images/seed_0.safetensors"),
        (16, 2500, "metadata.csv"),
        pytest.param(16, 1000, "exploration_images/seed_0.png", marks=pytest.mark.slow),
        pytest.param(16, 8500, "exploration_grid.png", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_own_refusal_is_a_disk_error(workshop, tmp_path, size, limit, what):
    """RLIMIT_FSIZE stands for a full disk: no file may grow past the limit."""
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    flags = [*EXPLORE, "--save-latents", f"--width={size}", f"--height={size}", "--seeds", "0,1,2,3,4,5,6,7,8"]
    done = workshop.run(tmp_path, *flags, before=before)
    folder = only(tmp_path / "output")
    assert done.code == 6 and f"/{what}: files may not grow so large here" in done.log, done.log
    assert not list(folder.rglob("*.tmp")) and (folder / "metadata.csv").read_bytes().endswith(b"\n")
    assert main(["explore", "--resume", str(folder)]) == 0
    assert len(read_rows(folder / "metadata.csv")) == 10


SLOWLY = """
import time, flux_core.pipeline.denoiser as p
euler = p.euler
def slowly(velocity, x, sigmas, on_step=None):
    def step(one):
        time.sleep(0.1); return on_step(one)
    return euler(velocity, x, sigmas, step)
p.euler = slowly
"""
"""a tenth of a second for every step"""


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("signals", "kept"),
    [([signal.SIGINT], 2), ([signal.SIGTERM], 2), ([signal.SIGINT, signal.SIGINT], 1)],
    ids=["SIGINT", "SIGTERM", "SIGINT twice"],
)
def test_a_signal_ends_it_after_the_picture_and_a_second_one_at_once(workshop, tmp_path, signals, kept):
    """Row 26."""
    pid = workshop.start(tmp_path, *EXPLORE, before=SLOWLY)
    until(lambda: list(tmp_path.glob("output/*/.claims/1.lock")))  # it is at the second picture
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.05)
    code, log = workshop.wait(pid, tmp_path)
    folder = only(tmp_path / "output")
    assert code == 130 and "interrupted" in log and "Traceback" not in log, log
    assert f"{kept} of 3 pictures are drawn. Next: explore --resume {folder.relative_to(tmp_path)}" in log
    assert len(read_rows(folder / "metadata.csv")) == kept and not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on(workshop, tmp_path, whole, kills):
    """Row 25: the full set, no row twice, the same bytes, wherever kill -9 came."""
    (tmp_path / "first").mkdir()
    start = time.monotonic()
    assert workshop.run(tmp_path / "first", *EXPLORE).code == 0
    seconds, chance = time.monotonic() - start, random.Random(kills)
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        pid = workshop.start(folder, *EXPLORE)
        time.sleep(seconds * (number + chance.random()) / kills)
        os.kill(pid, signal.SIGKILL)  # a child that has ended stays until it is waited for
        workshop.wait(pid, folder)
        assert_resumable(workshop, folder, whole)


def assert_resumable(workshop, folder, whole):
    """What a dead session left there becomes a whole one, if it had begun at all."""
    for manifest in folder.glob("output/*/session.json"):
        done = workshop.run(folder, "explore", "--resume", manifest.parent)
        assert done.code == 0, done.log
        assert contents(manifest.parent) == whole and not list(manifest.parent.rglob("*.tmp"))


KILLED = """
import itertools, os, signal
steps = itertools.count()
def dying(real):
    def call(*args, **kwargs):
        if next(steps) == {}: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("fsync", "replace", "link"): setattr(os, name, dying(getattr(os, name)))
"""
"""dead before the so-manyeth time that something goes to the disk or gets its name"""


def test_killed_between_a_picture_and_its_row_it_goes_on(workshop, tmp_path, whole):
    done = workshop.run(tmp_path, *EXPLORE, before=KILLED.format(10))
    folder = only(tmp_path / "output")
    assert done.code == -signal.SIGKILL and (folder / PICTURES[0]).is_file()
    assert read_rows(folder / "metadata.csv") == [] and not (folder / SHARED).exists()
    assert_resumable(workshop, tmp_path, whole)


@pytest.mark.slow
def test_killed_between_any_two_writes_it_goes_on(workshop, tmp_path, whole):
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        done = workshop.run(folder, *EXPLORE, before=KILLED.format(step))
        assert done.code in (0, -signal.SIGKILL), done.log
        assert_resumable(workshop, folder, whole)
        if done.code == 0:
            break
    assert step > 20


# Batches -------------------------------------------------------------------------------------------

IN_BATCHES = [*EXPLORE, "--seeds", "1,2,3", "--guidance", "2,4", "--batch", "2"]
"""a batch of two, one of two, and one picture of another number of steps alone"""


@pytest.fixture(scope="module")
def batched_folder(workshop, tmp_path_factory):
    """A session in batches that nothing disturbs. Tests leave it as it is."""
    return undisturbed(workshop, tmp_path_factory.mktemp("batched"), IN_BATCHES)


def test_a_batch_has_pictures_of_as_many_steps_in_their_order():
    found = planned(["a", "b"], seeds="1,2,3", guidance="1.5,3.5", batch=3)
    assert [point for batch in found.batches for point in batch if point.steps == 1] == [
        point for point in found.places if point.steps == 1
    ]
    assert [(len(batch), {point.steps for point in batch}) for batch in found.batches] == [
        (3, {1}), (2, {2}), (3, {1}), (2, {1})
    ]  # fmt: skip
    again = Exploration.model_validate_json(found.text())
    assert again.batches == found.batches and planned().batches == [[point] for point in planned().places]


def test_a_session_says_its_batch_and_one_without_says_nothing(batched_folder, whole_folder):
    assert json.loads((batched_folder / "session.json").read_text())["batch"] == 2
    assert "batch" not in (whole_folder / "session.json").read_text()
    found = {row["File"]: json.loads(row["Request"]).get("batch") for row in read_rows(batched_folder / "metadata.csv")}
    assert found == {
        **{f"exploration_images/seed_{i + 1}.png": {"rows": 2, "row": i} for i in (0, 1)},
        "exploration_images/seed_3.png": {"rows": 2, "row": 0},
        "guidance_images/guidance_4.png": {"rows": 2, "row": 1},
        "inference_steps_images/steps_2.png": None,
    }


def test_a_batch_of_one_is_a_picture_as_ever(whole):
    assert contents(explored("--batch", "1")) == whole


def test_pictures_of_a_batch_repeat_to_the_byte_from_themselves(batched_folder, capsys):
    for row in read_rows(batched_folder / "metadata.csv"):
        assert main(["repeat", str(batched_folder / row["File"]), "--force", "--output-dir", "again"]) == 0
        path, last = capsys.readouterr().out.splitlines()[-2:]
        assert Path(path).read_bytes() == (batched_folder / row["File"]).read_bytes() and last.endswith("byte for byte")


def test_what_is_kept_of_a_batch_is_each_pictures_own():
    folder = explored("--save-latents", "every", "--batch", "2", "--steps", "2", "--stepwise-dir", "steps")
    for seed in (1, 2):
        path = folder / f"exploration_images/seed_{seed}.safetensors"
        picture = Image.open(path.with_suffix(".png"))
        assert load_file(path).keys() == {"latents", "step_1"}
        assert tiny_pipeline().picture(*read_latents(path)).tobytes() == picture.tobytes()
        steps = Path("steps") / folder.name / f"exploration_images/seed_{seed}"
        assert Image.open(steps / f"seed_{seed}_step2of2.png").tobytes() == picture.tobytes()


@pytest.mark.parametrize("lost", [["exploration_images/seed_2.png"], ["guidance_images/guidance_4.png"]])
def test_what_is_lost_of_a_batch_is_drawn_in_the_same_batch(batched_folder, tmp_path, lost):
    session = Path(shutil.copytree(batched_folder, tmp_path / "session"))
    for name in lost:
        (session / name).unlink()
    assert main(["explore", "--resume", str(session)]) == 0
    assert contents(session) == contents(batched_folder)


@pytest.mark.parametrize("step", [pytest.param(i, marks=[pytest.mark.slow] * (i != 12)) for i in range(1, 30)])
def test_killed_within_a_batch_it_goes_on_with_the_same(workshop, tmp_path, batched_folder, step):
    workshop.run(tmp_path, *IN_BATCHES, before=KILLED.format(step))
    assert_resumable(workshop, tmp_path, contents(batched_folder))


def test_processes_share_batches(workshop, tmp_path, batched_folder):
    pids = [workshop.start(tmp_path, *IN_BATCHES, before=SLOWLY, **env) for env in ranks(2)]
    for pid in pids:
        assert workshop.wait(pid, tmp_path).code == 0, (tmp_path / "log").read_text()
    assert contents(only(tmp_path / "output")) == contents(batched_folder)


def test_what_cannot_be_drawn_in_batches_is_told(session, capsys):
    Path("plan.json").write_text('[{"kind": "first_block_cache"}]')
    assert main([*EXPLORE, "--batch", "2", "--plan", "plan.json"]) == 2
    assert "first_block_cache decides for all rows of a batch by one number. Next: leave" in capsys.readouterr().err
    assert main(["explore", "--resume", str(session), "--batch", "2"]) == 2
    assert "leave out --batch" in capsys.readouterr().err
    assert main([*EXPLORE, "--batch", "65"]) == 2
    assert "--batch must be a whole number from 1 to 64" in capsys.readouterr().err
    assert not Path("output").exists()


# Damage --------------------------------------------------------------------------------------------


def test_a_row_cut_off_anywhere_is_made_anew(capsys):
    """Row 28: half a line counts for nothing, and is told; also within a letter, and within a field of three lines."""
    folder = explored("--prompt", 'äpfel\n\n"rot"')
    table, wanted = folder / "metadata.csv", contents(folder)["metadata.csv"]
    data = table.read_bytes()
    last = data.rindex(b"\n2") + 1
    for end in [*range(last, last + 80), *range(last + 80, len(data), 50)]:
        table.write_bytes(data[:end])
        mend(folder, PICTURES)
        assert ("half a line, cut off" in capsys.readouterr().err) == (end > last)
        assert contents(folder)["metadata.csv"] == wanted


DAMAGES = [
    (lambda data: b"\xef\xbb\xbf" + data, "line 1: a byte order mark"),
    (lambda data: data.replace(b"\n", b"\r\n"), "line 1: a carriage return"),
    (lambda data: data.replace(b"a red", b"a \0red"), "line 2: a NUL"),
    (lambda data: data.replace(b"a red", b"a \xffred"), "line 2: no UTF-8 text"),
    (lambda data: data.replace(b"Time,", b"Date,"), "line 1: the columns are others"),
    (lambda data: data.replace(b",LoraScale", b""), "line 1: the columns are others"),
    (lambda data: data.replace(b",2,3.5,,", b",2,3.5,"), "line 4: 12 columns, there should be 13"),
    (lambda data: data.replace(b"inference_", b"../"), "line 4: '../steps_images/steps_2.png' is no"),
    (lambda data: data + b"\n", "line 5: 0 columns"),
]


@pytest.mark.parametrize(("damage", "finding"), DAMAGES, ids=[finding for _, finding in DAMAGES])
def test_a_damaged_table_is_refused_by_its_line(session, capsys, damage, finding):
    table = session / "metadata.csv"
    table.write_bytes(damage(table.read_bytes()))
    for command in (["explore", "--resume", str(session)], ["repeat", str(table), "--row", "1"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"metadata.csv, {finding}" in err and "Next: " in err


OF_A_FILE = {"kind": "add", "sites": ["vec"], "value": {"file": "/nowhere/x.safetensors", "tensor": "x"}}
MANIFESTS = [
    (lambda text: text[: len(text) // 2], "is no JSON: ", "line "),
    (lambda text: text.replace('"format": 1', '"format": 2'), "session.json, line 2: format 2", ""),
    (lambda text: text.replace('"seeds"', '"sed"'), "session.json, line 7: sed: Extra", ""),
    (lambda text: text.replace('"cross": false', '"cross": "x"'), ": cross: ", "line 18"),
    (lambda text: text.replace('"width": 32', '"width": 0'), "--width must be", "line 21"),
    (
        lambda text: text.replace('"plan": []', '"plan": [{"kind": "capture", "sites": ["vec"], "to": "x"}]'),
        "a file cannot make us read or write other files",
        "line 25",
    ),
    (
        lambda text: text.replace('"plan": []', f'"plan": [{json.dumps(OF_A_FILE)}]'),
        "a file cannot make us read or write other files (add)",
        "line 25",
    ),
    (lambda text: "[]", "line 1: no session at all", ""),
    (lambda text: text.replace("a red", "a \x00red"), "is no JSON", "line 5"),
]


@pytest.mark.parametrize(("damage", "finding", "also"), MANIFESTS, ids=[finding for _, finding, _ in MANIFESTS])
def test_a_damaged_manifest_is_refused_by_its_line(session, capsys, damage, finding, also):
    manifest = session / "session.json"
    manifest.write_text(damage(manifest.read_text()))
    assert main(["explore", "--resume", str(session)]) == 2
    err = capsys.readouterr().err
    assert finding in err and also in err and err.count("\n") == 1


def test_a_folder_without_a_manifest_is_no_session(tmp_path, capsys):
    assert main(["explore", "--resume", str(tmp_path)]) == 4
    assert "holds no session.json" in capsys.readouterr().err


# Company -------------------------------------------------------------------------------------------


def test_a_session_has_its_folder_for_itself(session, whole, capsys):
    """Row 29. What a dead holder leaves behind is no lock."""
    (session / PICTURES[1]).unlink()
    with only_session(session):
        assert main(["explore", "--resume", str(session)]) == 2
        assert f"is being worked on by process {os.getpid()} on {socket.gethostname()}" in capsys.readouterr().err
    (session / ".session.holder").write_text('{"pid": 1, "host": "elsewhere"}')
    assert main(["explore", "--resume", str(session)]) == 0
    assert contents(session) == whole


def test_two_sessions_in_a_second_or_with_a_clock_that_goes_back_have_a_folder_each(tmp_path):
    """Row 53."""
    folders = [new_folder(tmp_path, now) for now in (1e9, 1e9, 1e9 - 3600, 1e9, 1e9 - 3600)]
    assert len(set(folders)) == 5 and all(folder.is_dir() for folder in folders)


def ranks(world):
    """The environments that torchrun gives its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def test_processes_share_a_session(workshop, tmp_path, whole):
    by = (
        "import flux_core.session.folder as s, os\nkeep = s.Session.keep\n"
        'def kept(self, point, *files): keep(self, point, *files); print("by", os.environ["RANK"])\n'
        "s.Session.keep = kept\n"
    )
    pids = [workshop.start(tmp_path, *EXPLORE, before=SLOWLY + by, **env) for env in ranks(2)]
    for pid in pids:
        assert workshop.wait(pid, tmp_path).code == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert log.count("by 0") + log.count("by 1") == 3 and "by 0" in log and "by 1" in log
    assert contents(only(tmp_path / "output")) == whole


def test_what_a_dead_process_was_at_is_taken_over(workshop, tmp_path, whole):
    first, second = (workshop.start(tmp_path, *EXPLORE, before=SLOWLY, **env) for env in ranks(2))
    until(lambda: len(list(tmp_path.glob("output/*/.claims/*.lock"))) >= 2)
    os.kill(second, signal.SIGKILL)
    assert workshop.wait(second, tmp_path).code == -signal.SIGKILL
    code, log = workshop.wait(first, tmp_path)
    assert code == 0, log
    assert contents(only(tmp_path / "output")) == whole


def test_processes_that_have_no_place_to_meet_are_told(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(EXPLORE) == 2
    assert "use torchrun" in capsys.readouterr().err and not Path("output").exists()


@pytest.mark.slow
def test_torchrun_spreads_a_session(tmp_path):
    """The real thing: flux-mini, two processes, each with its own model and its own copy of a function."""
    (tmp_path / "my.py").write_text("def brighter(x, at):\n    return x * 1.1\n")
    flags = ["--prompt", "a red apple", "--width=64", "--height=64", "--force", "--steps", "1,2", "--seeds", "1,2,3,4"]
    flags += ["--hook", str(tmp_path / "my.py:brighter"), "--at", "vec@0", "--skip", "layer.6"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, command in (("alone", [sys.executable]), ("shared", run)):
        words = [*command, str(ROOT / "cli.py"), "explore", *flags, "--output-dir", str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    assert contents(only(tmp_path / "shared")) == contents(only(tmp_path / "alone"))
