"""Which file is which: told from the header, before torch is there and before anything is loaded."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_core.checkpoint import check_files
from flux_core.checkpoint.shapes import autoencoder_shapes, flux_shapes
from flux_core.errors import FileError
from flux_core.main import main
from flux_core.variants import VARIANTS

ROOT = Path(__file__).parents[2]


def sparse(path, shapes, dtype="BF16"):
    """A file of full-size tensors that takes no room on the disk: its bytes are a hole, so all zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def full_size(name):
    return flux_shapes(VARIANTS[name].params)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """FLUX.1-dev, schnell and Fill, and the autoencoder, at full size; a LoRA."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("flux-dev", "flux-schnell"):
        sparse(folder / f"{name}.safetensors", full_size(name))
    sparse(folder / "fill.safetensors", full_size("flux-dev") | {"img_in.weight": (3072, 384)})
    sparse(folder / "ae.safetensors", autoencoder_shapes(VARIANTS["flux-dev"].ae_params))
    save_file({"double_blocks.0.img_mod.lin.lora_A.weight": torch.zeros(1)}, folder / "lora.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "model", "ae", "finding"),
    [
        ("flux-dev", "flux-schnell", "ae", "(no guidance_in), and not flux-dev. Next: --name flux-schnell"),
        ("flux-schnell", "flux-dev", "ae", "(dev, Krea, Kontext), and not flux-schnell. Next: --name flux-dev"),
        ("flux-dev", "fill", "ae", "of FLUX.1-Fill's kind (img_in takes 384 features), and not flux-dev"),
        ("flux-dev", "ae", "ae", "is an autoencoder, and no transformer. Next: give it with --ae"),
        ("flux-dev", "flux-dev", "flux-dev", "and no autoencoder. Next: give it with --model"),
        ("flux-dev", "lora", "ae", "is a LoRA, which goes on top of a model, and no transformer"),
    ],
)  # fmt: skip
def test_row_13_another_file_than_the_name_says(checkpoints, monkeypatch, name, model, ae, finding):
    monkeypatch.setenv("FLUX_MODEL", str(checkpoints / f"{model}.safetensors"))
    monkeypatch.setenv("FLUX_AE", str(checkpoints / f"{ae}.safetensors"))
    with pytest.raises(FileError) as caught:
        check_files(VARIANTS[name])
    assert finding in str(caught.value)


def test_the_right_files_pass(checkpoints, monkeypatch):
    monkeypatch.setenv("FLUX_AE", str(checkpoints / "ae.safetensors"))
    for name in ("flux-dev", "flux-schnell"):
        monkeypatch.setenv("FLUX_MODEL", str(checkpoints / f"{name}.safetensors"))
        check_files(VARIANTS[name])


def test_a_wrong_file_is_answered_before_torch(checkpoints):
    code = (
        "import sys; from flux_core.checkpoint import check_files; from flux_core.variants import VARIANTS\n"
        "try: check_files(VARIANTS['flux-dev'])\n"
        "except Exception as error: print(type(error).__name__)\n"
        "assert 'torch' not in sys.modules"
    )
    files = {"FLUX_MODEL": checkpoints / "flux-schnell.safetensors", "FLUX_AE": checkpoints / "ae.safetensors"}
    environment = os.environ | {name: str(path) for name, path in files.items()}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "FileError\n"


def test_of_24_gigabytes_only_the_header_is_read(checkpoints, reads, capsys):
    path = checkpoints / "flux-dev.safetensors"
    assert main(["info", str(path)]) == 0
    assert 0 < sum(came for _, came in reads) < 2**20
    out = capsys.readouterr().out
    assert "a FLUX.1 transformer of FLUX.1-dev's kind (dev, Krea, Kontext)" in out
    assert f"tensors: 780 (780 BF16), {path.stat().st_size:,} bytes" in out


def test_info_of_a_folder_of_shards_and_its_metadata(tmp_path, capsys):
    for i in (1, 2):
        save_file({f"x{i}": torch.zeros(2)}, tmp_path / f"m-{i}.safetensors", {"from": f"shard {i}"})
    index = {"weight_map": {"x1": "m-1.safetensors", "x2": "m-2.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tensors: 2 (2 F32)" in out and "in 2 files" in out and "from: shard 2" in out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_row_15_verify_names_the_tensors_with_non_finite_numbers(tmp_path, capsys, value, dtype):
    path = tmp_path / "x.safetensors"
    save_file({"good": torch.ones(3), "bad": torch.tensor([1, value]).to(dtype), "whole": torch.arange(3)}, path)
    assert main(["verify", str(path)]) == 4
    assert "1 tensor(s) hold NaN or infinity (bad)" in capsys.readouterr().err


def test_verify_passes_what_is_sound_and_tells_what_is_cut(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(0)}, path)
    assert main(["verify", str(path)]) == 0
    assert "2 tensors" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(path)]) == 4
    assert "is cut off" in capsys.readouterr().err
