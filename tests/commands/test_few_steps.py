"""dev with a LoRA that makes it draw in few steps: one word sets LoRA, scale, steps and guidance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import fake_hub, parts_of, weights
from family_files import small_model
from PIL import Image
from random_lora import factors, write
from random_model import small_variant

from flux_core.checkpoint.files import file_hash, weights_hashes
from flux_core.checkpoint.shapes import flux_shapes
from flux_core.commands.download import download
from flux_core.commands.info import info
from flux_core.errors import UsageError
from flux_core.images.metadata import read_request
from flux_core.lora.convert import convert
from flux_core.lora.file import read_lora
from flux_core.main import main
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS, named_like, originals, plain

pytestmark = pytest.mark.usefixtures("one_thread")
CARDS = {
    "flux-dev-hyper-8": ("ByteDance/Hyper-SD", 8, 0.125, 3.5),
    "flux-dev-hyper-16": ("ByteDance/Hyper-SD", 16, 0.125, 3.5),
    "flux-dev-turbo": ("alimama-creative/FLUX.1-Turbo-Alpha", 8, 1.0, 3.5),
    "flux-dev-tdd": ("RED-AIGC/TDD", 8, 0.125, 2.0),
}
"""repository, steps, scale and guidance, by the cards on the hub"""
HYPER, TURBO = "Hyper-FLUX.1-dev-8steps-lora.safetensors", "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", CARDS)
def test_a_row_is_dev_at_what_its_card_says_and_flags_win(name):
    row, dev = VARIANTS[name], VARIANTS["flux-dev"]
    assert (row.adapter.repo, row.num_steps, row.adapter.scale, row.guidance) == CARDS[name]
    assert (row.repo, row.flow_file, row.params, row.licence) == (dev.repo, dev.flow_file, dev.params, dev.licence)
    assert row not in originals() and row not in plain()  # what fits dev fits it, and no list has dev five times
    request = GenerationRequest(name=name, prompt="x")
    assert (request.num_steps, request.guidance) == (row.num_steps, row.guidance)
    request = GenerationRequest(name=name, prompt="x", num_steps=5, guidance=1.5)
    assert (request.num_steps, request.guidance) == (5, 1.5)


def test_dev_and_the_lora_are_fetched(monkeypatch, tmp_path):
    row = VARIANTS["flux-dev-turbo"]
    files = parts_of(row) | {row.adapter.repo: {TURBO: weights(b"l" * 100), "README.md": b"x"}}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with fake_hub(files) as hub:
        paths = download(row.name, f"http://127.0.0.1:{hub.port}")
    names = [path.name for path in paths]
    assert row.flow_file in names and names[-1] == TURBO and named_like(paths[-1]) == row
    with pytest.raises(UsageError, match="of another repository"):
        download(row.name, source="modelscope")


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Words for a small flux-dev and flux-dev-hyper-8 of the same files; and a LoRA on every Linear, in diffusers'
    names, as the file of Hyper."""
    monkeypatch.chdir(tmp_path)
    small = {name: small_variant(name) for name in ("flux-dev", "flux-dev-hyper-8")}
    for name, row in small.items():
        monkeypatch.setitem(VARIANTS, name, row)
    _, files = small_model(tmp_path / "model", "flux-dev")
    params = small["flux-dev"].params
    native = write(tmp_path / "native.safetensors", factors(params, rank=4))
    lora = write(tmp_path / HYPER, convert(read_lora(native, params), params, "diffusers").tensors)
    monkeypatch.setenv("FLUX_LORA", str(lora))
    flags = [f"--{flag.replace('_', '-')}={path}" for flag, path in files.items()]
    size = ["--width=48", "--height=32", "--seed=5", "--force", "--device=cpu"]
    return [*flags, *size, "--prompt", "a red apple"], lora


def drawn(*words):
    """The pixels and the record of what a command drew."""
    folder = Path("drawn", str(len(list(Path("drawn").glob("*")))))
    assert main([*words, f"--output-dir={folder}"]) == 0
    (path,) = folder.glob("*.png")
    return np.asarray(Image.open(path)).astype(int), read_request(path)


def test_its_picture_is_that_of_dev_with_the_lora(few, capsys):
    words, lora = few
    hyper = [*words, "--name=flux-dev-hyper-8"]
    found, record = drawn(*hyper)
    same, _ = drawn(*words, "--name=flux-dev", "--lora", lora.name, "0.125", "--steps=8")
    assert np.array_equal(found, same)
    assert (record.name, record.num_steps, record.guidance, record.plan) == ("flux-dev-hyper-8", 8, 3.5, ())
    assert record.weights[HYPER] == file_hash(lora)
    whole, record = drawn(*hyper, "--lora-scale=1", "--steps=2")
    assert np.array_equal(whole, drawn(*words, "--name=flux-dev", "--lora", lora.name, "--steps=2")[0])
    assert [(entry.file, entry.scale) for entry in record.loras] == [(HYPER, 1.0)]
    err = capsys.readouterr().err
    says = f"{HYPER} is named like the LoRA of --name flux-dev-hyper-8, which sets scale 0.125, 8 steps, guidance 3.5"
    assert err.count(says) == 1 and "licence of flux-dev-hyper-8: FLUX.1 [dev] Non-Commercial License" in err


def test_lines_of_a_file_are_told_of_a_lora_once(few, capsys):
    words, lora = few
    lines = [json.dumps({"prompt": prompt, "lora": lora.name}) for prompt in ("a pear", "a plum")]
    Path("prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert main([*words[:-2], "--name=flux-dev", "--prompt-file=prompts.jsonl", "--steps=1"]) == 0
    assert capsys.readouterr().err.count("is named like the LoRA of --name flux-dev-hyper-8") == 1


def test_other_loras_go_on_top(few):
    words, lora = few
    params = VARIANTS["flux-dev"].params
    write(Path("style.safetensors"), factors(params, rank=2, seed=3, strength=0.3))
    style = ["--lora", "style.safetensors", "0.7"]
    found, record = drawn(*words, "--name=flux-dev-hyper-8", *style, "--steps=2")
    same, _ = drawn(*words, "--name=flux-dev", *style, "--lora", lora.name, "0.125", "--steps=2")
    assert np.abs(found - same).max() <= 1  # sums of two files round by their order
    assert [(entry.file, entry.scale) for entry in record.loras] == [("style.safetensors", 0.7)]


def test_info_tells_a_file_by_its_name(few):
    _, lora = few
    says = "named like that of --name flux-dev-hyper-8: scale 0.125, 8 steps, guidance 3.5"
    found = info(str(lora))
    assert "dialect: diffusers/PEFT" in found and says in found and "named like" not in info("native.safetensors")
    count = sum(len(shape) == 2 for shape in flux_shapes(VARIANTS["flux-dev"].params).values())
    assert f"transformer {count} of {count} Linears" in found


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("loras/Hyper-FLUX.1-dev-16steps-lora.safetensors", "flux-dev-hyper-16"),
        ("Hyper-FLUX.1-dev-8steps-lora-fp16.safetensors", "flux-dev-hyper-8"),
        ("FLUX.1-Turbo-Alpha.safetensors", "flux-dev-turbo"),
        ("alimama-creative/FLUX.1-Turbo-Alpha", "flux-dev-turbo"),
        (f"hub/models--alimama-creative--FLUX.1-Turbo-Alpha/snapshots/1/{TURBO}", "flux-dev-turbo"),
        (f"FLUX.1-dev/transformer/{TURBO}", None),
        ("FLUX.1-Turbo-Alpha/style.safetensors", None),
        ("flux1-canny-dev-lora.safetensors", "flux-dev-canny-lora"),
        ("flux1-redux-dev.safetensors", None),
    ],
)
def test_names_of_files(path, name):
    row = named_like(Path(path))
    assert (row and row.name) == name


def test_two_files_of_one_name_are_both_recorded(few, monkeypatch, tmp_path):
    """As diffusers calls the transformer's file, and the hub Turbo's."""
    monkeypatch.setitem(VARIANTS, "flux-dev-turbo", row := small_variant("flux-dev-turbo"))
    flow, lora = tmp_path / "transformer" / TURBO, tmp_path / "turbo" / TURBO
    for path, value in ((flow, 1.0), (lora, 2.0)):
        path.parent.mkdir()
        write(path, {"x": torch.tensor(value)})
    monkeypatch.setenv("FLUX_MODEL", str(flow))
    monkeypatch.setenv("FLUX_AE", str(tmp_path / "model" / "ae.safetensors"))
    monkeypatch.setenv("FLUX_LORA", str(lora))
    found = weights_hashes(row)
    assert (found[TURBO], found[f"lora/{TURBO}"]) == (file_hash(flow), file_hash(lora))
