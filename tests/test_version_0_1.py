"""What version 0.1 wrote before its modules moved is still read: pictures, a session, latents, a plan, a job file.

All of it was drawn by flux-mini at 128x128 in 2 steps, on a CPU with one thread (tests/golden/version_0_1). Since then
flux-mini has another decoder: pixels, and the hashes that stand for them and for it, are new, all else is as it was.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_core.hooks import read_plan
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.session.record import read_rows

FILES = Path(__file__).parent / "golden" / "version_0_1"
SESSION = FILES / "session"


def pixels(path):
    return np.array(Image.open(path).convert("RGB"), int)


def same(path, other):
    """But for last bits, which another machine rounds otherwise."""
    apart = np.abs(pixels(path) - pixels(other))
    return apart.max() <= 2 and (apart > 0).mean() < 0.02


def drawn(folder):
    """The one picture in a folder."""
    (path,) = folder.glob("*.png")
    return path


@pytest.mark.parametrize("name", ["plan.png", "init_cfg.png"])
def test_a_request_keeps_its_keys(name):
    recorded = json.loads(Image.open(FILES / name).info["flux_core"])
    assert read_request(FILES / name).model_dump(mode="json", exclude_none=True).items() >= recorded.items()


def test_a_picture_with_a_plan_is_repeated(tmp_path, one_thread):
    assert main(["repeat", str(FILES / "plan.png"), "--threads=1", f"--output-dir={tmp_path}"]) == 0
    assert same(drawn(tmp_path), FILES / "plan.png")


def test_a_picture_from_a_picture_is_repeated(tmp_path, one_thread):
    flags = ["--from-image", str(FILES / "init_cfg.png"), "--init-image", str(FILES / "plan.png")]
    assert main([*flags, "--threads=1", f"--output-dir={tmp_path}"]) == 0
    assert same(drawn(tmp_path), FILES / "init_cfg.png")


def test_latents_are_decoded(tmp_path, one_thread):
    flags = [str(SESSION / "exploration_images" / "seed_3.png"), "--from-latents", "--threads=1"]
    assert main(["repeat", *flags, f"--output-dir={tmp_path}"]) == 0
    assert same(drawn(tmp_path), SESSION / "exploration_images" / "seed_3.png")


def test_a_session_is_resumed(tmp_path, one_thread):
    folder = tmp_path / "session"
    shutil.copytree(SESSION, folder)
    (folder / "exploration_images" / "seed_4.png").unlink()
    assert main(["explore", "--resume", str(folder), "--threads=1"]) == 0
    assert same(folder / "exploration_images" / "seed_4.png", SESSION / "exploration_images" / "seed_4.png")
    assert read_rows(folder / "metadata.csv")[0] == read_rows(SESSION / "metadata.csv")[0]


def test_a_plan_and_a_job_file_are_read(tmp_path, one_thread, monkeypatch):
    assert [one.kind for one in read_plan(FILES / "plan.json")] == ["scale", "skip"]
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(FILES / "job.json")]) == 0
    assert drawn(tmp_path / "out").name == "flux-mini_seed7.png"
