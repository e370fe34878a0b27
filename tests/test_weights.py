"""The official weights, for whoever has them: whole, as diffusers has them, and a picture that repeats.

    FLUX_MODEL=… FLUX_AE=… python -m pytest -m weights

FLUX_MODEL (and FLUX_AE, where that is not in the same folder) name files in any layout that flux_core reads; the model
is told from its header. Device and dtype are those that flux_core takes by itself. CI never runs this; with
FLUX_MODEL=weights/flux-mini it runs everywhere.
"""

import os

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from golden_files import distance
from test_diffusers import theirs

from flux_core import load_pipeline
from flux_core.checkpoint import check_files, resolve, to_diffusers, with_files
from flux_core.checkpoint.layouts import transformer_config, vae_config
from flux_core.commands.verify import verify
from flux_core.sampling import get_noise, image_ids, pack

pytestmark = pytest.mark.weights
PROMPT = "a red apple on a wooden table, studio light"
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""relative L2 to diffusers; in bf16 the two round at other places"""


@pytest.fixture(scope="module")
def variant():
    if "FLUX_MODEL" not in os.environ:
        pytest.fail("set FLUX_MODEL to a transformer's file or to a folder, and FLUX_AE to an autoencoder's")
    return with_files(None, model=os.environ["FLUX_MODEL"], ae=os.environ.get("FLUX_AE"))


@pytest.fixture(scope="module")
def pipeline(variant):
    return load_pipeline(variant)


def test_the_files_are_what_they_say_and_every_number_is_finite(variant):
    check_files(variant)
    for path in resolve(variant):
        assert "whole and finite" in verify(str(path))


@torch.no_grad()
def test_a_forward_is_diffusers_forward(pipeline):
    params, device, dtype = pipeline.variant.params, pipeline.device, pipeline.dtype
    side = 256 // 16
    txt, vec = pipeline.prompts(PROMPT)
    img = pack(get_noise(1, 256, 256, device, dtype, 0))
    ids, txt_ids = image_ids(1, side, side, device), torch.zeros(1, txt.shape[1], 3, device=device)
    t, g = torch.tensor([0.8], device=device, dtype=dtype), torch.tensor([3.5], device=device, dtype=dtype)
    ours = pipeline.model(img, ids, txt, txt_ids, t, vec, g if params.guidance_embed else None)
    state = to_diffusers(pipeline.model.state_dict(), params)  # views: no second copy of the model
    other = theirs(FluxTransformer2DModel, transformer_config(params), state).to(device)
    expected = other(
        hidden_states=img,
        encoder_hidden_states=txt,
        pooled_projections=vec,
        timestep=t,
        img_ids=ids[0],
        txt_ids=txt_ids[0],
        guidance=g if params.guidance_embed else None,
        return_dict=False,
    )[0]
    assert distance(ours.float(), expected.float()) <= LIMITS[dtype]


@torch.no_grad()
def test_a_decoding_is_diffusers_decoding(pipeline):
    params = pipeline.variant.ae_params
    state = to_diffusers(pipeline.ae.state_dict(), params)
    other = theirs(AutoencoderKL, vae_config(params), state).to(pipeline.device)
    latent = get_noise(1, 256, 256, pipeline.device, pipeline.dtype, 0)
    expected = other.decode(latent / params.scale_factor + params.shift_factor).sample
    assert distance(pipeline.ae.decode(latent).float(), expected.float()) <= LIMITS[pipeline.dtype]


def test_a_picture_is_one_and_repeats(pipeline):
    first, again = (pipeline.generate(PROMPT, seed=0, width=256, height=256)[0] for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert np.asarray(first).std() > 20, "a picture of one colour"
