"""Which files of a folder are a network's: the plain set beside its variants, shards, and files that end in .sft."""

import json
import shutil

import pytest
import torch
from random_model import random_weights, small_variant
from safetensors.torch import load_file, save_file

from flux_core import load_pipeline
from flux_core.checkpoint import check_files, load_flux, resolve, with_files
from flux_core.checkpoint.files import text_files
from flux_core.checkpoint.source import find_source
from flux_core.commands.info import info
from flux_core.commands.save import save
from flux_core.errors import FileError
from flux_core.model import Flux
from flux_core.variants import VARIANTS

SHARDS = ("-00001-of-00002", "-00002-of-00002")


def write(folder, *names):
    """Files with one tensor each, of the file's own name."""
    for name in names:
        save_file({name: torch.zeros(1)}, folder / name)


def index(folder, name, *shards):
    weight_map = {shard: shard for shard in shards}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


PLAIN = ("model.safetensors",)
CUT = tuple(f"model{part}.safetensors" for part in SHARDS)
FP16 = ("model.fp16.safetensors",)
FP16_CUT = tuple(f"model.fp16{part}.safetensors" for part in SHARDS)
FP16_OLD = tuple(f"model{part}.fp16.safetensors" for part in SHARDS)
INDEX, FP16_INDEX = "model.safetensors.index.json", "model.safetensors.index.fp16.json"


@pytest.mark.parametrize(
    ("there", "indices", "read"),
    [
        (PLAIN + FP16, {}, PLAIN),
        (PLAIN + FP16 + ("model.bf16.safetensors", "model.fp8-mixed.sft"), {}, PLAIN),
        (FP16, {}, FP16),
        (PLAIN + FP16_CUT, {FP16_INDEX: FP16_CUT}, PLAIN),
        (PLAIN + FP16_CUT, {}, PLAIN),
        (PLAIN + FP16_OLD, {}, PLAIN),
        (CUT + FP16, {INDEX: CUT}, CUT),
        (CUT + FP16_CUT, {INDEX: CUT, FP16_INDEX: FP16_CUT}, CUT),
        (CUT + FP16_OLD, {INDEX: CUT, FP16_INDEX: FP16_OLD}, CUT),
        (CUT + FP16_CUT, {}, CUT),
        (FP16_CUT, {FP16_INDEX: FP16_CUT}, FP16_CUT),
        (FP16_OLD, {}, FP16_OLD),
        (("ae.sft",), {}, ("ae.sft",)),
        (("ae.sft", "ae.fp16.sft"), {}, ("ae.sft",)),
        (tuple(f"flux{part}.sft" for part in SHARDS), {}, tuple(f"flux{part}.sft" for part in SHARDS)),
        (("a.sft", "b.sft"), {"flux.sft.index.json": ("a.sft", "b.sft")}, ("a.sft", "b.sft")),
        ((*PLAIN, "._model.safetensors"), {}, PLAIN),  # as macOS leaves it on other disks
    ],
)
def test_the_plain_set_is_read(tmp_path, there, indices, read):
    write(tmp_path, *there)
    for name, shards in indices.items():
        index(tmp_path, name, *shards)
    assert [header.path.name for header in find_source(tmp_path).headers] == list(read)


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (("a.safetensors", "b.safetensors"), "2 files of weights and 0 indices"),
        (("model.safetensors", "model.sft"), "2 files of weights"),
        (("model.fp16.safetensors", "model.bf16.safetensors"), "2 files of weights"),
        (("flux1-dev.safetensors", "flux1-dev-fp8.safetensors"), "2 files of weights"),
        (PLAIN + CUT, "3 files of weights"),
        (("m-00001-of-00002.safetensors", "m-00002-of-00003.safetensors"), "2 files of weights"),
        ((), "no file of weights"),
    ],
)
def test_what_is_several_sets_or_none_is_told(tmp_path, there, found):
    write(tmp_path, *there)
    with pytest.raises(FileError, match=f"is a folder with {found}.* Next: name the file itself"):
        find_source(tmp_path)


def test_a_missing_shard_of_a_variant_is_named(tmp_path):
    write(tmp_path, FP16_OLD[0])
    with pytest.raises(FileError, match=r"lacks the shard model-00002-of-00002\.fp16\.safetensors"):
        find_source(tmp_path)


def test_a_pipelines_folder_with_variants_draws_what_the_plain_files_draw(small, tmp_path, one_thread):
    pipe = save("flux-mini", "diffusers", "fp32", tmp_path / "pipe")
    fast = {"width": 32, "height": 32, "num_steps": 1, "force": True}
    wanted = load_pipeline("flux-mini", "cpu", "float32", model=pipe).generate("a pig", 1, **fast)[0].tobytes()
    for file in [*pipe.rglob("*.safetensors")]:
        half = {name: x.half() for name, x in load_file(file).items()}
        save_file(half, file.with_name(f"{file.stem}.fp16.safetensors"))
    variant = with_files("flux-mini", model=pipe)
    check_files(variant)
    assert load_pipeline(variant, "cpu", "float32").generate("a pig", 1, **fast)[0].tobytes() == wanted
    assert not list(save("flux-mini", "diffusers", "fp32", tmp_path / "again", model=pipe).rglob("*.fp16.*"))


def test_sft_files_by_flag_and_in_a_folder(small, small_root, tmp_path, monkeypatch):
    shipped, folder = small_root / "flux-mini", tmp_path / "flux"
    shutil.copytree(shipped, folder)
    for file in [*folder.rglob("*.safetensors")]:
        file.rename(file.with_suffix(".sft"))
    variant = with_files(None, model=folder)
    assert resolve(variant) == (folder / "flux-mini.sft", folder / "ae.sft")
    assert text_files(variant).t5 == folder / "t5"
    check_files(variant)
    assert with_files(None, model=folder / "flux-mini.sft").name == "flux-mini"
    assert "an autoencoder" in info(str(folder / "ae.sft"))
    out = save(None, "official", "fp32", tmp_path / "out", model=folder)
    for name in ("flux-mini", "ae", "t5/model", "clip/model"):
        assert (out / f"{name}.safetensors").read_bytes() == (shipped / f"{name}.safetensors").read_bytes()
    assert not [*out.rglob("*.sft")]


def test_the_first_official_names_tell_krea_from_dev(tmp_path, monkeypatch):
    """flux1-krea-dev.sft has dev's header: only its name says whose it is."""
    for name in ("flux-dev", "flux-dev-krea"):
        monkeypatch.setitem(VARIANTS, name, small_variant(name))
    state = random_weights(Flux(VARIANTS["flux-dev"].params)).state_dict()
    for stem, name in (("flux1-krea-dev", "flux-dev-krea"), ("flux1-dev", "flux-dev")):
        save_file(state, tmp_path / f"{stem}.sft")
        assert with_files(None, model=tmp_path / f"{stem}.sft").name == name
        (tmp_path / stem).mkdir()
        shutil.copyfile(tmp_path / f"{stem}.sft", tmp_path / stem / f"{stem}.sft")
        assert with_files(None, model=tmp_path / stem).name == name
        assert load_flux(with_files(None, model=tmp_path / stem)).img_in.weight.numel()


def test_shards_of_a_variant_are_saved_under_the_layouts_names(small, tmp_path):
    """Their index is not the one that diffusers looks for, so they are not copied as they are."""
    pipe = save("flux-mini", "diffusers", "fp32", tmp_path / "pipe")
    plain = {path.relative_to(pipe): path.read_bytes() for path in pipe.rglob("*") if path.is_file()}
    whole = pipe / "transformer" / "diffusion_pytorch_model.safetensors"
    rows, where = list(load_file(whole).items()), {}
    for i, part in enumerate(SHARDS):
        name = f"diffusion_pytorch_model.fp16{part}.safetensors"
        save_file(dict(rows[i::2]), whole.parent / name)
        where |= dict.fromkeys(dict(rows[i::2]), name)
    whole.unlink()
    (whole.parent / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": where}))
    out = save("flux-mini", "diffusers", "fp32", tmp_path / "out", model=pipe)
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == plain


@pytest.mark.parametrize("indexed", [False, True])
def test_a_tensor_in_two_shards_is_refused(tmp_path, indexed):
    for name in CUT:
        save_file({"x.weight": torch.zeros(1), name: torch.zeros(1)}, tmp_path / name)
    if indexed:
        index(tmp_path, INDEX, *CUT)
    with pytest.raises(FileError, match=rf"{CUT[1]}: tensor 'x.weight' is in {CUT[0]}, too. Next: "):
        find_source(tmp_path)
