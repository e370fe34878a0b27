"""Previews: the picture that a step expects, by a matrix instead of the autoencoder."""

import numpy as np
import pytest
import torch

from flux_core import load_pipeline
from flux_core.model.tiny import TinyDecoder
from flux_core.pipeline.preview import preview
from flux_core.sampling import Step, unpack
from flux_core.variants import VARIANTS

MINI, DEV = VARIANTS["flux-mini"].rgb, VARIANTS["flux-dev"].rgb


def step_of(data, noise, sigma):
    """A step from between data and noise, with the true velocity."""
    x, v = sigma * noise + (1 - sigma) * data, noise - data
    return Step(0, sigma, 0.0, x - sigma * v, v, x)


@pytest.mark.usefixtures("one_thread")
def test_it_is_the_small_picture_whatever_the_step():
    pipeline = load_pipeline("flux-mini", "cpu")
    image = pipeline.generate("a red apple left of a dog face", 3, num_steps=4)[0]
    data, noise = pipeline.encode(image), torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(0))
    found = np.asarray(preview(step_of(data, noise, 0.3), (256, 256), MINI)).astype(int)
    small = np.asarray(image).reshape(32, 8, 32, 8, 3).mean((1, 3))
    assert found.shape == (32, 32, 3) and np.abs(found - small).mean() < 15
    others = np.asarray(preview(step_of(data, noise, 0.3), (256, 256), DEV)).astype(int)
    assert np.abs(others - small).mean() > 2 * np.abs(found - small).mean()
    early = np.asarray(preview(step_of(data, noise, 0.9), (256, 256), MINI)).astype(int)
    assert np.abs(early - found).max() <= 1  # rounding alone: both expect the same picture


def test_a_latent_of_zeros_has_the_constant_colour_and_rows_are_chosen():
    rows = torch.zeros(2, 6, 64)
    rows[1] = 1
    step = Step(0, 0.5, 0.0, rows, torch.zeros(2, 6, 64), rows)
    for rgb in (MINI, DEV):
        for row, weights in ((0, rgb[-1:]), (1, rgb)):
            colour = (np.clip(np.sum(weights, axis=0), -1, 1) + 1) * 127.5
            found = np.asarray(preview(step, (48, 32), rgb, row))
            assert found.shape == (4, 6, 3) and np.abs(found - colour).max() <= 1


def test_a_tiny_decoder_makes_it_whole():
    torch.manual_seed(0)
    tiny, rows = TinyDecoder(), torch.randn(2, 6, 64)
    step = Step(0, 0.5, 0.0, rows, torch.zeros(2, 6, 64), rows)
    found = np.asarray(preview(step, (48, 32), DEV, 1, tiny))
    with torch.no_grad():
        expected = tiny(unpack(rows[1:], 32, 48))[0].movedim(0, -1).clamp(0, 1) * 255
    assert found.shape == (32, 48, 3) and np.abs(found - expected.numpy()).max() <= 0.51
