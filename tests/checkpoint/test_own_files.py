"""A user's own files, in any layout they come in: the same weights draw the same picture."""

import json
import shutil

import pytest
from random_model import small_variant
from safetensors.torch import load_file, save_file

from flux_core import load_pipeline
from flux_core.checkpoint import check_files, with_files
from flux_core.checkpoint.files import text_files
from flux_core.checkpoint.identify import WHOLE
from flux_core.commands.save import save
from flux_core.errors import FileError, UsageError
from flux_core.main import main
from flux_core.variants import VARIANTS

FAST = {"width": 32, "height": 32, "num_steps": 1, "force": True}


@pytest.fixture
def folder(small, small_root, one_thread):
    """The small model's files, as `save --format official` and `weights/flux-mini` have them."""
    return small_root / "flux-mini"


def picture(**files):
    return load_pipeline("flux-mini", "cpu", "float32", **files).generate("a red apple", 1, **FAST)[0].tobytes()


@pytest.fixture
def wanted(folder):
    return picture()


def single_files(folder, tmp_path):
    """Four files in one place, under the names that ComfyUI's users know."""
    files = {"model": "flux-mini", "ae": "ae", "clip_l": "clip/model", "t5xxl": "t5/model"}
    for flag, name in files.items():
        shutil.copyfile(folder / f"{name}.safetensors", tmp_path / f"{flag}.safetensors")
    return {flag: tmp_path / f"{flag}.safetensors" for flag in files}


def all_in_one(folder, tmp_path):
    """ComfyUI's one file; CLIP under the names that it has there."""
    parts = {"transformer": "flux-mini", "autoencoder": "ae", "t5": "t5/model", "clip": "clip/model"}
    state = {}
    for part, name in parts.items():
        inner = "text_model." if part == "clip" else ""
        state |= {WHOLE[part] + inner + key: x for key, x in load_file(folder / f"{name}.safetensors").items()}
    save_file(state, tmp_path / "whole.safetensors")
    return {"model": tmp_path / "whole.safetensors"}


def shards_without_an_index(folder, tmp_path):
    """As DiffSynth fetches T5: numbered shards, neither index nor config.json."""
    state = list(load_file(folder / "t5" / "model.safetensors").items())
    for i in (0, 1):
        (tmp_path / "text_encoder_2").mkdir(exist_ok=True)
        save_file(dict(state[i::2]), tmp_path / "text_encoder_2" / f"model-0000{i + 1}-of-00002.safetensors")
    return {"t5xxl": tmp_path / "text_encoder_2"}


def diffusers_folder(folder, tmp_path):
    return {"model": save("flux-mini", "diffusers", "fp32", tmp_path / "pipe")}


def official_folder(folder, tmp_path):
    return {"model": save("flux-mini", "official", "fp32", tmp_path / "official")}


def comfyuis_prefix(folder, tmp_path):
    state = load_file(folder / "flux-mini.safetensors")
    save_file({WHOLE["transformer"] + key: x for key, x in state.items()}, tmp_path / "unet.safetensors")
    return {"model": tmp_path / "unet.safetensors"}


@pytest.mark.parametrize(
    "layout",
    [single_files, all_in_one, shards_without_an_index, diffusers_folder, official_folder, comfyuis_prefix],
)
def test_every_layout_of_the_same_weights_draws_the_same_picture(layout, folder, wanted, tmp_path, monkeypatch):
    files = layout(folder, tmp_path)
    check_files(with_files("flux-mini", **files))
    assert picture(**files) == wanted


def test_a_folder_gives_all_its_parts_and_a_flag_comes_first(folder, tmp_path):
    pipe = save("flux-mini", "diffusers", "fp32", tmp_path / "pipe")
    found = text_files(with_files("flux-mini", model=pipe))
    assert found == (pipe / "text_encoder_2", pipe / "tokenizer_2", pipe / "text_encoder", pipe / "tokenizer")
    t5 = folder / "t5" / "model.safetensors"
    found = text_files(with_files("flux-mini", model=pipe, t5xxl=t5))
    assert (found.t5, found.t5_tokenizer) == (t5, pipe / "tokenizer_2")


def test_a_folder_in_flux_model_gives_the_text_encoders_too(small, one_thread, tmp_path, monkeypatch):
    """ModelScope's folder, or a clone of the hub's: no network is asked for anything."""
    dev = small_variant("flux-dev")
    monkeypatch.setitem(VARIANTS, "flux-dev", dev)
    pipe = save("flux-mini", "diffusers", "fp32", tmp_path / "pipe")
    monkeypatch.setenv("FLUX_MODEL", str(pipe))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert text_files(dev).t5 == pipe / "text_encoder_2"
    assert load_pipeline("flux-dev", "cpu", "float32").generate("a red apple", 1, **FAST)[0].size == (32, 32)


def test_the_command_takes_them_and_the_picture_says_whose_they_were(folder, tmp_path, capsys):
    files = single_files(folder, tmp_path)
    flags = [f"--{flag}={path}" for flag, path in files.items()]
    size = ["--width=32", "--height=32", "--steps=1", "--force", "--seed=1", f"--output_dir={tmp_path}"]
    assert main(["--prompt", "a red apple", *flags, *size]) == 0
    assert main(["info", str(tmp_path / "flux-mini_seed1.png")]) == 0
    out = capsys.readouterr().out
    record = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert list(record["weights"]) == [
        "model.safetensors",
        "ae.safetensors",
        "t5/t5xxl.safetensors",
        "clip/clip_l.safetensors",
    ]


def test_the_models_name_is_read_from_its_header(folder):
    assert with_files(None, model=folder).name == "flux-mini"
    assert with_files(None, model=folder / "flux-mini.safetensors").name == "flux-mini"
    assert with_files(None, model="flux-schnell") == VARIANTS["flux-schnell"]
    assert with_files() == VARIANTS["flux-mini"]


def test_files_of_one_header_are_told_by_their_names(tmp_path, monkeypatch):
    """Krea is dev with other weights: nothing in the header says so."""
    for name in ("flux-dev", "flux-dev-krea"):
        monkeypatch.setitem(VARIANTS, name, small_variant(name))
    shapes = {"img_in.weight": (32, 64), "guidance_in.in_layer.weight": (32, 256)}
    from torch import zeros

    for file, name in (("flux1-krea-dev", "flux-dev-krea"), ("flux1-dev", "flux-dev"), ("another", "flux-dev")):
        save_file({key: zeros(shape) for key, shape in shapes.items()}, tmp_path / f"{file}.safetensors")
        assert with_files(None, model=tmp_path / f"{file}.safetensors").name == name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"t5xxl": "clip/model"}, "is a CLIP text encoder, and no T5 text encoder. Next: give it with --clip-l."),
        ({"clip_l": "t5/model"}, "is a T5 text encoder, and no CLIP text encoder. Next: give it with --t5xxl."),
        ({"model": "ae"}, "is an autoencoder, and no transformer"),
        ({"ae": "nowhere"}, "nowhere.safetensors does not exist. Next: give a safetensors file or a folder."),
    ],
)
def test_a_wrong_part_is_told_by_its_header(folder, flags, words):
    flags = {flag: folder / f"{name}.safetensors" for flag, name in flags.items()}
    with pytest.raises(FileError) as caught:
        check_files(with_files("flux-mini", **flags))
    assert words in str(caught.value)


def test_two_names_and_no_transformer(folder, tmp_path):
    with pytest.raises(UsageError, match=r"no part 't5_xxl': there are model, ae, t5xxl, clip_l\. Did you mean t5xxl"):
        load_pipeline("flux-mini", t5_xxl="t5.safetensors")
    with pytest.raises(UsageError, match="--name flux-dev and --model flux-schnell are two models"):
        with_files("flux-dev", model="flux-schnell")
    with pytest.raises(FileError, match=r"is an autoencoder, and no transformer of .*Next: give it with --ae\."):
        with_files(None, model=folder / "ae.safetensors")
    with pytest.raises(
        FileError, match=r"flux-devv does not exist. Next: give a safetensors file, a folder, or a name"
    ):
        with_files(None, model="flux-devv")


def test_a_missing_numbered_shard_is_named(folder, tmp_path):
    t5 = shards_without_an_index(folder, tmp_path)["t5xxl"]
    (t5 / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileError, match=r"lacks the shard model-00002-of-00002\.safetensors"):
        check_files(with_files("flux-mini", t5xxl=t5))


def test_the_official_text_encoders_sizes_stand_in_the_table():
    """Bare t5xxl and clip_l files carry no configuration. Sizes: the two encoders' published parameter counts."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    dev = VARIANTS["flux-dev"]
    with torch.device("meta"):
        t5, clip = T5EncoderModel(T5Config(**dev.t5_config)), CLIPTextModel(CLIPTextConfig(**dev.clip_config))
    assert sum(p.numel() for p in t5.parameters()) == dev.t5_size.all
    assert sum(p.numel() for p in clip.parameters()) == dev.clip_size.all
    assert (t5.config.d_model, clip.config.hidden_size) == (dev.params.context_in_dim, dev.params.vec_in_dim)
