"""The later stages: grounds, the way of a student, and the command that runs all."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "recipe"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import all as whole
import distill_steps
import train_autoencoder
import tune_decoder
from grounds import AROUND, differences

from flux_core.checkpoint import load_autoencoder
from flux_core.sampling import euler
from flux_core.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "weights" / "recipe"


def test_every_stage_is_a_file_and_gets_its_folders_and_its_part():
    args = argparse.Namespace(
        root=Path("DATA"), work=Path("W"), weights=Path("OUT"), part=0.1, batch=None, device="cpu"
    )
    commands = {stage.name: whole.command_of(stage, args, 5.0) for stage in whole.STAGES}
    assert all(Path(command[1]).resolve().is_file() for command in commands.values())
    assert commands["guidance"][2:] == [
        *("W", "--steps", "1000000"),
        *("--minutes", "0.8", "--pause", "5.0", "--device", "cpu"),
    ]
    assert commands["scenes of 256x256"][-4:] == ["--scenes", "30000", "--device", "cpu"]
    example = commands["the Noto example"]
    assert example[example.index("--t5xxl") + 1] == str(Path("OUT/flux-mini/t5")) and "120" in example


def test_all_stages_are_in_it():
    scripts = {path.name for path in RECIPE.glob("*.py") if "Stage " in path.read_text(encoding="utf-8")[:20]}
    assert len(scripts) >= 5 and scripts <= {stage.command.split()[0] for stage in whole.STAGES}


def test_latents_are_scaled_and_decode_to_the_same():
    ae, image = load_autoencoder(VARIANTS["flux-mini"], dtype=torch.float32), torch.rand(1, 3, 48, 32) * 2 - 1
    with torch.no_grad():
        ae.shift_factor = 0.0
        before, logvar = ae.encode(image), ae.encoder(image).chunk(2, dim=1)[1]
        decoded = ae.decode(before)
        train_autoencoder.scale_latents(ae, 0.7)
        torch.testing.assert_close(ae.encode(image), 0.7 * before, rtol=0, atol=1e-4)
        torch.testing.assert_close(ae.decode(0.7 * before), decoded, rtol=0, atol=1e-4)
        deviation = (ae.encoder(image).chunk(2, dim=1)[1] / 2).exp() / (logvar / 2).exp()
        torch.testing.assert_close(deviation, torch.full_like(deviation, 0.7), rtol=1e-3, atol=0)


def test_what_was_done_before_a_pause_counts_and_is_not_run_again(tmp_path, monkeypatch):
    """Stages that are commands of no minutes are done or not; one of minutes that was paused is run again."""
    script = "import sys, time; time.sleep(0.4); open(sys.argv[1], 'a').write(sys.argv[2])"
    (tmp_path / "stage.py").write_text(script, encoding="utf-8")
    log = tmp_path / "log"
    stages = [whole.Stage(name, f"stage.py {log} {name}", minutes) for name, minutes in (("a", 0), ("b", 1), ("c", 0))]
    monkeypatch.setattr(whole, "STAGES", stages)
    monkeypatch.setattr(whole, "HERE", tmp_path)
    monkeypatch.setattr(whole, "ship", lambda *_: None)
    for pause, told, names in ((0.005, "a", ["a"]), (0.005, "ab", ["a"]), (1, "abbc", ["a", "b", "c"])):
        monkeypatch.setattr(sys, "argv", ["all.py", "data", str(tmp_path), "new", "--pause", str(pause)])
        assert whole.main() == 0
        found = json.loads((tmp_path / "minutes.json").read_text(encoding="utf-8"))
        assert log.read_text(encoding="utf-8") == told and found["done"] == names
    assert found["minutes"]["b"] > 1.5 * found["minutes"]["c"]


def test_places_are_smooth_that_are_far_from_steps():
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 0.5
    image += torch.linspace(0, 0.1, 32)[:, None]  # a soft gradient is smooth
    found = tune_decoder.smooth(image)[0, 0]
    assert found[:, :12].all() and found[:, 20:].all() and not found[:, 15:17].any()


@pytest.mark.parametrize("kind", ["clouds", "graded"])
def test_grounds_are_colours(kind):
    torch.manual_seed(0)
    found = getattr(tune_decoder, kind)(3, 32, "cpu")
    assert found.shape == (3, 3, 32, 32) and found.min() >= 0 and found.max() <= 1
    assert not torch.equal(found[0], found[1])


def test_a_student_goes_by_euler_and_its_points_lie_on_the_schedule_of_eight():
    weights = ROOT / "weights" / "flux-mini" / "flux-mini.safetensors"
    student = distill_steps.Student(weights, 128, 1, "cpu")
    txt = torch.randn(1, VARIANTS["flux-mini"].max_text, 256).bfloat16(), torch.randn(1, 128).bfloat16()
    noise, sigmas = student.noise(), student.schedules[2]
    *_, x = student.way(student.model, noise, sigmas, txt)
    expected = euler(lambda x, sigma: student.velocity(student.teacher, x, sigma, txt), noise, sigmas)
    torch.testing.assert_close(x, expected.detach(), rtol=2e-2, atol=2e-2)  # factors are zero yet
    points, end = student.teach(txt)
    assert len(points) == 8 and set(student.schedules[8]) <= {*student.schedules[distill_steps.FINE]}
    assert end.shape == noise.shape and not torch.equal(points[0].float(), end)


def test_corners_and_grounds_are_compared_with_the_border_but_for_what_is_near_a_thing():
    image = torch.full((3, 256, 256), 200.0)
    image[:, 0, 0] += 7
    image[:, 128, 3] += 5
    assert differences(image) == (7, 7)
    image[:, 0, 0] -= 7
    assert differences(image) == (0, 5)
    image[:, 100:130, :AROUND] = 20  # a thing at the border
    assert differences(image) == (0, 0)
