"""The example that ships: its pictures, what is held out, and the adapter."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from flux_core import load_pipeline
from flux_core.training import parse_resolution, read_folder
from flux_core.training.settings import example_values, read_settings

NOTO = Path(__file__).parents[2] / "weights" / "noto"
SIZE = parse_resolution("256x256")


def found(name):
    return read_folder(NOTO / name, SIZE.size_of)


def test_what_is_judged_was_not_trained_on():
    trained, held_out = found("pictures"), found("heldout")
    assert not trained.skipped and not held_out.skipped
    assert len(held_out.pictures) >= 30 and len(trained.pictures) >= 24
    for key in ("sha256", "caption"):
        assert not {getattr(one, key) for one in trained.pictures} & {getattr(one, key) for one in held_out.pictures}
    assert all(Image.open(one.path).size == (256, 256) and "noto" in one.caption.split() for one in trained.pictures)


def test_its_settings_are_read():
    settings = read_settings(None, "noto", {"steps": "3"})
    assert settings.steps == 3 and settings.recipe.lr == example_values("noto")["lr"] and settings.trigger == "noto"


def test_the_adapter_is_small_and_says_what_it_is():
    path = NOTO / "pytorch_lora_weights.safetensors"
    assert path.stat().st_size <= 2 * 2**20
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.r"] == example_values("noto")["rank"]


@pytest.mark.usefixtures("one_thread")
def test_the_adapter_changes_a_picture_and_at_scale_0_nothing():
    pipeline, how = load_pipeline("flux-mini"), {"num_steps": 2}
    plain = pipeline.generate("a noto anchor", 1, **how)[0].tobytes()
    with pipeline.load_lora(NOTO) as handle:
        assert pipeline.generate("a noto anchor", 1, **how)[0].tobytes() != plain
        handle.scale = 0.0
        assert pipeline.generate("a noto anchor", 1, **how)[0].tobytes() == plain
