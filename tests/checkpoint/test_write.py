"""Files and folders appear whole or not at all, and what is saved is what was loaded."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from flux_core.checkpoint import load_flux, write_safetensors
from flux_core.checkpoint import write as write_module
from flux_core.commands.save import save
from flux_core.errors import DiskError, UsageError
from flux_core.hub import places


def test_a_file_carries_its_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.arange(6.0).reshape(2, 3).T}, {"title": "transposed"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "title": "transposed"}
        assert torch.equal(file.get_tensor("a"), torch.arange(6.0).reshape(2, 3).T)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """safetensors alone puts metadata in another order every time."""
    state, metadata = {"b": torch.ones(3), "a": torch.arange(4).bool()}, {x: f"{x}: ü \n" for x in "hgfedcba"}
    for i in range(4):
        write_safetensors(tmp_path / str(i), state, metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
        assert torch.equal(file.get_tensor("a"), state["a"])


def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, "save_file", full)
    with pytest.raises(DiskError, match=r"cannot write .*x\.safetensors: the disk is full"):
        write_safetensors(path, {"a": torch.ones(3)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (SafetensorError("something else"), "something else"),
        (OSError(30, "Read-only file system"), "is read-only: choose another folder with --output$"),
    ],
)
def test_the_disks_answer_is_told_whoever_got_it(tmp_path, monkeypatch, error, words):
    """safetensors has an error of its own for it, with the number in its text."""
    monkeypatch.setattr(write_module, "save_file", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(DiskError, match=rf"^cannot write .*x\.safetensors: .*{words}"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})


def test_a_mistake_inside_is_not_called_a_wrong_path(tmp_path):
    with pytest.raises(ValueError, match="mine"), write_module.new_folder(tmp_path / "out"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_folder(small, tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(DiskError):
        save("flux-mini", "diffusers", "bf16", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(small, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        save("flux-mini", "official", "bf16", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("wrong", [{"format": "gguf"}, {"dtype": "int3"}, {"name": "flux-max"}])
def test_wrong_words(wrong, tmp_path):
    with pytest.raises(UsageError):
        save(**{"name": "flux-mini", "format": "official", "dtype": "bf16", "output": tmp_path / "out"} | wrong)


def test_official_files_keep_every_byte_of_the_weights(small, small_root, tmp_path):
    out = save("flux-mini", "official", "fp32", tmp_path / "empty" / "out")
    names = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert names == {p.relative_to(small_root / "flux-mini") for p in small_root.rglob("*") if p.is_file()}
    for name in ("flux-mini.safetensors", "ae.safetensors", "t5/model.safetensors", "clip/model.safetensors"):
        ours, theirs = load_file(out / name), load_file(small_root / "flux-mini" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_was_saved_loads_again(small, tmp_path, monkeypatch):
    before = load_flux(small, "cpu", torch.float16)
    save("flux-mini", "official", "fp16", tmp_path / "flux-mini")
    monkeypatch.setattr(places, "ROOTS", (tmp_path,))
    after = load_flux(small, "cpu", torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_everything_in_a_folder_is_in_its_dtype(small, tmp_path):
    out = save("flux-mini", "diffusers", "bf16", tmp_path / "out")
    for path in out.rglob("*.safetensors"):
        assert {x.dtype for x in load_file(path).values()} == {torch.bfloat16}, path
    assert json.loads((out / "text_encoder_2" / "config.json").read_text())["dtype"] == "bfloat16"


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_does_not_change_is_the_same_to_the_byte(small, small_root, tmp_path):
    """Shipped -> official; official -> diffusers -> official; diffusers -> diffusers."""
    shipped = small_root / "flux-mini"
    out = save("flux-mini", "official", "fp32", tmp_path / "official")
    for name in ("flux-mini.safetensors", "ae.safetensors", "t5/model.safetensors", "clip/model.safetensors"):
        assert (out / name).read_bytes() == (shipped / name).read_bytes(), name
    pipe = save("flux-mini", "diffusers", "fp32", tmp_path / "pipe", model=out)
    again = save("flux-mini", "diffusers", "fp32", tmp_path / "pipe-again", model=pipe)
    assert files_of(again) == files_of(pipe)
    back = save("flux-mini", "official", "fp32", tmp_path / "back", model=pipe)
    assert files_of(back) == files_of(out)


def test_narrowed_once_it_stays_so(small, tmp_path):
    """fp32 -> bf16 -> fp32 -> bf16: the second rounding finds nothing to round."""
    first = save("flux-mini", "official", "bf16", tmp_path / "a")
    wide = save("flux-mini", "diffusers", "fp32", tmp_path / "b", model=first)
    assert files_of(save("flux-mini", "official", "bf16", tmp_path / "c", model=wide)) == files_of(first)


def test_shards_are_copied_with_their_index(small, tmp_path):
    pipe = save("flux-mini", "diffusers", "fp32", tmp_path / "pipe")
    whole = pipe / "transformer" / "diffusion_pytorch_model.safetensors"
    state, where = list(load_file(whole).items()), {}
    for i in (0, 1):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        write_safetensors(whole.parent / name, dict(state[i::2]))
        where |= dict.fromkeys(dict(state[i::2]), name)
    whole.unlink()
    whole.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert files_of(save("flux-mini", "diffusers", "fp32", tmp_path / "again", model=pipe)) == files_of(pipe)
    official = save("flux-mini", "official", "fp32", tmp_path / "official", model=pipe)
    assert files_of(official) == files_of(save("flux-mini", "official", "fp32", tmp_path / "plain"))


def test_an_encoder_in_a_single_file_is_saved_with_its_configuration(small, small_root, tmp_path):
    t5 = tmp_path / "t5xxl.safetensors"
    t5.write_bytes((small_root / "flux-mini" / "t5" / "model.safetensors").read_bytes())
    out = save("flux-mini", "official", "fp32", tmp_path / "out", t5xxl=t5)
    assert files_of(out / "t5") == files_of(save("flux-mini", "official", "fp32", tmp_path / "plain") / "t5")
