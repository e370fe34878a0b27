"""The `lora` commands as a user types them: what they print, which files they leave, and how they refuse."""

from pathlib import Path

import pytest
import torch
from golden_files import FOLDER
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_core.checkpoint.shapes import flux_shapes
from flux_core.main import main
from flux_core.variants import VARIANTS

MINI = VARIANTS["flux-mini"]
LORAS = FOLDER / "lora"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def style() -> str:
    """A LoRA for flux-mini in kohya's dialect, of every Linear."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in flux_shapes(MINI.params).items():
        if len(shape) == 2:
            stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            state[f"{stem}.lora_down.weight"] = torch.randn(2, shape[1], generator=generator).half()
            state[f"{stem}.lora_up.weight"] = torch.randn(shape[0], 2, generator=generator).half()
            state[f"{stem}.alpha"] = torch.tensor(1.0).half()
    save_file(state, "style.safetensors", {"ss_trigger_words": "zzx", "long": "x" * 500})
    return "style.safetensors"


def run(capsys, *words):
    """The exit code, and what was printed to stdout and stderr."""
    code = main(["lora", *map(str, words)])
    return code, *capsys.readouterr()


def test_info_says_what_is_in_a_file_and_what_it_fits(style, capsys):
    code, out, _ = run(capsys, "info", style)
    lines = out.splitlines()
    assert code == 0 and lines[0] == f"{style}: a LoRA"
    for line in ("dialect: kohya (lora)", "ranks: 2 (74)", "alphas: 1 (74)", "words: zzx", "fits: flux-mini",
                 "modules: transformer 74 of 74 Linears", f"long: {'x' * 200}"):  # fmt: skip
        assert line in lines
    assert any(line.startswith("tensors: 222 (222 F16), ") for line in lines)
    assert main(["info", style]) == 0 and capsys.readouterr().out == out


def test_info_takes_a_trainers_folder(style, capsys):
    Path("training").mkdir()
    Path(style).rename("training/pytorch_lora_weights.safetensors")
    Path("training/optimizer.safetensors").write_bytes(b"")
    assert "fits: flux-mini\n" in run(capsys, "info", "training")[1]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("refuse_sdxl", "a LoRA for SDXL, not for FLUX.1"),
        ("refuse_flux2", "a LoRA for FLUX.2, not for FLUX.1"),
        ("refuse_wan", "a LoRA for Wan, not for FLUX.1"),
        ("bfl_control", "for a control model: img_in takes 128 features"),
        ("onetrainer", "trained tokens of prompts: <tiny> (2)"),
        ("half_unmatched", "modules that name nothing in the model (lora_unet_double_blocks_0_img_attn_gate"),
        ("aitoolkit_lokr", "dialect: diffusers/PEFT (lokr)"),
        ("peft_rslora", "alphas: 6 by the header (5)"),
        ("kohya", "fits no model: "),
    ],
)
def test_info_on_every_kind(name, line, capsys):
    code, out, _ = run(capsys, "info", LORAS / f"{name}.safetensors")
    assert code == 0 and line in out


def test_convert_there_and_back(style, capsys):
    assert run(capsys, "convert", style, "d.safetensors", "--to", "diffusers") == (0, "d.safetensors\n", "")
    assert run(capsys, "convert", "d.safetensors", "k.safetensors", "--to=kohya")[0] == 0
    given, back = load_file(style), load_file("k.safetensors")
    assert given.keys() == back.keys() and all(torch.equal(x, back[name]) for name, x in given.items())
    with safe_open("k.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ss_trigger_words": "zzx", "long": "x" * 500}


def test_what_a_dialect_cannot_say_is_refused_or_left_out(style, capsys):
    state = load_file(style) | {
        "lora_unet_nothing.lora_down.weight": torch.ones(1, 1), "lora_unet_nothing.lora_up.weight": torch.ones(1, 1),
    }  # fmt: skip
    state = {name: x for name, x in state.items() if "img_in" not in name}
    save_file(state | {"lora_unet_img_in.diff": torch.ones(256, 64)}, "more.safetensors")
    words = ["convert", "more.safetensors", "out.safetensors", "--to", "diffusers"]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and not Path("out.safetensors").exists()
    assert "2 modules that the dialect diffusers cannot say" in err and "--allow-partial" in err
    assert "lora_unet_img_in (a whole difference)" in err and "lora_unet_nothing (names nothing in the model)" in err
    code, out, err = run(capsys, *words, "--allow-partial")
    assert (code, out) == (0, "out.safetensors\n") and err.startswith("left out: 2 modules")
    assert "fits: flux-mini" in run(capsys, "info", "out.safetensors")[1]


def test_merge_and_extract_the_same_difference_again(style, capsys):
    assert run(capsys, "merge", style, "--scale", "0.1", "--dtype=fp32", "--output", "merged")[:2] == (0, "merged\n")
    words = ["--base", "flux-mini", "--tuned", "merged", "--rank", "2", "--output", "back.safetensors"]
    code, out, _ = run(capsys, "extract", *words, "--device", "cpu", "--dtype", "fp32", "--to", "diffusers")
    assert code == 0 and out.splitlines()[:2] == [
        "back.safetensors",
        "rank 2 holds 100.0000% of the squared difference of 74 Linears",
    ]
    found, given = load_file("back.safetensors"), load_file(style)
    stem, theirs = "transformer.x_embedder", "lora_unet_img_in"
    ours = found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
    product = 0.05 * given[f"{theirs}.lora_up.weight"].float() @ given[f"{theirs}.lora_down.weight"].float()
    assert torch.allclose(ours, product, atol=1e-5)
    with safe_open("back.safetensors", "pt") as file:
        assert "rank 2 holds 100.0000%" in file.metadata()["extracted"]


SDXL = LORAS / "refuse_sdxl.safetensors"
EXTRACT = ["extract", "--base=flux-mini", "--tuned=flux-mini", "--output=new.safetensors"]


@pytest.mark.parametrize(
    ("words", "code", "finding"),
    [
        (["info", "missing.safetensors"], 4, "does not exist"),
        (["info", "there.safetensors"], 4, "is no safetensors file"),
        (["convert", "style.safetensors", "new.safetensors"], 2, "--to is missing"),
        (["convert", "style.safetensors", "new.safetensors", "--to", "kohja"], 2, "not 'kohja'"),
        (["convert", "style.safetensors", "there.safetensors", "--to", "kohya"], 2, "exists already"),
        (["convert", "style.safetensors", "no/new.safetensors", "--to", "kohya"], 2, "no is no folder"),
        (["convert", "style.safetensors", "new.bin", "--to", "kohya"], 2, "end it with .safetensors"),
        (["convert", SDXL, "new.safetensors", "--to", "kohya"], 4, "a LoRA for SDXL"),
        (["convert", LORAS / "kohya.safetensors", "new.safetensors", "--to", "kohya"], 4, "not the sizes of FLUX.1"),
        (["merge", SDXL, "--output", "new"], 4, "a LoRA for SDXL"),
        (["merge", "missing.safetensors", "--output", "new"], 4, "does not exist"),
        (["merge", "style.safetensors", "--output", "full"], 2, "exists already"),
        (["merge", "style.safetensors", "--scale", "1", "2", "--output", "new"], 2, "2 values for 1 files"),
        (["merge", "style.safetensors", "--dtype", "fp8", "--output", "new"], 2, "not 'fp8'"),
        (["merge", "words.safetensors", "--output", "new"], 2, "trained tokens alone, which no weight has room for"),
        (["convert", "words.safetensors", "new.safetensors", "--to", "kohya"], 2, "which have no dialects"),
        (EXTRACT, 2, "--rank is missing"),
        ([*EXTRACT, "--rank=0"], 2, "--rank must be a whole number from 1"),
        ([*EXTRACT, "--rank=4"], 2, "are the same"),
        ([*EXTRACT, "--rank=4", "--tuned=missing"], 4, "--tuned missing does not exist"),
        ([*EXTRACT, "--rank=4", f"--tuned={SDXL}"], 4, "and no transformer"),
        ([*EXTRACT, "--rank=4", "--output=there.safetensors"], 2, "exists already"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(words, code, finding, style, capsys):
    Path("there.safetensors").write_text("not a header")
    clip, t5 = VARIANTS["flux-mini"].params.vec_in_dim, VARIANTS["flux-mini"].params.context_in_dim
    save_file({"clip_l": torch.ones(1, clip), "t5xxl": torch.ones(1, t5)}, "words.safetensors")
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(Path().rglob("*"))
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "") and err.startswith("error: ") and err.count("\n") == 1 and finding in err
    assert "Next: " in err or code == 2
    assert sorted(Path().rglob("*")) == before and Path("there.safetensors").read_text() == "not a header"


def test_verify_finds_nan_in_a_lora(style, capsys):
    state = load_file(style)
    state["lora_unet_img_in.lora_up.weight"][0, 0] = torch.nan
    save_file(state, "nan.safetensors")
    assert main(["verify", "nan.safetensors"]) == 4 and "lora_unet_img_in.lora_up" in capsys.readouterr().err
    code, _, err = run(capsys, "convert", "nan.safetensors", "out.safetensors", "--to", "official")
    assert code == 7 and "lora_unet_img_in.lora_up" in err and not Path("out.safetensors").exists()


def test_verify_knows_that_the_alpha_of_a_whole_lokr_means_nothing(capsys):
    state = {name: x.half() for name, x in load_file(LORAS / "aitoolkit_lokr.safetensors").items()}
    assert any(x.isinf().any() for x in state.values())
    save_file(state, "lokr.safetensors")
    assert main(["verify", "lokr.safetensors"]) == 0
    save_file({name: x for name, x in state.items() if "lokr_w1" not in name}, "half.safetensors")
    assert main(["verify", "half.safetensors"]) == 4 and "alpha" in capsys.readouterr().err
