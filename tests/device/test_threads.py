"""Threads: as many as the cores that this process may use, by what the machine says in its files."""

import math

import pytest
import torch
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.device import threads
from flux_core.device.memory import ram
from flux_core.device.threads import groups, quota, set_threads
from flux_core.main import main


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {}, math.inf),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),  # the tightest around it
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", {"cpu.max": "100000 100000"}, 1),  # in a container, which sees its own group as the root
        ("4:memory:/x\n3:cpu,cpuacct:/x", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "150000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 1.5),
        ("3:cpuset:/x", {"cpu/x/cpu.cfs_quota_us": "1", "cpu/x/cpu.cfs_period_us": "1"}, math.inf),
        ("0::/", {"cpu.max": "nonsense"}, math.inf),
    ],
)
def test_a_quota_is_read_in_both_versions_of_control_groups(tmp_path, own, files, cores):
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path, tmp_path / "own") == cores


def test_where_there_are_no_control_groups_nothing_limits(tmp_path):
    assert quota(tmp_path, tmp_path / "no such file") == math.inf


def test_by_itself_no_more_threads_than_the_quota_and_never_more_than_torch_chose(monkeypatch):
    torch.set_num_threads(4)
    for cores, expected in ((math.inf, 4), (16, 4), (2.5, 3), (0.5, 1)):
        monkeypatch.setattr(threads, "quota", lambda cores=cores: cores)
        set_threads(None)
        assert torch.get_num_threads() == expected
    set_threads(3)
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_threads(None)
    assert torch.get_num_threads() == 3


def test_the_flag_is_obeyed_before_anything_computes(monkeypatch, tmp_path, capsys):
    seen = []

    def load(*args, **options):
        seen.append(torch.get_num_threads())
        return tiny_pipeline(*args, **options)

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    draw = ["--prompt", "a", "--width", "32", "--height", "32", "--force", "--steps", "1"]
    assert main([*draw, "--threads", "3"]) == 0 and seen == [3]
    assert main([*draw, "--threads", "0"]) == 2 and len(seen) == 1
    assert "--threads must be a whole number from 1 to 1024, not '0'" in capsys.readouterr().err


def test_memory_is_the_least_of_the_machine_and_the_groups_around_this_process(tmp_path, monkeypatch):
    (tmp_path / "own").write_text("0::/user/job\n")
    for folder, size in (("user", "3000000"), ("user/job", "max")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(size + "\n")
    whole = ram()
    around = list(groups("memory", tmp_path, tmp_path / "own"))
    assert around == [tmp_path / "user/job", tmp_path / "user", tmp_path]
    monkeypatch.setattr("flux_core.device.memory.groups", lambda controller: around)
    assert ram() == 3000000 < whole
