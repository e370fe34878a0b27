"""Merging: the model that is written computes what the model with the LoRA attached does, and is rounded once."""

import json
from pathlib import Path

import pytest
import torch
from golden_files import FOLDER, distance, flux_of, read
from safetensors.torch import load_file, save_file

from flux_core.checkpoint import load_flux, with_files
from flux_core.checkpoint.shapes import flux_shapes
from flux_core.commands.lora import merge
from flux_core.errors import FileError, NonFiniteError, UsageError
from flux_core.lora import attach
from flux_core.lora.file import read_lora
from flux_core.lora.merge import merging
from flux_core.params import FluxParams
from flux_core.variants import VARIANTS

CASES = {name: json.loads(text) for name, text in read("lora/expected").metadata.items()}
MERGED = sorted(name for name, x in CASES.items() if x.get("refuse") == "no" and name != "bfl_control")
BASE = read("lora/base")
MINI = VARIANTS["flux-mini"]


@pytest.mark.parametrize("name", MERGED)
def test_merged_weights_draw_as_the_attached_lora_does(name):
    params = FluxParams(**json.loads(BASE.metadata["params"]))
    lora = read_lora(FOLDER / "lora" / f"{name}.safetensors", params)
    model = flux_of(BASE)
    with merging([lora], [0.6]) as changes:
        state = model.state_dict()
        model.load_state_dict(state | {x: change(state[x]) for x, change in changes["transformer"].items()})
    inputs = BASE.group("in.")
    del inputs["img_cond"]
    with torch.no_grad():
        assert distance(model(**inputs), read("lora/expected").tensors[f"{name}/out.velocity_0.6"]) < 1e-5


def random_lora(path: Path, seed=0, text=False) -> Path:
    """A LoRA for flux-mini: every tenth Linear, and a module of each text encoder."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {x.removesuffix(".weight"): y for x, y in flux_shapes(MINI.params).items() if len(y) == 2}
    keys = {"lora_unet_" + name.replace(".", "_"): shapes[name] for name in sorted(shapes)[::10]}
    if text:
        keys["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"] = CLIP.shape
        keys["lora_te3_encoder_block_0_layer_0_SelfAttention_q"] = T5.shape
    state = {}
    for stem, (rows, columns) in keys.items():
        state[f"{stem}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
        state[f"{stem}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) / 10
        state[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(state, path)
    return path


WEIGHTS = Path(__file__).parents[2] / "weights" / "flux-mini"
CLIP_NAME, T5_NAME = "encoder.layers.0.self_attn.q_proj.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"
_CLIP = load_file(WEIGHTS / "clip" / "model.safetensors")
CLIP_NAME = next(name for name in _CLIP if name.endswith(CLIP_NAME))
CLIP, T5 = _CLIP[CLIP_NAME], load_file(WEIGHTS / "t5" / "model.safetensors")[T5_NAME]


@pytest.mark.parametrize("format", ["official", "diffusers"])
def test_a_merged_model_is_loaded_and_draws_as_attached(format, tmp_path):
    loras = [random_lora(tmp_path / f"{seed}.safetensors", seed, seed == 0) for seed in (0, 1)]
    folder = merge(loras, "flux-mini", [0.8, -0.5], format=format, dtype="fp32", output=tmp_path / "out")
    merged = load_flux(with_files("flux-mini", model=folder), dtype=torch.float32)
    model = load_flux(MINI, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "img": torch.randn(1, 4, 64, generator=generator),
        "img_ids": torch.zeros(1, 4, 3),
        "txt": torch.randn(1, 3, 256, generator=generator),
        "txt_ids": torch.zeros(1, 3, 3),
        "timesteps": torch.tensor([0.5]),
        "y": torch.randn(1, 128, generator=generator),
        "guidance": torch.tensor([3.5]),
    }
    with torch.no_grad(), attach(model, loras[0], 0.8), attach(model, loras[1], -0.5):
        expected = model(**inputs)
        assert distance(merged(**inputs), expected) < 1e-5
        assert distance(load_flux(MINI, dtype=torch.float32)(**inputs), expected) > 1e-3
    clip, t5 = ("text_encoder", "text_encoder_2") if format == "diffusers" else ("clip", "t5")
    state = load_file(loras[0])
    for file, name, before, stem in ((clip, CLIP_NAME, CLIP, "lora_te1_"), (t5, T5_NAME, T5, "lora_te3_")):
        mine = {key.split(".")[-2]: x for key, x in state.items() if key.startswith(stem)}
        after = load_file(folder / file / "model.safetensors")[name]
        assert distance(after, before.float() + 0.8 * 0.5 * (mine["lora_up"] @ mine["lora_down"])) < 1e-6


def test_it_rounds_once(tmp_path):
    path = random_lora(tmp_path / "a.safetensors")
    folder = merge([path], "flux-mini", [1.0], format="official", dtype="bf16", output=tmp_path / "out")
    weights, state = load_flux(MINI, dtype=torch.float32).state_dict(), load_file(path)
    merged = load_file(folder / MINI.flow_file)
    lora = read_lora(path, MINI.params)
    for module in lora.modules:
        up, down = (state[module.tensors[role]] for role in ("up", "down"))
        whole = weights[f"{module.target.module}.weight"] + (up * 0.5) @ down
        assert torch.equal(merged[f"{module.target.module}.weight"], whole.bfloat16())
    changed = {f"{module.target.module}.weight" for module in lora.modules}
    assert all(torch.equal(x.float(), weights[name]) for name, x in merged.items() if name not in changed)


def test_what_cannot_be_merged_leaves_no_folder(tmp_path):
    path, out = random_lora(tmp_path / "a.safetensors"), tmp_path / "out"
    state = load_file(path)
    control = {"diffusion_model.img_in.lora_A.weight": torch.ones(1, 128),
               "diffusion_model.img_in.lora_B.weight": torch.ones(256, 1)}  # fmt: skip
    save_file(control, tmp_path / "control.safetensors")
    save_file({k: x * torch.nan for k, x in state.items() if "alpha" not in k}, tmp_path / "nan.safetensors")
    unknown = {f"lora_unet_nothing.lora_{x}.weight": torch.ones(1, 1) for x in ("up", "down")}
    save_file(state | unknown, tmp_path / "more.safetensors")
    for file, error, text in (
        ("control", UsageError, "is for a control model"),
        ("nan", NonFiniteError, "NaN or infinity"),
        ("more", FileError, "--allow-partial"),
    ):
        with pytest.raises(error, match=text):
            merge([tmp_path / f"{file}.safetensors"], "flux-mini", [1.0], output=out)
    with pytest.raises(UsageError, match="2 values for 1 files"):
        merge([path], "flux-mini", [1.0, 2.0], output=out)
    with pytest.raises(UsageError, match="must be a number"):
        merge([path], "flux-mini", ["nan"], output=out)
    assert not out.exists() and not list(tmp_path.glob(".out*"))
