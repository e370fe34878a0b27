"""Our networks, schedule and pipeline beside those of diffusers, with the same weights."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from golden_files import distance
from random_model import random_weights, small_variant, write_hub

from flux_core import load_pipeline
from flux_core.checkpoint import files, to_diffusers, write_safetensors
from flux_core.checkpoint.layouts import scheduler_config, transformer_config, vae_config
from flux_core.commands.save import save
from flux_core.model import AutoEncoder, Flux
from flux_core.sampling import euler, get_noise, get_schedule, image_ids, pack
from flux_core.variants import VARIANTS

ROW = small_variant()
PROMPT = "a red apple"


def theirs(kind, config, state):
    """diffusers' network of that configuration with that state."""
    with torch.device("meta"):
        network = kind.from_config(config)
    missing, unexpected = network.load_state_dict(state, assign=True, strict=False)
    assert not missing and not unexpected
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("mlp_ratio", [4.0, 3.0])
@pytest.mark.parametrize("guided", [True, False])
def test_transformer(guided, mlp_ratio):
    params = replace(ROW.params, guidance_embed=guided, mlp_ratio=mlp_ratio)
    ours = random_weights(Flux(params))
    config, state = transformer_config(params), to_diffusers(ours.state_dict(), params)
    other = theirs(FluxTransformer2DModel, config, state)

    draw = torch.Generator().manual_seed(1)
    img, txt, vec = (
        torch.randn(*shape, generator=draw)
        for shape in ((2, 6 * 4, 64), (2, 7, params.context_in_dim), (2, params.vec_in_dim))
    )
    img_ids, txt_ids = image_ids(2, 6, 4), torch.zeros(2, 7, 3)
    t, g = torch.tensor([0.8, 0.3]), torch.tensor([3.5, 1.0])
    velocity = ours(img, img_ids, txt, txt_ids, t, vec, g)
    expected = other(
        hidden_states=img,
        encoder_hidden_states=txt,
        pooled_projections=vec,
        timestep=t,
        img_ids=img_ids[0],
        txt_ids=txt_ids[0],
        guidance=g if guided else None,
        return_dict=False,
    )[0]
    assert distance(velocity, expected) <= 5e-6


@pytest.mark.parametrize(
    "ae_params",
    [ROW.ae_params, replace(VARIANTS["flux-dev"].ae_params, ch=32, ch_mult=(1, 2), num_res_blocks=2)],
)
def test_autoencoder(ae_params):
    ours = random_weights(AutoEncoder(ae_params), std=0.05)
    other = theirs(AutoencoderKL, vae_config(ae_params), to_diffusers(ours.state_dict(), ae_params))
    image = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = ours.encode(image)
    expected = (other.encode(image).latent_dist.mean - ae_params.shift_factor) * ae_params.scale_factor
    assert distance(latent, expected) <= 5e-6
    raw = latent / ae_params.scale_factor + ae_params.shift_factor
    assert distance(ours.decode(latent), other.decode(raw).sample) <= 5e-6


def scheduler_of(shift, steps, tokens):
    """diffusers' scheduler, set as its FluxPipeline sets it."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config(shift))
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("steps", "tokens"), [(4, 256), (28, 4096), (50, 1024), (1, 9216)])
def test_schedule(shift, steps, tokens):
    sigmas = scheduler_of(shift, steps, tokens).sigmas
    ours = torch.tensor(get_schedule(steps, tokens, shift=shift))
    assert torch.allclose(ours, sigmas, rtol=0, atol=2e-7)


def test_steps():
    def velocity(x, sigma):
        return torch.sin(3 * x) + sigma

    x = get_noise(1, 64, 64, "cpu", torch.float32, 3)
    ours = euler(velocity, x, get_schedule(8, 16))
    scheduler = scheduler_of(True, 8, 16)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(t) / 1000), t, x).prev_sample
    assert distance(ours, x) <= 1e-5


def pixels(image):
    return np.asarray(image).astype(int)


def draw_with_theirs(folder, row, request, **more):
    """The same picture from the saved folder: same sizes, text length and CPU generator."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        height=request["height"],
        width=request["width"],
        num_inference_steps=request["num_steps"],
        guidance_scale=row.guidance,
        max_sequence_length=row.max_text,
        generator=torch.Generator("cpu").manual_seed(request["seed"]),
        **more,
    ).images[0]


def compare(row, tmp_path, more=None, **request):
    """Our picture and theirs; at most one of 255 levels apart. more: arguments that both have by the same name."""
    more = more or {}
    folder = save(row.name, "diffusers", "fp32", tmp_path / "diffusers")
    ours = load_pipeline(row.name, "cpu", "float32").generate(PROMPT, **request, **more, force=True)[0]
    apart = np.abs(pixels(ours) - pixels(draw_with_theirs(folder, row, request, **more)))
    assert pixels(ours).std() > 1, "a picture of one colour proves nothing"
    assert apart.max() <= 1


def test_pipeline(small, tmp_path):
    compare(small, tmp_path, width=64, height=96, num_steps=4, seed=5)


@pytest.mark.filterwarnings("ignore:true CFG")
def test_true_guidance(small, tmp_path):
    more = {"negative_prompt": "a blue table", "true_cfg_scale": 3.0}
    compare(small, tmp_path, more, width=64, height=96, num_steps=4, seed=5)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_pipeline_of_official_files(name, tmp_path, monkeypatch):
    """Transformer and autoencoder by FLUX_MODEL and FLUX_AE, text encoders as the hub has them."""
    row = small_variant(name)
    write_hub(tmp_path / "hub", row)
    for variable, network in (("FLUX_MODEL", Flux(row.params)), ("FLUX_AE", AutoEncoder(row.ae_params))):
        write_safetensors(tmp_path / f"{variable}.safetensors", random_weights(network).state_dict())
        monkeypatch.setenv(variable, str(tmp_path / f"{variable}.safetensors"))
    monkeypatch.setitem(VARIANTS, name, row)
    monkeypatch.setattr(files, "hub_folder", lambda repo, patterns: tmp_path / "hub" / repo)
    compare(row, tmp_path, width=64, height=64, num_steps=3, seed=1)


def test_pipeline_of_the_shipped_model(tmp_path, monkeypatch):
    for variable in ("FLUX_MODEL", "FLUX_AE"):
        monkeypatch.delenv(variable, raising=False)
    compare(VARIANTS["flux-mini"], tmp_path, width=256, height=256, num_steps=4, seed=0)


def test_the_noise_is_diffusers_noise():
    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator("cpu").manual_seed(9))
    theirs = FluxPipeline._pack_latents(noise, 1, 16, 12, 8)
    assert torch.equal(pack(get_noise(1, 96, 64, "cpu", torch.float32, 9)), theirs)
    assert math.prod(theirs.shape) == noise.numel()
