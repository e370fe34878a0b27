"""What a file is, by the names in it."""

import pytest

from flux_core.checkpoint.identify import WHOLE, identify

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
        ({"img_in.weight": (3072,)}, "transformer", "official", ()),  # a shape that makes no sense is no reason to fall
        ({}, "other", "official", ()),
    ],
)
def test_part_layout_and_sizes(shapes, part, layout, features):
    found = identify(shapes)
    assert (found.part, found.layout, found.features, found.prefix) == (part, layout, features, "")
