"""The tables of names and shapes, which need no torch, say what the networks themselves have."""

from dataclasses import replace

import pytest
import torch
from random_model import small_variant
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_core.checkpoint import to_diffusers
from flux_core.checkpoint.names import network_shapes, renamed
from flux_core.checkpoint.shapes import CLIP_DEFAULTS, T5_DEFAULTS, clip_shapes, t5_shapes
from flux_core.model import AutoEncoder, Flux
from flux_core.params import FluxParams
from flux_core.variants import VARIANTS

SMALL = small_variant()
SIZES = [
    *(variant.params for variant in VARIANTS.values()),
    *(variant.ae_params for variant in VARIANTS.values()),
    SMALL.params,
    replace(SMALL.params, mlp_ratio=4.0, depth=1, depth_single_blocks=0, in_channels=128),
    replace(SMALL.params, guidance_embed=False, mlp_ratio=2.5, out_channels=48),
    replace(SMALL.ae_params, ch_mult=(1, 2), num_res_blocks=3),
    replace(SMALL.ae_params, ch_mult=(1, 2, 1, 4, 4), z_channels=4),
]


def shapes_of(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


def on_meta(params):
    with torch.device("meta"):
        return Flux(params) if isinstance(params, FluxParams) else AutoEncoder(params)


@pytest.mark.parametrize("params", SIZES, ids=range(len(SIZES)))
def test_networks_in_both_layouts(params):
    network = on_meta(params)
    assert network_shapes(params) == shapes_of(network)
    there = to_diffusers(network.state_dict(), params)
    assert network_shapes(params, "diffusers") == {name: tuple(x.shape) for name, x in there.items()}


def test_no_bias_behind_qkv():
    params = replace(SMALL.params, qkv_bias=False)
    assert network_shapes(params) == shapes_of(on_meta(params))


@pytest.mark.parametrize(
    ("kind", "config", "shapes", "part"),
    [
        (T5EncoderModel, T5Config(), t5_shapes, "t5"),
        (T5EncoderModel, T5Config(**VARIANTS["flux-dev"].t5_config), t5_shapes, "t5"),
        (T5EncoderModel, T5Config(num_heads=3, d_kv=5, relative_attention_num_buckets=7), t5_shapes, "t5"),
        (CLIPTextModel, CLIPTextConfig(), clip_shapes, "clip"),
        (CLIPTextModel, CLIPTextConfig(**VARIANTS["flux-dev"].clip_config), clip_shapes, "clip"),
        (CLIPTextModel, CLIPTextConfig(num_hidden_layers=1, max_position_embeddings=9), clip_shapes, "clip"),
    ],
)
def test_text_encoders(kind, config, shapes, part):
    """By a whole config.json, and by one that leaves out what is as transformers has it by itself."""
    with torch.device("meta"):
        theirs = shapes_of(kind(config))
    bare = dict.fromkeys(renamed(theirs, part)) if part == "clip" else {x: 0 for x in theirs if "embed_tokens" not in x}
    assert {name: theirs[name] for name in bare} == shapes(config.to_dict()) == shapes(config.to_diff_dict())


def test_the_defaults_are_transformers_own():
    assert {key: getattr(T5Config(), key) for key in T5_DEFAULTS} == T5_DEFAULTS
    assert {key: getattr(CLIPTextConfig(), key) for key in CLIP_DEFAULTS} == CLIP_DEFAULTS


@pytest.mark.parametrize("value", [None, "8", 0, -1, 2.0, True, 10**9, [8]])
def test_what_is_no_size_is_told(value):
    for shapes, key in ((t5_shapes, "num_layers"), (clip_shapes, "hidden_size")):
        with pytest.raises(ValueError, match=f"{key} is "):
            shapes({key: value})


def test_a_name_whose_place_is_taken_stays():
    ours, theirs = "double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_attn.norm.query_norm.weight"
    assert renamed([theirs, "img_in.weight"], "transformer") == {ours: theirs, "img_in.weight": "img_in.weight"}
    assert renamed([theirs, ours], "transformer") == {ours: ours, theirs: theirs}
    assert renamed([theirs], "autoencoder") == {theirs: theirs}
