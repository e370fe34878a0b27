"""Files of ControlNets: in every layout the same network, and a reason for each file that is none, or for another."""

import json
import re
from dataclasses import replace

import pytest
import torch
from controlnets import PLAIN, UNION, golden, golden_params, params_for, random_net, theirs, write_net, xlabs_params
from safetensors.torch import save_file

from flux_core.checkpoint import check_files, to_diffusers, with_files
from flux_core.checkpoint.controlnet import load_controlnet
from flux_core.checkpoint.names import network_shapes
from flux_core.commands.info import info
from flux_core.errors import FileError
from flux_core.lora.file import read_lora
from flux_core.model import ControlNet
from flux_core.params import ControlNetParams
from flux_core.variants import VARIANTS

OF = golden_params()
XLABS = xlabs_params(OF)
DEV = VARIANTS["flux-dev"].params
UNION_PRO = ControlNetParams(**{**vars(DEV), "depth": 5, "depth_single_blocks": 10, "modes": 10})


@pytest.fixture
def file(tmp_path):
    """A function that writes tensors to a file."""

    def write(state):
        save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / "x.safetensors")
        return tmp_path / "x.safetensors"

    return write


def same(net, state):
    found = net.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], x) for name, x in state.items())


def shapes_of(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


@pytest.mark.parametrize("params", [PLAIN.params, UNION.params, XLABS, UNION_PRO, xlabs_params(DEV)], ids=range(5))
def test_the_table_of_shapes_is_the_networks_own(params):
    with torch.device("meta"):
        net, other = ControlNet(params), theirs(params)
    assert network_shapes(params) == shapes_of(net)
    assert network_shapes(params, "diffusers") == shapes_of(other)


@pytest.mark.parametrize("case", [PLAIN, UNION], ids=["plain", "union"])
def test_a_file_by_diffusers_names(case, file):
    net = load_controlnet(file(case.state), dtype=torch.float32, of=OF)
    assert net.params == case.params and same(net, case.net().state_dict())
    assert not net.training and not any(x.requires_grad for x in net.parameters())


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_file_of_XLabs(layout, file):
    state = random_net(XLABS).state_dict()
    path = file(state if layout == "official" else to_diffusers(state, XLABS))
    net = load_controlnet(str(path), dtype=torch.float32, of=OF)
    assert net.params == XLABS and same(net, state)
    assert load_controlnet(path, of=OF).pos_embed_input.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("params", [UNION.params, XLABS], ids=["union", "pixels"])
def test_a_folder_of_diffusers(params, tmp_path):
    other = theirs(params)
    other.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    net = load_controlnet(tmp_path, dtype=torch.float32, of=OF)
    assert net.params == params
    written = to_diffusers(net.state_dict(), params)
    assert all(torch.equal(written[name], x) for name, x in other.state_dict().items())


def refused(path, of=OF):
    with pytest.raises(FileError) as error:
        load_controlnet(path, of=of)
    assert str(path) in str(error.value) and "Next: " in str(error.value)
    return str(error.value)


def test_other_files_are_called_by_their_names(file):
    weights = golden().group("weights.")
    assert "is a FLUX.1 transformer of hidden size 16, and no ControlNet" in refused(file(weights))
    lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 16)}
    assert "is a LoRA, which goes on top of a model, and no ControlNet" in refused(file(lora))
    assert "no kind of weights that is known here" in refused(file({"x": torch.zeros(1)}))


def test_a_ControlNet_is_no_transformer_and_no_LoRA(file):
    path = file(PLAIN.state)
    with pytest.raises(FileError, match="is a ControlNet in diffusers' layout, and no transformer"):
        check_files(with_files("flux-dev", model=path))
    with pytest.raises(FileError, match="is a ControlNet in diffusers' layout, and no LoRA"):
        read_lora(path, OF)


def test_one_for_another_transformer_names_both_sizes(file, tmp_path):
    path = file(PLAIN.state)
    assert re.search("hidden size 16 instead of 3072, width of T5's tokens 20 instead of 4096", refused(path, None))
    found = refused(path, replace(OF, vec_in_dim=768, out_channels=16))
    assert "another transformer: width of CLIP's vector 12 instead of 768, features of an image token 64 inste" in found
    config = {"_class_name": "FluxControlNetModel", "axes_dims_rope": [4, 2, 2]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "features for the axes of positions [4, 2, 2] instead of [2, 2, 4]" in refused(path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "Other"}), encoding="utf-8")
    assert load_controlnet(path, of=OF)


@pytest.mark.parametrize("lost", ["x_embedder.weight", "controlnet_x_embedder.bias", "controlnet_blocks.1.weight"])
def test_what_is_missing_is_named(file, lost):
    state = {name: x for name, x in PLAIN.state.items() if name != lost}
    assert re.search(rf"has no {lost}|1 missing \({lost}\)", refused(file(state)))


def test_what_belongs_to_none_is_named(file):
    more = {**PLAIN.state, "controlnet_blocks.7.weight": torch.zeros(16, 16), "x_embedder.scale": torch.zeros(1)}
    assert "unexpected" in (found := refused(file(more))) and "x_embedder.scale" in found


@pytest.mark.parametrize("change", [lambda x: None, lambda x: x[None], lambda x: x[:0], torch.sum])
def test_no_tensor_may_be_lost_or_of_another_shape(file, change):
    for state in (PLAIN.state, random_net(XLABS).state_dict()):
        for name in state:
            changed = {**state, name: change(state[name])}
            refused(file({name: x for name, x in changed.items() if x is not None}))


def test_info_names_the_models_that_it_goes_with(tmp_path):
    path = write_net(tmp_path / "net.safetensors", params_for(OF))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "flux-schnell", replace(VARIANTS["flux-schnell"], params=OF))
        said = info(str(path))
    assert said.startswith(f"{path}: a ControlNet in diffusers' layout\n") and said.endswith(
        "\ngoes with: flux-schnell"
    )
    said = info(str(path))
    assert "\ngoes with no model: " in said and "for another transformer: hidden size" in said
