"""`train --takes`: from pictures to an adapter by which the model sees a map or a reference."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flux_core import load_pipeline
from flux_core.main import main

ADAPTER = "pytorch_lora_weights.safetensors"
FEW = ["--data=data", "--resolution=32x32", "--rank=2", "--steps=3", "--seed=1", "--output_dir=out", "--lr=0.01",
       "--held-out=1", "--sample-prompts", "a red apple", "--sample-steps=1"]  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Pictures, and beside each another one, which metadata.jsonl names."""
    (tmp_path / "data" / "before").mkdir(parents=True)
    lines = []
    for i in range(6):
        Image.new("RGB", (40, 32), (40 * i, 255 - 40 * i, 99)).save(tmp_path / f"data/{i}.png")
        Image.new("RGB", (20, 16), (255 - 40 * i, 7, 40 * i)).save(tmp_path / f"data/before/{i}.png")
        lines.append({"file_name": f"{i}.png", "text": "make it green", "reference": f"before/{i}.png",
                      "control": [f"before/{i}.png"]})  # fmt: skip
    (tmp_path / "data/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*flags):
    return main(["train", *FEW, *flags])


@pytest.mark.parametrize("takes", ["canny", "control", "reference"])
def test_from_pictures_to_an_adapter(small, work, capsys, takes):
    assert train(f"--takes={takes}") == 0
    state = load_file(f"out/{ADAPTER}")
    wide = "transformer.x_embedder.lora_A.weight"
    assert (wide in state) == (takes != "reference")
    if wide in state:
        channels = load_pipeline("flux-mini").variant.params.in_channels
        assert state[wide].shape[1] == 2 * channels
        assert state["transformer.x_embedder.lora_B.weight"].abs().max() > 0
    for path in Path("out/latents").iterdir():
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {"0", "0.seen", "sha256"}
            assert file.get_tensor("0.seen").shape == (1, *file.get_tensor("0").shape)
    assert Path("out/ab.png").is_file()
    before = Path("out", ADAPTER).read_bytes()
    assert train(f"--takes={takes}", "--output_dir=again") == 0
    assert Path("again", ADAPTER).read_bytes() == before


def test_pictures_of_a_batch_have_as_many_references(small, work):
    """Two of one picture and one of the others do not stack."""
    path = work / "data" / "metadata.jsonl"
    first, *others = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    first["reference"] = ["before/0.png", "before/1.png"]
    path.write_text("\n".join(map(json.dumps, [first, *others])), encoding="utf-8")
    assert train("--takes=reference", "--batch=2", "--held-out=0", "--steps=4") == 0


def test_another_thing_to_see_is_another_run(small, work, capsys):
    assert train("--takes=reference") == 0
    capsys.readouterr()
    assert train("--takes=reference", "--steps=4") == 0  # of a constant rate
    assert train("--steps=4") == 2
    err = capsys.readouterr().err
    assert "was trained with" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no file", "metadata.jsonl, whose lines name a reference"),
        ("no key", "names no reference for it"),
        ("outside", "is outside of the folder"),
        ("gone", "does not exist"),
        ("damaged", "damaged picture"),
        ("two maps", "0.png has 2 maps. Next: name one for each picture"),
    ],
)
def test_what_is_missing_is_said(small, work, capsys, change, said):
    path = work / "data" / "metadata.jsonl"
    if change == "no file":
        path.unlink()
        (work / "data" / "0.txt").write_text("x", encoding="utf-8")
    elif change == "damaged":
        for file in (work / "data/before").iterdir():
            file.write_bytes(file.read_bytes()[:60])
    else:
        new = {
            "two maps": '"control": ["before/0.png", "before/1.png"], "reference"',
            "no key": '"none"', "outside": '"reference": "../x.png", "other"',
            "gone": '"reference": "y.png", "other"',
        }  # fmt: skip
        text = path.read_text(encoding="utf-8").replace('"control"', '"others"')
        path.write_text(text.replace('"reference"', new[change]), encoding="utf-8")
    assert train(f"--takes={'control' if change == 'two maps' else 'reference'}") in (2, 4)
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_model_that_sees_already_is_refused(work, capsys):
    assert train("--takes=canny", "--name=flux-mini-kontext") == 2
    assert train("--name=flux-mini-canny") == 2  # which would be given no map
    assert capsys.readouterr().err.count("sees pictures already") == 2


def test_the_input_is_wider_and_nothing_changes(small):
    from flux_core.training.seen import widen

    pipeline = load_pipeline("flux-mini")
    model, x = pipeline.model, torch.randn(1, 6, pipeline.variant.params.in_channels)
    before = model.img_in(x)
    widen(model, "canny")
    seen = torch.cat((x, torch.randn_like(x)), dim=-1)
    assert torch.equal(model.img_in(seen), before) and model.params.in_channels == model.in_channels == seen.shape[-1]
