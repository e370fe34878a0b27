"""What a file is, by the names in it; and no file is called a transformer here that the loader then refuses."""

import random
from functools import cache

import pytest
import torch
from random_model import random_weights, small_variant
from safetensors.torch import save_file

from flux_core.checkpoint import check_files, load_flux, to_diffusers, with_files
from flux_core.checkpoint.identify import WHOLE, identify
from flux_core.errors import FileError
from flux_core.model import Flux

T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
AE = "encoder.down.0.block.0.conv1.weight"
FLUX = {"img_in.weight": (3072, 64), "guidance_in.in_layer.weight": (3072, 256)}


def test_every_part_is_found_in_an_all_in_one_file():
    parts = {"transformer": "img_in.weight", "autoencoder": AE, "t5": T5, "clip": CLIP}
    shapes = {WHOLE[part] + name: (3072, 64) for part, name in parts.items()}
    for part in parts:
        found = identify(shapes, part)
        assert (found.part, found.prefix, found.layout) == (part, WHOLE[part], "official")
        assert found.text.startswith("ComfyUI's all-in-one file, in it")


@pytest.mark.parametrize(
    ("shapes", "part", "layout", "features"),
    [
        (FLUX, "transformer", "official", (3072, 64, True)),
        ({"img_in.weight": (3072, 64)}, "transformer", "official", (3072, 64, False)),
        ({"x_embedder.weight": (3072, 64)}, "transformer", "diffusers", (3072, 64, False)),
        ({AE: (128, 128, 3, 3)}, "autoencoder", "official", ()),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (1,)}, "autoencoder", "diffusers", ()),
        ({T5: (1,)}, "t5", "official", ()),
        ({CLIP: (1,)}, "clip", "official", ()),
        (FLUX | {"double_blocks.0.img_mod.lin.lora_up.weight": (1,)}, "lora", "official", ()),
        ({"lycoris_transformer_blocks_0_attn_to_v.lokr_w1": (4, 4)}, "lora", "official", ()),
        ({"lora_unet_img_in.hada_w1_a": (4, 4)}, "lora", "official", ()),
        ({"diffusion_model.img_in.diff": (3072, 64)}, "lora", "official", ()),
        ({"diffusion_model.img_in.oft_blocks": (4, 4, 4)}, "lora", "official", ()),
        ({"exploration.img_in.weight": (3072, 64)}, "other", "official", ()),  # the word is no mark
        ({"img_in.weight": (3072,)}, "transformer", "official", ()),  # a shape that makes no sense is no reason to fall
        ({}, "other", "official", ()),
    ],
)
def test_part_layout_and_sizes(shapes, part, layout, features):
    found = identify(shapes)
    assert (found.part, found.layout, found.features, found.prefix) == (part, layout, features, "")


@cache
def states():
    """A small transformer in both layouts, under ComfyUI's prefix, and with ComfyUI's newer names of norms."""
    variant = small_variant()
    state = random_weights(Flux(variant.params)).bfloat16().state_dict()
    newer = {name.replace("_norm.scale", "_norm.weight"): x for name, x in state.items()}
    prefixed = {WHOLE["transformer"] + name: x for name, x in state.items()}
    return [dict(one) for one in (state, to_diffusers(state, variant.params), prefixed, newer)]


def drop(state, name, draw):
    del state[name]


def rename(state, name, draw):
    ends = ("weight", "scale", "bias", "weight_scale", "scale_weight", "gamma", "0.weight")
    state[f"{name.rpartition('.')[0]}.{draw.choice(ends)}"] = state.pop(name)


def reshape(state, name, draw):
    x = state[name]
    state[name] = draw.choice([x[:-1], x[..., :-1], x.flatten(), x[None], x.new_zeros(0), x.sum()]).clone()


def retype(state, name, draw):
    kinds = (torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.bool, torch.float64)
    state[name] = state[name].to(draw.choice(kinds))


def add(state, name, draw):
    extra = (
        "vae.x",
        "optimizer.x",
        "scaled_fp8",
        "model_ema.x",
        f"{name}_scale",
        f"{name}.more",
        "guidance_in.x.weight",
    )
    state[draw.choice(extra)] = torch.ones(draw.choice([(), (1,), (3,), (2, 2)]))


def double(state, name, draw):
    other = name.replace("_norm.scale", "_norm.weight") if name.endswith("_norm.scale") else f"model.{name}"
    state[other] = state[name].clone()


def unprefix(state, name, draw):
    prefix = WHOLE["transformer"]
    state[name.removeprefix(prefix) if name.startswith(prefix) else prefix + name] = state.pop(name)


@pytest.mark.parametrize("seed", range(120))
def test_what_passes_the_check_loads_and_what_loads_passes_it(small, tmp_path, seed):
    draw = random.Random(seed)
    state = dict(draw.choice(states()))
    for change in draw.choices([drop, rename, reshape, retype, add, double, unprefix], k=draw.choice([1, 1, 2, 3])):
        norms = [name for name in state if "norm" in name]
        change(state, draw.choice(draw.choice([list(state), norms])), draw)
    path = tmp_path / "model.safetensors"
    save_file({name: x.contiguous() for name, x in state.items()}, path)
    variant = with_files("flux-mini", model=path)
    refusals = []
    for ask in (check_files, load_flux):
        try:
            ask(variant)
        except FileError as error:
            refusals.append(str(error))
    assert len(refusals) in (0, 2), refusals
    assert refusals or identify({name: tuple(x.shape) for name, x in state.items()}).part == "transformer"


def test_some_of_those_load_and_some_do_not(small, tmp_path):
    """Without a change all four load, so the changes above are what is refused."""
    for state in states():
        save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / "model.safetensors")
        check_files(with_files("flux-mini", model=tmp_path / "model.safetensors"))
        assert load_flux(with_files("flux-mini", model=tmp_path / "model.safetensors")).img_in.weight.numel()
