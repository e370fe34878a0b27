"""The family beside diffusers' whole pipelines, each on the same files.

Fill, Control and its LoRA, Kontext, Redux, ControlNets, and what any model paints inside a mask.

Tokens agree within a relative distance of 1e-5 and pictures within one of 255 levels, but for what diffusers does on
purpose otherwise than the official code, whose rules are ours. These differences are undone here, on one side:

- it samples a picture's latent where the official code takes its mean (Fill, Control, ControlNets, painting);
- it does not round conditions to bf16;
- it makes a mask black and white, and does not put back what is kept (Fill and painting);
- it adds up the words of several pictures, and T5's as often (Redux).
"""

from dataclasses import replace

import family_files
import numpy as np
import pytest
import torch
from controlnets import params_for, theirs, write_net, xlabs_params
from diffusers import (
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
    FluxPriorReduxPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux import pipeline_flux_inpaint, pipeline_flux_kontext
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from family_files import SIGLIP_WIDTH, control_lora, noise, small_model
from golden_files import distance
from PIL import Image
from random_model import random_weights, small_variant
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, SiglipVisionModel

from flux_core import load_pipeline
from flux_core.checkpoint import to_diffusers
from flux_core.checkpoint.files import text_files
from flux_core.checkpoint.keymaps import pairs_of
from flux_core.checkpoint.layouts import write_diffusers
from flux_core.images.masks import without_step
from flux_core.sampling import get_noise, pack
from flux_core.variants import VARIANTS, Takes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*it is stretched", "ignore:true CFG takes two forwards"),
]
WIDTH, HEIGHT, STEPS, SEED, PROMPT = 48, 32, 3, 3, "a red apple on a table"
NEGATIVE = {"negative_prompt": "two green pigs", "true_cfg_scale": 3.0}
SIZES = [(32, 64), (48, 48), (64, 32)]
"""at which the tiny Kontext sees references"""
ROOM, PHOTO, CUP = noise(WIDTH, HEIGHT), noise(90, 70, 2), noise(70, 112, 1)
GREY = ROOM.convert("L")
MASK = GREY.point(lambda level: 255 if level >= 128 else 0)
"""as diffusers sees the grey one"""


@pytest.fixture
def undone(monkeypatch):
    """A function that undoes differences by name: diffusers' latents are sampled, our conditions rounded."""
    rules = {
        "sampled": (DiagonalGaussianDistribution, "sample", lambda latent, generator=None: latent.mode()),
        "rounded": (torch.Tensor, "bfloat16", lambda x: x),
    }
    return lambda *names: [monkeypatch.setattr(*rules[name]) for name in names]


class Pair:
    """A small model in two pipelines, on the same random weights, and what each draws of a prompt."""

    def __init__(self, folder, ours, kind):
        """kind: the class in diffusers."""
        self.ours, self.row = ours, ours.variant
        folder.mkdir()
        write_diffusers(folder, ours.variant, text_files(ours.variant), torch.float32)
        self.theirs = kind.from_pretrained(folder)

    def draw(self, **fields):
        """Our tokens after the last step, and the picture."""
        last = {}
        size = {"width": WIDTH, "height": HEIGHT, "num_steps": STEPS, "force": True}
        (image,) = self.ours.generate(PROMPT, SEED, on_step=lambda step: last.update(x=step.x), **size, **fields)
        return last["x"], image

    def draw_theirs(self, **fields):
        """Theirs, from the same noise."""
        last = {}
        size = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": STEPS, "guidance_scale": self.row.guidance}
        start = {"latents": pack(get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED))}
        text = {} if "prompt_embeds" in fields else {"prompt": PROMPT, "max_sequence_length": self.row.max_text}
        self.theirs.set_progress_bar_config(disable=True)
        keep = {"callback_on_step_end": lambda pipeline, i, t, tensors: last.update(tensors) or tensors}
        drawn = self.theirs(**keep, **size, **text, **start | fields)
        return last["latents"], drawn.images[0]


@pytest.fixture
def pair(monkeypatch, tmp_path):
    """A function from a row's name, diffusers' class and changes of the row to a pair."""

    def made(name, kind, **changes):
        row, files = small_model(tmp_path / "official", name, **changes)
        monkeypatch.setitem(VARIANTS, name, row)
        return Pair(tmp_path / "diffusers", load_pipeline(name, "cpu", **files), kind)

    return made


def levels(image):
    return np.asarray(image).astype(int)


def agree(ours, theirs):
    (x, image), (y, other) = ours, theirs
    assert levels(image).std() > 1, "a picture of one colour proves nothing"
    return distance(x, y) <= 1e-5 and np.abs(levels(image) - levels(other)).max() <= 1


# Fill and Control -------------------------------------------------------------------------------------


def put_back(drawn):
    """Theirs with what ours keeps."""
    x, image = drawn
    return x, without_step(image, ROOM, MASK)


def test_fill(pair, undone):
    both = pair("flux-dev-fill", FluxFillPipeline)

    def theirs(mask):
        return put_back(both.draw_theirs(image=ROOM, mask_image=mask))

    ours = both.draw(init_image=ROOM, mask=MASK)
    assert not agree(ours, theirs(MASK))
    undone("sampled", "rounded")
    ours = both.draw(init_image=ROOM, mask=MASK)
    assert agree(ours, theirs(MASK)) and agree(ours, theirs(GREY))
    assert not agree(both.draw(init_image=ROOM, mask=GREY), theirs(GREY))


def test_control(pair, undone):
    both = pair("flux-dev-canny", FluxControlPipeline)

    def same():
        return agree(both.draw(control=PHOTO), both.draw_theirs(control_image=PHOTO))

    assert not same()
    undone("sampled")
    assert not same()
    undone("rounded")
    assert same()


def by_diffusers_names(lora, params):
    """diffusers reads the official names of a control LoRA at the official sizes alone."""
    plain = {name.replace(".lora_B.", "."): x for name, x in lora.items() if ".lora_A." not in name}
    found = to_diffusers(plain, params)
    for pair in pairs_of(params):
        stem, dot, end = pair.official.rpartition(".")
        for name in pair.diffusers if end != "scale" else ():
            module = name.removesuffix(dot + end)
            found[f"{module}.lora_B.{end}"] = found.pop(name)
            if end == "weight":
                found[f"{module}.lora_A.weight"] = lora[f"{stem}.lora_A.weight"]
    return {f"transformer.{name}": x for name, x in found.items()}


def test_a_control_lora(pair, undone, monkeypatch, tmp_path):
    undone("sampled", "rounded")
    params = replace(small_variant("flux-dev-canny-lora").params, mlp_ratio=4.0)
    path = control_lora(tmp_path / "lora.safetensors", params)
    monkeypatch.setenv("FLUX_LORA", str(path))
    both = pair("flux-dev-canny-lora", FluxControlPipeline, params=params)
    both.theirs.load_lora_weights(by_diffusers_names(load_file(path), params), adapter_name="canny")
    both.theirs.set_adapters(["canny"], [both.row.adapter.scale])
    assert agree(both.draw(control=PHOTO), both.draw_theirs(control_image=PHOTO))


# Kontext ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [{}, NEGATIVE], ids=["guided", "true guidance"])
def test_kontext(pair, undone, monkeypatch, guidance):
    undone("rounded")
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", SIZES)
    both = pair("flux-dev-kontext", FluxKontextPipeline, takes=Takes(references=True, sizes=tuple(SIZES)))
    theirs = both.draw_theirs(image=CUP, max_area=WIDTH * HEIGHT, **guidance)
    assert agree(both.draw(reference=CUP, **guidance), theirs)


# Redux ------------------------------------------------------------------------------------------------


LONG = 512
"""to which FluxPriorReduxPipeline pads every prompt"""


@pytest.fixture
def redux(pair, monkeypatch, tmp_path):
    """The pair, and diffusers' pipeline that makes its prompts."""
    folder = family_files.siglip(tmp_path / "siglip")
    width = small_variant("flux-dev-redux").params.context_in_dim
    embedder = random_weights(ReduxImageEncoder(SIGLIP_WIDTH, width), seed=6, std=0.5)
    save_file(embedder.state_dict(), tmp_path / "redux.safetensors")
    monkeypatch.setenv("FLUX_REDUX", str(tmp_path / "redux.safetensors"))
    both = pair("flux-dev-redux", FluxPipeline, max_text=LONG, takes=Takes(words=str(folder)))
    names = "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"
    prior = FluxPriorReduxPipeline(
        SiglipVisionModel.from_pretrained(folder).eval(),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        embedder,
        **{name: getattr(both.theirs, name) for name in names},
    )
    return both, prior


def test_redux(redux, undone):
    undone("rounded")
    both, prior = redux
    assert agree(both.draw(reference=CUP), both.draw_theirs(**prior(CUP, prompt=PROMPT)))


def test_redux_with_true_guidance(redux, undone):
    undone("rounded")
    both, prior = redux
    negative = {f"negative_{name}": x for name, x in prior(CUP, prompt=NEGATIVE["negative_prompt"]).items()}
    theirs = both.draw_theirs(**prior(CUP, prompt=PROMPT), **negative, true_cfg_scale=NEGATIVE["true_cfg_scale"])
    assert agree(both.draw(reference=CUP, **NEGATIVE), theirs)


def test_several_pictures_follow_each_other_and_diffusers_adds_them_up(redux):
    both, prior = redux
    scales = [0.75, 0.5]
    theirs = prior([CUP, PHOTO], prompt=PROMPT, prompt_embeds_scale=scales, pooled_prompt_embeds_scale=scales)
    words = both.ours.denoiser.redux.words([(CUP, 0.75), (PHOTO, 0.5)])
    txt, vec = both.ours.prompts(PROMPT)
    each = torch.cat((1.25 * txt, sum(words.chunk(2, dim=1))), dim=1)
    assert torch.allclose(theirs.prompt_embeds, each, atol=2e-5, rtol=0)
    assert torch.allclose(theirs.pooled_prompt_embeds, 1.25 * vec, atol=2e-5, rtol=0)


# ControlNets ------------------------------------------------------------------------------------------


class Net:
    """A ControlNet of random weights in a file, and diffusers' of it."""

    def __init__(self, path, params, seed=5):
        self.path, self.theirs = write_net(path, params, seed=seed), theirs(params)
        self.theirs.load_state_dict(load_file(path))


@pytest.fixture
def steered(pair, undone):
    """A function from ControlNets to a pair that has them."""

    def made(*nets):
        undone("sampled")
        both = pair("flux-dev", FluxPipeline)
        found = [net.theirs for net in nets]
        both.theirs = FluxControlNetPipeline(
            **both.theirs.components, controlnet=FluxMultiControlNetModel(found) if len(found) > 1 else found[0]
        )
        return both

    return made


@pytest.mark.parametrize("guidance", [{}, NEGATIVE], ids=["guided", "true guidance"])
@pytest.mark.parametrize("kind", ["plain", "union", "xlabs"])
def test_a_controlnet(steered, tmp_path, kind, guidance):
    of = small_variant("flux-dev").params
    params = {"plain": params_for(of), "union": params_for(of, modes=7), "xlabs": xlabs_params(of)}[kind]
    net, mode = Net(tmp_path / "net.safetensors", params), 3 if kind == "union" else None
    both = steered(net)
    ours = both.draw(controlnet=[(net.path, PHOTO, 0.7, (0.0, 0.7), mode)], **guidance)
    given = {"control_image": PHOTO, "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.7}
    assert agree(ours, both.draw_theirs(**given, control_mode=mode, **guidance))
    assert not agree(
        ours, both.draw_theirs(**given | {"controlnet_conditioning_scale": 0.0}, control_mode=mode, **guidance)
    )


def test_two_controlnets_with_parts_of_the_steps(steered, tmp_path):
    params = params_for(small_variant("flux-dev").params)
    nets = [Net(tmp_path / f"{seed}.safetensors", params, seed) for seed in (5, 6)]
    both, pictures = steered(*nets), (PHOTO, CUP)
    scales, starts, ends = (0.7, 0.4), (0.0, 0.3), (0.7, 1.0)
    used = zip((net.path for net in nets), pictures, scales, zip(starts, ends, strict=True), strict=True)
    theirs = both.draw_theirs(
        control_image=list(pictures), controlnet_conditioning_scale=list(scales),
        control_guidance_start=list(starts), control_guidance_end=list(ends),
    )  # fmt: skip
    assert agree(both.draw(controlnet=list(used)), theirs)


# Painting by any model --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [{}, NEGATIVE], ids=["guided", "true guidance"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_painting_in_a_mask(pair, undone, monkeypatch, strength, guidance):
    undone("sampled")
    both = pair("flux-dev", FluxInpaintPipeline)
    start = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED)
    monkeypatch.setattr(pipeline_flux_inpaint, "randn_tensor", lambda *_, **__: start)
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (16, 8, 48, 24))
    theirs, image = both.draw_theirs(image=ROOM, mask_image=mask, strength=strength, latents=None, **guidance)
    ours = both.draw(init_image=ROOM, mask=mask, strength=strength, **guidance)
    assert agree(ours, (theirs, without_step(image, ROOM, mask)))
