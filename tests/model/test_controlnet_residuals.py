"""The residuals of ControlNets: those of diffusers with the same weights, and which block each is for."""

import json

import pytest
import torch
from controlnets import PLAIN, UNION, golden, golden_params, random_net, theirs, xlabs_params

from flux_core.checkpoint import to_diffusers
from flux_core.model.controlnet import Residuals

INPUTS = golden().group("in.")


@pytest.mark.parametrize("case", [PLAIN, UNION], ids=["plain", "union"])
def test_the_residuals_of_diffusers(case):
    found = case.net()(**INPUTS, cond=case.cond, mode=case.told.get("mode"))
    scaled = found.map(lambda x: case.told["scale"] * x)
    for kind, residuals in zip(("double", "single"), scaled, strict=True):
        expected = golden().group(f"{case.name}.out.{kind}.")
        assert len(residuals) == len(expected)
        for i, x in enumerate(residuals):
            assert torch.allclose(x, expected[str(i)], atol=1e-5, rtol=0), (kind, i)


def test_a_ControlNet_of_pixels_has_those_of_diffusers_too():
    params = xlabs_params(golden_params())
    net, other, inputs = random_net(params), theirs(params), dict(INPUTS)
    other.load_state_dict(to_diffusers(net.state_dict(), params))
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = net(**inputs, cond=pixels)
    with torch.no_grad():
        expected, none = other(
            hidden_states=inputs["img"], controlnet_cond=pixels, encoder_hidden_states=inputs["txt"],
            pooled_projections=inputs["y"], timestep=inputs["timesteps"], guidance=inputs["guidance"],
            img_ids=inputs["img_ids"][0], txt_ids=inputs["txt_ids"][0], return_dict=False,
        )  # fmt: skip
    assert none is None and not found.single and len(found.double) == len(expected) == 2
    for ours, x in zip(found.double, expected, strict=True):
        assert torch.allclose(ours, x, atol=1e-5, rtol=0)
    blank = net(**inputs, cond=torch.zeros_like(pixels))
    assert not torch.allclose(blank.double[0], found.double[0], atol=1e-3)


def test_a_union_needs_a_mode():
    with pytest.raises(ValueError, match="a union and needs the mode"):
        UNION.net()(**INPUTS, cond=UNION.cond)


def test_one_condition_is_for_all_rows():
    net, cond = PLAIN.net(), PLAIN.cond[:1]
    one, each = net(**INPUTS, cond=cond), net(**INPUTS, cond=cond.expand(2, -1, -1))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.single, each.single, strict=True))


def behind(net, counts):
    """Which of so many residuals each of the transformer's blocks gets."""
    placed = net.placed(Residuals(*([torch.tensor(i) for i in range(count)] for count in counts)))
    names = [f"double_blocks.{i}" for i in range(5)], [f"single_blocks.{i}" for i in range(4)]
    assert placed.keys() <= {*names[0], *names[1]}
    return [[int(placed[name]) for name in of_kind if name in placed] for of_kind in names]


@pytest.mark.parametrize("case", [PLAIN, UNION], ids=["plain", "union"])
def test_neighbours_share_a_residual(case):
    told = json.loads(golden().metadata["cases"])[case.name]
    found = behind(case.net(), (told["num_layers"], told["num_single_layers"]))
    assert found == [told["double_index"], told["single_index"]]


def test_those_of_pixels_take_turns():
    assert behind(random_net(xlabs_params(golden_params())), (2, 0)) == [[0, 1, 0, 1, 0], []]
