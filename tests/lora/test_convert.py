"""Conversion: no difference changes, a way back gives the same bytes, and what cannot be said is listed."""

import json
import re

import pytest
import torch
from golden_files import FOLDER, distance, flux_of, read
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flux_core.checkpoint import write_safetensors
from flux_core.lora import attach
from flux_core.lora.convert import convert
from flux_core.lora.file import read_lora
from flux_core.params import FluxParams

CASES = {name: json.loads(text) for name, text in read("lora/expected").metadata.items()}
APPLIED = sorted(name for name, case in CASES.items() if case.get("refuse") == "no")
BASE = read("lora/base")
MODEL = flux_of(BASE)
PARAMS = FluxParams(**json.loads(BASE.metadata["params"]))
DIM = PARAMS.hidden_size
DIALECTS = ("official", "diffusers", "kohya")
PARTS = {
    "double_blocks.0.img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "double_blocks.0.txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "double_blocks.0.img_mlp.0": ["ff.net.0.proj"],
}


def file_of(name):
    return FOLDER / "lora" / f"{name}.safetensors"


def converted(path, to, out):
    """The file in that dialect, written to `out`, and what was left out."""
    found = convert(read_lora(path, PARAMS), PARAMS, to)
    write_safetensors(out, found.tensors, found.metadata)
    return found.left_out


def velocity(path):
    inputs = BASE.group("in.")
    cond = inputs.pop("img_cond")
    with attach(MODEL, path, allow_partial=True), torch.no_grad():
        wide = MODEL.in_channels > inputs["img"].shape[-1]
        return MODEL(**inputs | ({"img": torch.cat((inputs["img"], cond), -1)} if wide else {}))


def same_bytes(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        x.dtype == theirs[name].dtype and x.shape == theirs[name].shape and torch.equal(bits(x), bits(theirs[name]))
        for name, x in ours.items()
    )


def bits(x):
    return x.contiguous().reshape(-1).view(torch.uint8)


LEFT_OUT = {
    "diffusers": {"aitoolkit_lokr", "comfy", "lora_mid", "lycoris_full", "lycoris_loha", "lycoris_lokr",
                  "onetrainer_dora"},
    "kohya": {"aitoolkit_lokr", "bfl_control", "lycoris_lokr", "onetrainer_dora", "peft_dora"},
    "official": {"aitoolkit_lokr", "lycoris_lokr", "onetrainer_dora", "peft_dora"},
}  # fmt: skip
"""files of which the transformer's part cannot be said whole"""


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("name", APPLIED)
def test_a_converted_file_makes_the_same_difference(name, to, tmp_path):
    left_out = converted(file_of(name), to, out := tmp_path / "out.safetensors")
    mine = [x for x in left_out if "T5" not in x and "token" not in x and "names nothing" not in x]
    assert bool(mine) == (name in LEFT_OUT[to]), left_out
    if not mine:
        assert distance(velocity(out), velocity(file_of(name))) < 1e-6


@pytest.mark.parametrize(
    ("name", "there", "back"),
    [
        ("kohya", "official", "kohya"),
        ("comfy", "kohya", "official"),
        ("peft_alpha", "kohya", "diffusers"),
        ("peft_alpha", "official", "diffusers"),
        ("lycoris_dora", "diffusers", "kohya"),
        ("lycoris_loha", "official", "kohya"),
        ("lycoris_full", "official", "kohya"),
        ("half_unmatched", "diffusers", "kohya"),
    ],
)
def test_there_and_back_are_the_same_bytes(name, there, back, tmp_path):
    converted(file_of(name), there, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", back, tmp_path / "b.safetensors")
    given = load_file(file_of(name))
    unmatched = read_lora(file_of(name), PARAMS).unmatched
    given = {name: x for name, x in given.items() if not name.startswith(unmatched)}
    assert same_bytes(load_file(tmp_path / "b.safetensors"), given)


KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def split_files(draw):
    """Random modules of diffusers' dialect, on random parts of fused Linears, at random ranks, in a random dtype."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype, state = draw(KINDS), {}
    for names in PARTS.values():
        some = draw(st.lists(st.sampled_from(names), unique=True))
        unit = draw(st.sampled_from([0.5, 1.0, 2.0]))
        shared = torch.randn(draw(st.integers(1, 4)), DIM, generator=generator).to(dtype)
        same = draw(st.booleans()) and len(some) == len(names)
        for name in some:
            down = shared.clone() if same else torch.randn(draw(st.integers(1, 4)), DIM, generator=generator).to(dtype)
            rows = DIM * 4 if "ff" in name else DIM
            stem = f"transformer.transformer_blocks.0.{name}"
            state[f"{stem}.lora_A.weight"] = down
            state[f"{stem}.lora_B.weight"] = torch.randn(rows, len(down), generator=generator).to(dtype)
            state[f"{stem}.alpha"] = torch.tensor(unit * len(down), dtype=dtype)
    return state


@settings(max_examples=40, deadline=None)
@given(state=split_files(), through=st.sampled_from(["official", "kohya"]))
def test_split_modules_come_back_as_they_were(state, through, tmp_path_factory):
    if not state:
        return
    folder = tmp_path_factory.mktemp("split")
    write_safetensors(folder / "in.safetensors", state)
    assert converted(folder / "in.safetensors", through, folder / "there.safetensors") == []
    assert converted(folder / "there.safetensors", "diffusers", folder / "back.safetensors") == []
    assert same_bytes(load_file(folder / "back.safetensors"), state)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 5),
    dtype=KINDS,
    alpha=st.sampled_from([0.5, 1.0, 3.0, 16.0]),
    names=st.lists(
        st.sampled_from(["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "final_layer.adaLN_modulation.1"]),
        unique=True,
        min_size=1,
    ),
)
def test_fused_modules_come_back_as_they_were(rank, dtype, alpha, names, tmp_path_factory):
    state, generator = {}, torch.Generator().manual_seed(rank)
    for name in names:
        rows, columns = MODEL.get_submodule(name).weight.shape
        stem = "lora_unet_" + name.replace(".", "_")
        state[f"{stem}.lora_down.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
        state[f"{stem}.lora_up.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
        state[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
    folder = tmp_path_factory.mktemp("fused")
    write_safetensors(folder / "in.safetensors", state)
    assert converted(folder / "in.safetensors", "diffusers", folder / "there.safetensors") == []
    assert converted(folder / "there.safetensors", "kohya", folder / "back.safetensors") == []
    assert same_bytes(load_file(folder / "back.safetensors"), state)


def two_parts(alphas, folder):
    """A file that trains q and k at rank 1, with these alphas."""
    state = {}
    for name, alpha in zip(("to_q", "to_k"), alphas, strict=True):
        stem = f"transformer.transformer_blocks.0.attn.{name}"
        state[f"{stem}.lora_A.weight"] = torch.randn(1, DIM)
        state[f"{stem}.lora_B.weight"] = torch.randn(DIM, 1)
        state[f"{stem}.alpha"] = torch.tensor(alpha)
    write_safetensors(folder / "two.safetensors", state)
    return folder / "two.safetensors"


def test_alphas_that_differ_by_a_power_of_two_go_into_the_factors(tmp_path):
    path = two_parts((1.0, 4.0), tmp_path)
    assert converted(path, "kohya", out := tmp_path / "out.safetensors") == []
    assert distance(velocity(out), velocity(path)) < 1e-6


def test_parts_of_several_dtypes_are_joined_in_one_that_holds_both(tmp_path):
    path = two_parts((1.0, 1.0), tmp_path)
    state = load_file(path)
    kinds = {"to_q": torch.float8_e4m3fn, "to_k": torch.float16}
    write_safetensors(path, {name: x.to(kinds[name.split(".")[4]]) for name, x in state.items()})
    assert converted(path, "official", out := tmp_path / "out.safetensors") == []
    assert distance(velocity(out), velocity(path)) < 1e-6


def test_other_alphas_that_differ_cannot_share_one(tmp_path):
    left_out = converted(two_parts((1.0, 3.0), tmp_path), "kohya", tmp_path / "out.safetensors")
    assert len(left_out) == 1 and "alphas that differ" in left_out[0]
    assert set(re.findall(r"to_\w", left_out[0])) == {"to_q", "to_k"}


def test_the_header_becomes_alphas_and_its_other_lines_stay(tmp_path):
    converted(file_of("peft_metadata"), "diffusers", out := tmp_path / "out.safetensors")
    lora = read_lora(out, PARAMS)
    assert "lora_adapter_metadata" not in lora.header.metadata
    assert all("alpha" in module.tensors for module in lora.modules)
    converted(file_of("kohya"), "official", out)
    assert read_lora(out, PARAMS).header.metadata == read_lora(file_of("kohya"), PARAMS).header.metadata
