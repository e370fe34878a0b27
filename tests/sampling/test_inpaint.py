"""Repainting by blending latents: diffusers' pipeline on the same weights, and what grey in a mask means."""

import json
from itertools import pairwise

import pytest
import torch
from golden_files import flux_of, read

from flux_core.sampling import Step, denoise, get_schedule, image_ids, pack, start_from_image
from flux_core.sampling.inpaint import mask_tokens, repaint


def test_the_steps_of_diffusers():
    golden = read("family/inpaint")
    told, tensors = json.loads(golden.metadata["denoise"]), golden.group("in.")
    latent, noise, mask = pack(tensors["latent"]), pack(tensors["noise"]), golden.tensors["out.mask_packed"]
    sigmas = get_schedule(told["steps"], latent.shape[1])
    x, rest = start_from_image(latent, noise, sigmas, told["strength"])
    assert rest == pytest.approx(told["timesteps"], abs=1e-6)
    txt = tensors["txt"]
    inputs = {"img_ids": image_ids(1, 4, 6), "txt": txt, "txt_ids": torch.zeros(1, txt.shape[1], 3)}
    given = {**inputs, "vec": tensors["vec"], "timesteps": rest, "guidance": told["guidance"]}
    found = denoise(flux_of(golden), x, **given, on_step=repaint(latent, noise, mask, sigmas))
    assert torch.allclose(found, golden.tensors["out.denoised"], atol=2e-5, rtol=0)
    kept = mask == 0
    assert torch.equal(found[kept], latent[kept])


def test_grey_joins_in_where_image_to_image_of_that_strength_would_start():
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    latent, noise = torch.full((1, 1, 4), 3.0), torch.full((1, 1, 4), 5.0)
    mask = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]])
    keep, x, kept = repaint(latent, noise, mask, sigmas), torch.full((1, 1, 4), -9.0), []
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        found = keep(Step(i, sigma, after, x, x, x))
        held = found != -9
        assert torch.equal(found[held], torch.full_like(found[held], 3 + 2 * after))
        kept.append(held[0, 0].tolist())
    assert kept == [
        [True, True, True, False],
        [True, True, True, False],  # one half starts from the source at 0.5
        [True, True, False, False],
        [True, False, False, False],
    ]


def test_a_mask_is_the_mean_of_a_latent_pixels_pixels():
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., :4, :8] = 1
    tokens = mask_tokens(mask)
    assert tokens.shape == (1, 2, 64) and tokens[0, 0].unique().tolist() == [0, 0.5] and not tokens[0, 1].any()
    assert tokens[0, 0].view(16, 2, 2)[:, 0, 0].eq(0.5).all()
