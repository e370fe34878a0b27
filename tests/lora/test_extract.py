"""Extraction: a known difference comes back, and what is held of it is what the singular values say."""

import json

import pytest
import torch
from golden_files import distance, flux_of, read
from safetensors.torch import save_file

from flux_core.checkpoint import write_safetensors
from flux_core.checkpoint.contents import find_contents
from flux_core.checkpoint.keymaps import to_diffusers
from flux_core.lora import attach
from flux_core.lora.extract import extract, low_rank, spelled
from flux_core.params import FluxParams

BASE = read("lora/base")
PARAMS = FluxParams(**json.loads(BASE.metadata["params"]))
TUNED = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "final_layer.adaLN_modulation.1")
SIZES = torch.tensor([3.0, 2.0, 1.0]) / 10
"""singular values of each difference"""


def directions(rows, count):
    return torch.linalg.qr(torch.randn(rows, count, generator=torch.Generator().manual_seed(rows))).Q


def tuned_weights():
    state = BASE.group("weights.")
    for name in TUNED:
        rows, columns = state[f"{name}.weight"].shape
        difference = directions(rows, 3) @ torch.diag(SIZES) @ directions(columns, 3).t()
        state[f"{name}.weight"] = state[f"{name}.weight"] + difference
    return state


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The transformers before, with official names, and after, with diffusers'."""
    folder = tmp_path_factory.mktemp("models")
    write_safetensors(folder / "base.safetensors", BASE.group("weights."))
    write_safetensors(folder / "tuned.safetensors", to_diffusers(tuned_weights(), PARAMS))
    return [find_contents(folder / f"{name}.safetensors", "transformer") for name in ("base", "tuned")]


def velocity(model):
    inputs = BASE.group("in.")
    del inputs["img_cond"]
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("to", ["official", "diffusers", "kohya"])
def test_the_whole_rank_gives_the_tuned_velocity(contents, to, tmp_path):
    found = extract(*contents, PARAMS, 3, torch.float32, "cpu")
    assert set(found.parts) == set(TUNED) and found.share == pytest.approx(1, abs=1e-5)
    file = spelled(found, PARAMS, to, torch.float32)
    assert file.left_out == []
    save_file(file.tensors, tmp_path / "lora.safetensors")
    tuned, model = flux_of(BASE), flux_of(BASE)
    tuned.load_state_dict(tuned_weights())
    with attach(model, tmp_path / "lora.safetensors"):
        assert distance(velocity(model), velocity(tuned)) < 1e-5
    assert distance(velocity(model), velocity(tuned)) > 1e-3


def test_a_lower_rank_holds_what_its_singular_values_are_of_all(contents):
    found = extract(*contents, PARAMS, 2, torch.float32, "cpu")
    squares = SIZES.square()
    expected = float(squares[:2].sum() / squares.sum())
    assert found.share == pytest.approx(expected, rel=1e-4)
    assert dict(found.worst()) == pytest.approx(dict.fromkeys(TUNED, expected), rel=1e-4)


def test_factors_are_balanced(contents):
    for part in extract(*contents, PARAMS, 3, torch.float32, "cpu").parts.values():
        assert torch.allclose(part.up.norm(dim=0), SIZES.sqrt(), rtol=1e-3)
        assert torch.allclose(part.down.norm(dim=1), SIZES.sqrt(), rtol=1e-3)


def test_the_iteration_finds_what_the_whole_svd_does():
    generator = torch.Generator().manual_seed(0)
    sizes = 1 / torch.arange(1, 401)
    x = directions(500, 400) @ torch.diag(sizes) @ torch.randn(400, 450, generator=generator) / 450**0.5
    up, down, held = low_rank(x, 8)
    best = torch.linalg.svdvals(x)[:8].square().sum()
    assert up.shape == (500, 8) and held == pytest.approx(float(best), rel=1e-5)
    assert float((x - up @ down).norm() ** 2) == pytest.approx(float(x.norm() ** 2 - best), rel=1e-4)


def test_biases_are_said_and_written_where_a_dialect_has_them(contents, tmp_path):
    state = BASE.group("weights.")
    state["img_in.bias"] = state["img_in.bias"] + 0.5
    state["double_blocks.0.img_attn.norm.key_norm.scale"] = state["double_blocks.0.img_attn.norm.key_norm.scale"] + 0.1
    write_safetensors(tmp_path / "biases.safetensors", state)
    found = extract(
        contents[0], find_contents(tmp_path / "biases.safetensors", "transformer"), PARAMS, 1, torch.float32, "cpu"
    )
    assert found.share_of_others == 1 and not found.parts
    assert set(spelled(found, PARAMS, "official", torch.float32).tensors) == {"diffusion_model.img_in.diff_b"}
    assert spelled(found, PARAMS, "diffusers", torch.float32).tensors == {}
