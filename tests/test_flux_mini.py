"""The model that ships: it draws what it is told, and its guidance is what the card says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flux_core import load_pipeline
from flux_core.hub.places import SCORER, embedded_folder
from flux_core.sampling import flow_velocity, get_noise, prepare
from flux_core.training.settings import NOTO
from flux_core.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")
ROW = VARIANTS["flux-mini"]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("flux-mini", "cpu", torch.float32)


def object_colour(image):
    """Mean RGB of what is no background: of pixels far from white."""
    pixels = np.asarray(image).reshape(-1, 3) / 255
    return pixels[pixels.min(axis=1) < 0.6].mean(axis=0)


@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_an_apple_has_the_colour_that_is_asked_for(pipeline, colour, channel):
    image = pipeline.generate(f"a {colour} apple on a white background", seed=0, num_steps=12)[0]
    assert image.size == (ROW.width, ROW.height)
    assert object_colour(image).argmax() == channel


def test_a_picture_of_what_a_picture_shows(pipeline):
    """flux-mini-redux, without a word."""
    seen = pipeline.generate("a blue apple on a white background", seed=0, num_steps=8)[0]
    image = load_pipeline("flux-mini-redux", "cpu").generate("", seed=5, num_steps=8, reference=seen)[0]
    assert np.asarray(image)[:8].mean() > 230 and object_colour(image).argmax() == 2


def test_one_guided_forward_stands_for_two(pipeline):
    """Of all strengths, w comes nearest to `uncond + w * (cond - uncond)`, which takes two forwards."""
    noise = get_noise(4, 256, 256, "cpu", torch.float32, seed=0)
    prompts = ["a red apple", "a castle", "three blue stars", "a cat to the left of a dog"]
    strengths = [1.0, 2.0, 4.0, 8.0]

    def velocity(texts, guidance):
        inputs = prepare(pipeline.t5, pipeline.clip, noise, texts)
        x = inputs.pop("img")
        with torch.no_grad():
            return flow_velocity(pipeline.model, **inputs, guidance=guidance)(x, 0.9)

    guided = [velocity(prompts, w) for w in strengths]
    uncond = velocity([""] * 4, 1.0)
    for i, w in enumerate(strengths[:3]):
        two_forwards = uncond + w * (guided[0] - uncond)
        assert min(range(4), key=lambda j: (guided[j] - two_forwards).norm()) == i


@pytest.mark.filterwarnings("ignore:true CFG")
def test_a_negative_prompt_takes_its_colour_away_in_one_batch_and_in_two_passes(pipeline):
    fields = {"num_steps": 6, "width": 128, "height": 128}
    away = {"negative_prompt": "a blue fish", "true_cfg_scale": 4.0}
    plain, together = (pipeline.generate("a fish", seed=1, **fields, **more)[0] for more in ({}, away))
    pipeline.denoiser.one_batch = False
    passes = pipeline.generate("a fish", seed=1, **fields, **away)[0]
    pipeline.denoiser.one_batch = True
    apart = np.abs(np.asarray(together).astype(int) - np.asarray(passes))
    assert apart.max() <= 2 and apart.mean() < 0.05

    def blue(image):
        pixels = np.asarray(image).astype(float)
        return (pixels[..., 2] - pixels[..., 0]).clip(0).mean()

    assert blue(together) < 0.5 * blue(plain)


def test_what_ships_stays_small():
    """60 MiB in all, so that a clone takes seconds: 3 for the adapter of four steps, 2 for each by which flux-mini sees
    a picture, 6 for the scorer, 4 for Noto, 1 for Zib's adapter and pictures."""
    weights = embedded_folder(ROW).parent
    files = [file for file in weights.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    for folder, most in (
        (SCORER, 6),
        (NOTO, 4),
        ("flux-mini-fast", 3),
        ("flux-mini-canny", 2),
        ("flux-mini-kontext", 2),
        ("flux-mini-redux", 1),
        ("zib", 1),
    ):
        assert sum(file.stat().st_size for file in files if folder in file.parts) <= most * 2**20
    assert sum(file.stat().st_size for file in files) <= 60 * 2**20


def test_notices_ship_with_the_weights():
    notice = (Path(embedded_folder(ROW)).parent / "NOTICE").read_text(encoding="utf-8")
    assert "Microsoft Corporation" in notice and "Miles Johnson" in notice
