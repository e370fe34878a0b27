"""Two sets of names for the same weights, and the way between them and back."""

from dataclasses import replace

import pytest
import torch
from random_model import random_weights, small_variant

from flux_core.checkpoint import from_diffusers, to_diffusers
from flux_core.errors import FileError
from flux_core.model import AutoEncoder, Flux
from flux_core.params import FluxParams
from flux_core.variants import VARIANTS

ROW = small_variant()
SIZES = [
    ROW.params,
    replace(ROW.params, mlp_ratio=4.0, depth=1, depth_single_blocks=0),
    replace(ROW.params, guidance_embed=False, mlp_ratio=2.5, in_channels=128),
    ROW.ae_params,
    replace(ROW.ae_params, ch_mult=(1, 2), num_res_blocks=3),
    replace(ROW.ae_params, ch_mult=(1, 2, 1, 4, 4)),
]


def state_of(params):
    return random_weights(Flux(params) if isinstance(params, FluxParams) else AutoEncoder(params)).state_dict()


def same_bytes(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("params", SIZES, ids=range(len(SIZES)))
def test_there_and_back_gives_the_same_bytes(params):
    state = state_of(params)
    there = to_diffusers(state, params)
    back = from_diffusers(there, params)
    assert same_bytes(back, state)
    assert same_bytes(to_diffusers(back, params), there)


@pytest.mark.parametrize(("name", "tensors"), [("flux-dev", 1160), ("flux-schnell", 1156)])
def test_nothing_of_a_full_size_model_is_copied_but_one_layer(name, tensors):
    """All but the last modulation's two tensors are views, so a 12B model is renamed for free."""
    row = VARIANTS[name]
    with torch.device("meta"):
        flux, ae = Flux(row.params).state_dict(), AutoEncoder(row.ae_params).state_dict()
    there = to_diffusers(flux, row.params)
    assert sum(x.numel() for x in there.values()) == sum(x.numel() for x in flux.values())
    assert len(there) == tensors
    moved = [name for name, x in there.items() if x._base is None and not any(x is y for y in flux.values())]
    assert moved == ["norm_out.linear.weight", "norm_out.linear.bias"]
    assert len(to_diffusers(ae, row.ae_params)) == 244


def test_the_last_modulation_swaps_its_halves():
    state = state_of(ROW.params)
    shift, scale = state["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(to_diffusers(state, ROW.params)["norm_out.linear.weight"], torch.cat((scale, shift)))


def test_the_decoder_is_counted_from_the_other_end():
    there = to_diffusers(state_of(ROW.ae_params), ROW.ae_params)
    assert "decoder.up_blocks.0.upsamplers.0.conv.weight" in there
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in there
    assert "decoder.up_blocks.3.resnets.0.conv_shortcut.weight" in there


def test_a_narrow_mlp_is_widened_with_zeros():
    there = to_diffusers(state_of(ROW.params), ROW.params)
    hidden = ROW.params.hidden_size
    for name, dim in (("transformer_blocks.0.ff.net.0.proj", 0), ("transformer_blocks.0.ff.net.2", 1)):
        weight = there[f"{name}.weight"]
        assert weight.shape[dim] == 4 * hidden
        assert not weight.narrow(dim, 3 * hidden, hidden).any()


def test_a_wider_mlp_is_not_cut_in_silence():
    there = to_diffusers(state_of(ROW.params), ROW.params)
    there["single_transformer_blocks.1.proj_out.weight"] = torch.ones_like(
        there["single_transformer_blocks.1.proj_out.weight"]
    )
    with pytest.raises(FileError, match="wider"):
        from_diffusers(there, ROW.params)


def test_names_must_be_all_there_and_no_others():
    state = state_of(ROW.params)
    del state["img_in.weight"]
    with pytest.raises(FileError, match=r"1 missing.*img_in.weight.*1 unexpected.*more"):
        to_diffusers(state | {"more": torch.ones(1)}, ROW.params)


def test_sizes_that_diffusers_cannot_hold():
    params = replace(ROW.params, mlp_ratio=5.0)
    with pytest.raises(FileError, match="mlp_ratio 5"):
        to_diffusers(state_of(params), params)
