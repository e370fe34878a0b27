"""Norms named `query_norm.weight`, as ComfyUI saves them since February 2026: the same model, in every layout."""

import json

import pytest
import torch
from random_model import random_weights, small_variant
from safetensors.torch import load_file, save_file

from flux_core.checkpoint import check_files, load_flux, with_files
from flux_core.checkpoint.identify import WHOLE
from flux_core.commands.info import info
from flux_core.commands.save import save
from flux_core.commands.verify import verify
from flux_core.errors import FileError
from flux_core.linears.formats import quantize
from flux_core.model import AutoEncoder, Flux

SMALL = small_variant()


@pytest.fixture(scope="module")
def state():
    return dict(random_weights(Flux(SMALL.params)).bfloat16().state_dict())


def newer(state):
    return {name.replace("_norm.scale", "_norm.weight"): x for name, x in state.items()}


def plain(state, folder):
    save_file(newer(state), folder / "model.safetensors")
    return folder / "model.safetensors"


def mixed(state, folder):
    """Only the single blocks, as after a merge."""
    singles = {name for name in state if name.startswith("single")}
    save_file({(newer({name: x}) if name in singles else {name: x}).popitem()[0]: x for name, x in state.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder / "model.safetensors"


def prefixed(state, folder):
    save_file({WHOLE["transformer"] + name: x for name, x in newer(state).items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def all_in_one(state, folder):
    ae = random_weights(AutoEncoder(SMALL.ae_params)).state_dict()
    others = {WHOLE["autoencoder"] + name: x for name, x in ae.items()}
    prefixed_state = {WHOLE["transformer"] + name: x for name, x in newer(state).items()}
    save_file(prefixed_state | others, folder / "model.safetensors")
    return folder / "model.safetensors"


def numbered(state, folder):
    rows = list(newer(state).items())
    for i in (0, 1):
        save_file(dict(rows[i::2]), folder / f"model-0000{i + 1}-of-00002.safetensors")
    return folder


def indexed(state, folder):
    numbered(state, folder)
    where = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("layout", [plain, mixed, prefixed, all_in_one, numbered, indexed])
@pytest.mark.parametrize("fp8", [False, True])
def test_every_layout_loads(small, state, tmp_path, layout, fp8):
    path = layout(state, tmp_path)
    variant = with_files(None, model=path)
    check_files(variant)
    plain_file = tmp_path / "ours" / "ours.safetensors"
    plain_file.parent.mkdir()
    save_file(state, plain_file)
    found, expected = (
        load_flux(with_files(None, model=x), format="fp8" if fp8 else None).state_dict() for x in (path, plain_file)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in found)
    assert "whole and finite" in verify(str(path)) and "fits: flux-mini" in info(str(path))


@pytest.mark.parametrize("scale", ["weight_scale", "scale_weight"])
def test_fp8_with_scales(small, state, tmp_path, scale):
    """The norms stay in bf16, and their new names end as those of weights with scales."""
    coded = {f"{name}.weight" for name in quantize(Flux(SMALL.params))}
    fp8 = {name: x.to(torch.float8_e4m3fn) if name in coded else x for name, x in state.items()}
    scales = {name.removesuffix("weight") + scale: torch.tensor(0.5) for name in coded}
    save_file(newer(fp8) | scales, tmp_path / "theirs.safetensors")
    save_file(fp8 | scales, tmp_path / "ours.safetensors")
    variants = [with_files(None, model=tmp_path / f"{name}.safetensors") for name in ("theirs", "ours")]
    check_files(variants[0])
    for kind in (False, True):
        found, expected = (load_flux(variant, format="fp8" if kind else None).state_dict() for variant in variants)
        assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)


@pytest.mark.parametrize("layout", [plain, prefixed, indexed])
def test_what_is_saved_has_the_layouts_names(small, state, tmp_path, layout):
    (tmp_path / "in").mkdir()
    path = layout(state, tmp_path / "in")
    out = save(None, "official", "bf16", tmp_path / "out", model=path)
    saved = load_file(out / "flux-mini.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    pipe = save(None, "diffusers", "bf16", tmp_path / "pipe", model=path)
    names = load_file(pipe / "transformer" / "diffusion_pytorch_model.safetensors")
    assert "single_transformer_blocks.0.attn.norm_q.weight" in names and not any("query_norm" in x for x in names)


def test_what_else_is_in_a_file_is_not_copied_by_save(small, state, tmp_path):
    save_file(state | {"vae.x": torch.ones(2).bfloat16()}, tmp_path / "in.safetensors")
    out = save(None, "official", "bf16", tmp_path / "out", model=tmp_path / "in.safetensors")
    assert load_file(out / "flux-mini.safetensors").keys() == state.keys()


def test_both_names_at_once_are_refused(small, state, tmp_path):
    """Which of the two counts is not ours to guess."""
    save_file(newer(state) | {name: x.clone() for name, x in state.items()}, tmp_path / "both.safetensors")
    with pytest.raises(FileError, match=r"14 unexpected \(double_blocks.0.img_attn.norm.*_norm.weight"):
        check_files(with_files(None, model=tmp_path / "both.safetensors"))
