"""`~` is the home folder in every flag that takes a path, on the command line and in job files."""

import json

import pytest
from PIL import Image
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.commands.table import COMMANDS
from flux_core.errors import UsageError
from flux_core.files import expand_home
from flux_core.main import main

PATHS = [(name, field) for name, command in COMMANDS.items() for field in command.fields if field.path]
SIZE = {"width": 32, "height": 48, "num_steps": 2, "force": True, "seed": 7}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A home folder, and a working directory in which nothing called `~` may appear."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    yield tmp_path / "home"
    assert not [path for path in (tmp_path / "work").iterdir() if path.name.startswith("~")]


def words_of(flags: dict) -> list[str]:
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]


def test_every_flag_for_a_file_or_a_folder_is_a_path():
    for command in COMMANDS.values():
        for field in command.fields:
            assert field.path or field.metavar not in ("FILE", "FOLDER", "PATH"), field.name
    assert {"layers", "scorer", "calibrate", "resume", "plan", "t5xxl"} <= {field.name for _, field in PATHS}


@pytest.mark.parametrize(("name", "field"), PATHS, ids=lambda one: getattr(one, "name", one))
def test_a_command_gets_whole_paths(name, field, home):
    given = COMMANDS[name].with_whole_paths({field.name: "~/a b.json", "prompt": "~/no path"})
    assert given == {field.name: f"{home}/a b.json", "prompt": "~/no path"}


def test_pictures_go_home_and_come_from_there(home, one_thread, capsys):
    assert main(["--prompt=a", *words_of(SIZE), "--output-dir=~/out", "--stepwise-dir=~/steps"]) == 0
    picture = home / "out" / "flux-mini_seed7.png"
    assert picture.is_file() and any((home / "steps").iterdir())
    (home / "prompts.txt").write_text("a\n")
    (home / "plan.json").write_text("[]")
    files = ["--prompt-file=~/prompts.txt", "--init-image=~/out/flux-mini_seed7.png", "--plan=~/plan.json"]
    assert main([*files, *words_of(SIZE), "--output-dir=~/more", "--strength=0.5"]) == 0
    assert main(["repeat", "~/out/flux-mini_seed7.png", "--output-dir=~/again", "--force"]) == 0
    assert main(["info", "~/out/flux-mini_seed7.png"]) == 0
    job = {"prompt": "a", **SIZE, "output_dir": "~/job"}
    (home / "job.json").write_text(json.dumps(job))
    assert main(["run", "~/job.json"]) == 0
    assert all((home / name / "flux-mini_seed7.png").is_file() for name in ("more", "again", "job"))


def test_a_home_that_nobody_knows_is_refused(capsys):
    assert main(["--prompt=a", *words_of(SIZE), "--output-dir=~nobody-here/out"]) == 2
    err = capsys.readouterr().err
    assert "--output-dir ~nobody-here/out" in err and "Next: write the whole path, or ./~nobody" in err


def test_a_file_that_begins_so_is_still_taken(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path / "files")
    Image.new("RGB", (8, 8)).save("~cat.png")
    assert expand_home("~cat.png", "--image") == "~cat.png"
    with pytest.raises(UsageError, match="no such home folder"):
        expand_home("~dog.png", "--image")
    monkeypatch.chdir(tmp_path / "work")
