"""LoRAs beside Linears of every format: the same as beside the weights that the codes stand for."""

from dataclasses import replace

import pytest
import torch
from random_lora import factors, write
from random_model import random_weights, small_variant

from flux_core.linears.formats import FORMATS, format_of, quantize
from flux_core.linears.frozen import Frozen
from flux_core.linears.gguf import GgufLinear
from flux_core.lora import attach
from flux_core.model import Flux

PARAMS = replace(
    small_variant("flux-dev").params, hidden_size=256, num_heads=4, mlp_ratio=4.0, axes_dim=(16, 24, 24), depth=1,
    depth_single_blocks=1,
)  # fmt: skip


def inputs(channels=64):
    draw = torch.Generator().manual_seed(1)
    return {
        "img": torch.randn(1, 6, channels, generator=draw), "img_ids": torch.zeros(1, 6, 3),
        "txt": torch.randn(1, 4, 24, generator=draw), "txt_ids": torch.zeros(1, 4, 3),
        "timesteps": torch.tensor([0.5]), "y": torch.randn(1, 16, generator=draw), "guidance": torch.tensor([3.5]),
    }  # fmt: skip


def models(format):
    """A model in that format, and one of the dense weights that it stands for."""
    model = random_weights(Flux(PARAMS), std=0.05)
    if format == "gguf":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and "blocks" in name:
                model.set_submodule(name, GgufLinear.of(layer, "Q4_K"))
    else:
        quantize(model, format)
    plain = random_weights(Flux(PARAMS), std=0.05)
    for name, layer in model.named_modules():
        if isinstance(layer, Frozen):
            plain.get_submodule(name).weight.data = layer.widen(torch.float32)
    assert format_of(model) == format
    return model.eval(), plain


@torch.no_grad()
def velocity(model):
    return model(**inputs(model.in_channels))


@pytest.mark.parametrize("algebra", ["lora", "dora", "control"])
@pytest.mark.parametrize("format", FORMATS)
def test_beside_codes_as_beside_their_weights(tmp_path, format, algebra):
    model, plain = models(format)
    tensors = factors(PARAMS, strength=0.5)
    if algebra == "dora":
        downs = [name for name in tensors if name.endswith("blocks.0.img_attn.proj.lora_down.weight")]
        tensors |= {x.replace("lora_down.weight", "dora_scale"): torch.full((256, 1), 0.7) for x in downs}
    if algebra == "control":
        name = "diffusion_model.img_in.lora_down.weight"
        tensors[name] = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)) / 8
    file = write(tmp_path / "x.safetensors", tensors)
    before = velocity(model)
    with attach(model, file, 0.7), attach(plain, file, 0.7):
        found, expected = velocity(model), velocity(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before if algebra != "control" else found + 1, atol=1e-2)
    assert torch.equal(velocity(model), before)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_an_input_layer_in_few_bits_is_widened_and_comes_back(tmp_path, format):
    model = random_weights(Flux(PARAMS), std=0.05)
    layer = FORMATS[format].kind.of(model.img_in)
    model.img_in = layer
    tensors = factors(PARAMS)
    tensors["diffusion_model.img_in.lora_down.weight"] = torch.randn(4, 128)
    before = velocity(model)
    with attach(model, write(tmp_path / "x.safetensors", tensors)):
        assert model.in_channels == 128 and velocity(model).isfinite().all()
    assert model.img_in is layer and torch.equal(velocity(model), before)
