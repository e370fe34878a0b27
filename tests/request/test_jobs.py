"""A job file says what the command line says, and what is wrong in one is told before any job begins."""

import json
from pathlib import Path

import pytest

from flux_core.main import COMMANDS, main, parse
from flux_core.request.jobs import flags_of, read_jobs

SHIPPED = sorted((Path(__file__).parents[2] / "jobs").glob("*.json"))


def test_a_job_gives_the_flags_of_the_same_command_line():
    job = {"prompt": "a", "num-steps": 2, "guidance": 3.5, "seed": [1, 2], "force": True, "width": None}
    line = ["--prompt", "a", "--num_steps", "2", "--guidance", "3.5", "--seed", "1", "2", "--force"]
    assert flags_of(job, COMMANDS["generate"].fields, "job") == parse(line)[1]


def test_a_job_takes_every_spelling_of_a_flag():
    job = {"p": "a", "steps": 2, "cfg-scale": 3, "W": 64, "--seed": 1, "n": "b", "m": "own.safetensors"}
    line = [
        "-p",
        "a",
        "--steps",
        "2",
        "--cfg-scale",
        "3",
        "-W",
        "64",
        "--seed",
        "1",
        "-n",
        "b",
        "-m",
        "own.safetensors",
    ]
    assert flags_of(job, COMMANDS["generate"].fields, "job") == parse(line)[1]
    assert flags_of({"num_steps": [4, 8]}, COMMANDS["explore"].fields, "job") == {"steps": ["4", "8"]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_jobs_that_ship_are_right(path):
    for job in read_jobs(path):
        assert flags_of(job, COMMANDS[job["command"]].fields, path.name)


def test_jobs_run_one_after_the_other(small, one_thread, tmp_path, capsys):
    first = {"prompt": "a cat", "num_steps": 2, "seed": 1, "output_dir": str(tmp_path / "out")}
    (tmp_path / "job.json").write_text(
        json.dumps([first, {**first, "command": "generate", "seed": [2], "skip": "layer.0"}])
    )
    assert main(["run", str(tmp_path / "job.json")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["flux-mini_seed1.png", "flux-mini_seed2.png"]


@pytest.mark.parametrize(
    ("text", "code", "finding"),
    [
        ('{"promt": "a"}', 2, "job 1: there is no 'promt' here. Did you mean prompt?"),
        ('[{"prompt": "a"}, {"command": "draw"}]', 2, "job 2: no command 'draw'"),
        ('{"command": "run"}', 2, "no command 'run'"),
        ('{"prompt": "a", "steps": 2, "num-steps": 3}', 2, "job 1: num-steps says num_steps a second time"),
        ('{"prompt": "a", "stps": 2}', 2, "Did you mean steps?"),
        ('{"prompt": ["a", "b"]}', 2, "prompt must be text"),
        ('{"force": 1}', 2, "force must be true or false"),
        ('{"seed": {"a": 1}}', 2, "seed must be a whole number"),
        ('{"promt": null, "prompt": "a"}', 2, "job 1: there is no 'promt' here"),
        ('{"stps": false, "prompt": "a"}', 2, "job 1: there is no 'stps' here"),
        ('{"prompt": "a", "seed": false}', 2, "job 1: seed must be a whole number"),
        ('{"prompt": "a", "force": false, "steps": null, "width": 1}', 2, "job.json, job 1: --width 1 is not among"),
        ("[]", 2, "holds no job"),
        ("[3]", 2, "holds no job"),
        ("{", 2, "is no JSON"),
        (" " * 1_100_000, 2, "at most"),
        (None, 4, "could not be read"),
    ],
)
def test_a_wrong_job_is_told_and_nothing_is_drawn(tmp_path, capsys, text, code, finding):
    if text is not None:
        (tmp_path / "job.json").write_text(text)
    assert main(["run", str(tmp_path / "job.json")]) == code
    assert finding in capsys.readouterr().err
