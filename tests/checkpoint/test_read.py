"""From files to models: what loads, and what is said of files that do not."""

from dataclasses import replace

import pytest
import torch
from random_model import random_weights, small_variant

from flux_core.checkpoint import files as files_module
from flux_core.checkpoint import load_autoencoder, load_flux, resolve, weights_hashes, write_safetensors
from flux_core.errors import FileError
from flux_core.model import AutoEncoder, Flux

DEV = small_variant("flux-dev")


@pytest.fixture
def official(tmp_path, monkeypatch):
    """The two files of a small FLUX.1-dev, where FLUX_MODEL and FLUX_AE point; and their tensors."""
    flux, ae = random_weights(Flux(DEV.params)), random_weights(AutoEncoder(DEV.ae_params))
    for model, variable in ((flux, "FLUX_MODEL"), (ae, "FLUX_AE")):
        path = tmp_path / f"{variable}.safetensors"
        write_safetensors(path, model.state_dict())
        monkeypatch.setenv(variable, str(path))
    return flux.state_dict(), ae.state_dict()


def rewrite(tmp_path, change):
    """Put another set of tensors in the place of the transformer's."""
    state = dict(random_weights(Flux(DEV.params)).state_dict())
    write_safetensors(tmp_path / "FLUX_MODEL.safetensors", change(state) or state)


def finding(load=load_flux):
    with pytest.raises(FileError) as caught:
        load(DEV)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_official_files_load_on_the_device_in_the_dtype(official, dtype):
    for model, state in zip((load_flux(DEV, "cpu", dtype), load_autoencoder(DEV, "cpu", dtype)), official, strict=True):
        loaded = model.state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name].to(dtype)) for name in state)
        assert not any(x.is_meta or x.requires_grad for x in model.parameters())
        assert not model.training


def test_embedded_weights_are_found_beside_the_package(small, small_root):
    folder = small_root / "flux-mini"
    assert resolve(small) == (folder / "flux-mini.safetensors", folder / "ae.safetensors")
    assert load_flux(small).img_in.weight.dtype == torch.bfloat16


def test_a_variable_that_names_a_missing_file(official, monkeypatch):
    monkeypatch.setenv("FLUX_MODEL", "/nowhere/else.safetensors")
    with pytest.raises(FileError, match=r"FLUX_MODEL=/nowhere/else.safetensors does not exist"):
        resolve(DEV)


def test_a_variable_set_for_flux_dev_does_not_touch_an_embedded_model(small, small_root, monkeypatch):
    monkeypatch.setenv("FLUX_MODEL", "/nowhere/else.safetensors")
    assert resolve(small)[0] == small_root / "flux-mini" / "flux-mini.safetensors"


def test_a_variable_that_names_a_folder(official, monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX_AE", str(tmp_path))
    with pytest.raises(FileError, match=rf"FLUX_AE={tmp_path} is a folder"):
        load_autoencoder(DEV)


def test_missing_embedded_weights(small):
    with pytest.raises(FileError, match="clone the repository again"):
        resolve(replace(small, name="flux-nano"))


def test_missing_tensors_are_counted_and_five_are_named(official, tmp_path):
    def without_first_block(state):
        return {name: x for name, x in state.items() if not name.startswith("double_blocks.0.")}

    rewrite(tmp_path, without_first_block)
    text = finding()
    assert "24 missing (double_blocks.0.img_mod.lin.weight, " in text
    assert text.count("double_blocks.0.") == 5
    assert "FLUX_MODEL.safetensors" in text


def test_unexpected_and_misshapen_tensors(official, tmp_path):
    rewrite(tmp_path, lambda state: state | {"extra": torch.ones(2), "txt_in.weight": torch.ones(3, 4)})
    text = finding()
    assert "1 unexpected (extra)" in text
    assert "1 of another shape (txt_in.weight [3, 4] instead of [32, 24])" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if "guidance_in" not in k}, "FLUX.1-schnell (no guidance_in)"),
        (lambda s: s | {"img_in.weight": torch.ones(32, 384)}, "FLUX.1-Fill (img_in takes 384 features)"),
        (lambda s: s | {"img_in.weight": torch.ones(64, 64)}, "a FLUX transformer of hidden size 64"),
        (lambda s: {f"model.diffusion_model.{k}": v for k, v in s.items()}, "a file with ComfyUI's prefix"),
        (
            lambda s: {"transformer_blocks.0.attn.to_q.weight": torch.ones(1)},
            "a file in the diffusers layout",
        ),
        (lambda s: {"double_blocks.0.img_mod.lin.lora_A.weight": torch.ones(1)}, "a LoRA"),
        (lambda s: dict(AutoEncoder(DEV.ae_params).state_dict()), "an autoencoder (FLUX_AE)"),
    ],
)
def test_a_guess_at_what_the_file_is(official, tmp_path, change, words):
    rewrite(tmp_path, change)
    assert f"This looks like {words}" in finding()


def test_a_transformer_in_the_autoencoders_place(official, monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX_AE", str(tmp_path / "FLUX_MODEL.safetensors"))
    assert "This looks like a transformer (FLUX_MODEL)" in finding(load_autoencoder)


def test_a_quantized_file(official, tmp_path):
    rewrite(tmp_path, lambda state: {k: v.to(torch.float8_e4m3fn) for k, v in state.items()})
    assert "92 tensors that are no bf16, fp16 or fp32 (double_blocks.0." in finding()


def test_hashes_name_every_file_of_an_embedded_model(small, small_root):
    hashes = weights_hashes(small)
    assert list(hashes) == [
        "flux-mini.safetensors",
        "ae.safetensors",
        "t5/model.safetensors",
        "clip/model.safetensors",
    ]
    assert all(len(value) == 16 for value in hashes.values())


def test_hashes_tell_weights_apart(official, tmp_path):
    before = weights_hashes(DEV)
    rewrite(tmp_path, lambda state: state | {"img_in.bias": torch.zeros(32)})
    after = weights_hashes(DEV)
    assert before["FLUX_MODEL.safetensors"] != after["FLUX_MODEL.safetensors"]
    assert before["FLUX_AE.safetensors"] == after["FLUX_AE.safetensors"]


def test_a_large_file_is_known_by_its_header(official, monkeypatch):
    monkeypatch.setattr(files_module, "LARGE", 2**15)
    assert all(value.startswith("header:") and len(value) == 23 for value in weights_hashes(DEV).values())
