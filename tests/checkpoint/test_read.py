"""From files to models: what loads, and what is said of files that do not."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from random_model import random_weights, small_variant

from flux_core.checkpoint import files as files_module
from flux_core.checkpoint import load_autoencoder, load_flux, resolve, to_diffusers, weights_hashes, write_safetensors
from flux_core.checkpoint.gguf import write_gguf
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


def test_the_older_official_variables(official, monkeypatch, tmp_path):
    for new, old in (("FLUX_MODEL", "FLUX_DEV"), ("FLUX_AE", "AE")):
        monkeypatch.setenv(old, str(tmp_path / f"{new}.safetensors"))
        monkeypatch.delenv(new)
    same(official)
    monkeypatch.setenv("FLUX_MODEL", "/nowhere/else.safetensors")  # the new one comes first
    with pytest.raises(FileError, match="FLUX_MODEL=/nowhere"):
        resolve(DEV)


def test_a_variable_set_for_flux_dev_does_not_touch_an_embedded_model(small, small_root, monkeypatch):
    monkeypatch.setenv("FLUX_MODEL", "/nowhere/else.safetensors")
    assert resolve(small)[0] == small_root / "flux-mini" / "flux-mini.safetensors"


def test_a_variable_that_names_a_folder_without_weights(official, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("FLUX_AE", str(tmp_path / "empty"))
    with pytest.raises(FileError, match="empty is a folder with no file of weights"):
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
        (lambda s: {k: v for k, v in s.items() if "guidance_in" not in k}, "a FLUX.1 transformer of hidden size 32"),
        (lambda s: {"img_in.weight": torch.ones(3072, 64)}, "of FLUX.1-schnell's kind (no guidance_in)"),
        (
            lambda s: {"img_in.weight": torch.ones(3072, 384), "guidance_in.in_layer.weight": torch.ones(1)},
            "of FLUX.1-Fill's kind (img_in takes 384 features)",
        ),
        (lambda s: s | {"img_in.weight": torch.ones(64, 64)}, "a FLUX.1 transformer of hidden size 64"),
        (lambda s: {"double_blocks.0.img_mod.lin.lora_A.weight": torch.ones(1)}, "a LoRA"),
        (lambda s: dict(AutoEncoder(DEV.ae_params).state_dict()), "an autoencoder"),
        (lambda s: {"input_blocks.0.0.weight": torch.ones(1)}, "a Stable Diffusion UNet"),
        (lambda s: {"double_stream_modulation_img.lin.weight": torch.ones(1)}, "a FLUX.2 transformer"),
        (lambda s: {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}, "a T5 text encoder"),
        (lambda s: {"something": torch.ones(1)}, "no kind of weights that is known here"),
    ],
)
def test_what_a_file_is_instead(official, tmp_path, change, words):
    rewrite(tmp_path, change)
    text = finding()
    assert f"This is {words}" in text or f"a FLUX.1 transformer {words}" in text


def test_a_transformer_in_the_autoencoders_place(official, monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX_AE", str(tmp_path / "FLUX_MODEL.safetensors"))
    assert "This is a FLUX.1 transformer of hidden size 32. Next: check --name and --ae." in finding(load_autoencoder)


# Layouts -------------------------------------------------------------------------------------------


def same(official):
    """What is loaded now has the tensors of the official files, to the bit."""
    for model, state in zip(
        (load_flux(DEV, dtype=torch.float32), load_autoencoder(DEV, dtype=torch.float32)), official, strict=True
    ):
        loaded = model.state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_diffusers_pipeline_folder(official, monkeypatch, tmp_path):
    flux, ae = official
    for part, state in (("transformer", to_diffusers(flux, DEV.params)), ("vae", to_diffusers(ae, DEV.ae_params))):
        (tmp_path / "pipe" / part).mkdir(parents=True)
        write_safetensors(tmp_path / "pipe" / part / "diffusion_pytorch_model.safetensors", state)
    for variable in ("FLUX_MODEL", "FLUX_AE"):
        monkeypatch.setenv(variable, str(tmp_path / "pipe"))
    same(official)
    assert all(len(value) == 16 for value in weights_hashes(DEV).values())


def test_a_sharded_folder_with_an_index(official, monkeypatch, tmp_path):
    state = list(to_diffusers(official[0], DEV.params).items())
    folder = tmp_path / "transformer"
    folder.mkdir()
    where = {}
    for i, part in enumerate((state[::2], state[1::2])):  # q of a block in one file, its k in the other
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(folder / name, dict(part))
        where |= {tensor: name for tensor, _ in part}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    monkeypatch.setenv("FLUX_MODEL", str(folder))
    same(official)

    (folder / name).unlink()
    assert f"names the shard '{name}', which is missing" in finding()
    index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    assert "'../../x.safetensors', which is not a file beside it: it is not opened" in finding()
    index.write_text("[]")
    assert "is no index of shards" in finding()


def test_comfyuis_prefix_and_its_all_in_one_file(official, monkeypatch, tmp_path):
    flux, ae = official
    prefixed = {f"model.diffusion_model.{name}": x for name, x in flux.items()}
    write_safetensors(tmp_path / "FLUX_MODEL.safetensors", prefixed)
    same(official)

    text = {"text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": torch.ones(2)}
    whole = tmp_path / "whole.safetensors"
    write_safetensors(whole, prefixed | {f"vae.{name}": x for name, x in ae.items()} | text)
    for variable in ("FLUX_MODEL", "FLUX_AE"):
        monkeypatch.setenv(variable, str(whole))
    same(official)


def test_a_folder_of_official_files(official, monkeypatch, tmp_path):
    folder = tmp_path / "official"
    folder.mkdir()
    for variable, name in (("FLUX_MODEL", DEV.flow_file), ("FLUX_AE", DEV.ae_file)):
        (tmp_path / f"{variable}.safetensors").rename(folder / name)
        monkeypatch.setenv(variable, str(folder))
    same(official)


def test_row_10_other_precisions_are_cast_and_told_in_one_line(official, tmp_path, capsys):
    load_flux(DEV, dtype=torch.bfloat16)
    assert capsys.readouterr().err == "FLUX_MODEL.safetensors holds F32; it is read as bfloat16\n"
    load_flux(DEV, dtype=torch.float32)
    rewrite(tmp_path, lambda state: {k: v.bfloat16() for k, v in state.items()})
    load_flux(DEV, dtype=torch.float32)  # nothing is lost, so nothing is told
    assert capsys.readouterr().err == ""


def test_fp8_without_scales_stands_for_itself(official, tmp_path, capsys):
    rewrite(tmp_path, lambda state: {k: v.to(torch.float8_e4m3fn) for k, v in state.items()})
    loaded = load_flux(DEV, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], x.to(torch.float8_e4m3fn).bfloat16()) for name, x in official[0].items())
    assert "holds F8_E4M3; it is read as bfloat16" in capsys.readouterr().err


def test_a_quantized_file(official, tmp_path):
    rewrite(tmp_path, lambda state: state | {"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(3)})
    assert "quantized in a way that is not known here: double_blocks.0.img_attn.qkv.weight is F32 [96, 32]" in finding()
    rewrite(tmp_path, lambda state: {k: v.to(torch.uint8) for k, v in state.items()})
    assert "92 tensors that are no plain bf16, fp16, fp32 or fp8 (double_blocks.0." in finding()


def test_row_12_what_belongs_to_other_networks_is_left_alone(official, tmp_path):
    others = {f"{prefix}x": torch.ones(1) for prefix in ("vae.", "first_stage_model.", "model_ema.")}
    rewrite(tmp_path, lambda state: state | others)
    same(official)
    rewrite(tmp_path, lambda state: state | {"optimizer.x": torch.ones(1)})
    assert "1 unexpected (optimizer.x)" in finding()


@pytest.mark.parametrize("ending", ["safetensors", "gguf"])
def test_a_large_file_is_hashed_by_its_header_and_size(tmp_path, monkeypatch, ending):
    """In either format, and no number of it is read."""
    path, x = tmp_path / f"x.{ending}", torch.ones(2, 32)
    monkeypatch.setattr(files_module, "LARGE", 0)
    for value in (1, 2):
        if ending == "gguf":
            write_gguf(path, {"x": ("F32", (2, 32), x * value)}, {"general.architecture": "flux"})
        else:
            write_safetensors(path, {"x": x * value})
        header, size = path.read_bytes()[: -x.nbytes], str(path.stat().st_size).encode()
        assert files_module.file_hash(path) == "header:" + hashlib.sha256(header + size).hexdigest()[:16]


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
