"""Every dialect, as the tools themselves write it, against the official model with the difference merged in.

The files and what is expected of them: `tests/golden/lora/README.md`.
"""

import json

import pytest
import torch
from golden_files import FOLDER, distance, flux_of, read
from safetensors.torch import load_file, save_file
from torch import nn

from flux_core.lora import attach

EXPECTED = read("lora/expected")
CASES = {name: json.loads(text) for name, text in EXPECTED.metadata.items()}
APPLIED = sorted(name for name, case in CASES.items() if case.get("refuse") == "no")
TOLERANCE = 1e-5
BASE = read("lora/base")
MODEL = flux_of(BASE)


def file_of(name):
    return FOLDER / "lora" / f"{name}.safetensors"


def inputs_of(name):
    """The inputs of a file's velocity; a control LoRA has more channels."""
    inputs = BASE.group("in.")
    cond = inputs.pop("img_cond")
    return inputs | {"img": torch.cat((inputs["img"], cond), -1)} if name == "bfl_control" else inputs


def velocity(name=""):
    with torch.no_grad():
        return MODEL(**inputs_of(name))


def test_without_a_lora():
    assert distance(velocity(), BASE.tensors["out.velocity"]) < TOLERANCE


@pytest.mark.parametrize("name", APPLIED)
def test_velocity_at_two_scales(name):
    before = {key: x.clone() for key, x in MODEL.state_dict().items()}
    with attach(MODEL, file_of(name), allow_partial=name == "half_unmatched") as handle:
        assert distance(velocity(name), EXPECTED.tensors[f"{name}/out.velocity_1.0"]) < TOLERANCE
        handle.scale = 0.6
        assert distance(velocity(name), EXPECTED.tensors[f"{name}/out.velocity_0.6"]) < TOLERANCE
    after = MODEL.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], x) for key, x in before.items())


@pytest.mark.parametrize("name", APPLIED)
def test_every_weight_that_changes_has_a_branch(name):
    changed = {weight for weight in json.loads(CASES[name]["changes"]) if weight.endswith(".weight")}
    with attach(MODEL, file_of(name), allow_partial=name == "half_unmatched") as handle:
        assert {f"{layer}.weight" for layer in handle.places["transformer"]} >= changed


def test_two_at_once_in_either_order():
    expected = EXPECTED.tensors["stack/out.velocity"]
    for names in (("kohya", "xlabs"), ("xlabs", "kohya")):
        scales = {"kohya": 0.7, "xlabs": 0.4}
        handles = [attach(MODEL, file_of(name), scales[name]) for name in names]
        assert distance(velocity(), expected) < TOLERANCE
        for handle in handles:  # the first attached is the first to go
            handle.remove()
    assert distance(velocity(), BASE.tensors["out.velocity"]) < TOLERANCE


def tree(shapes):
    """Nested modules with a Linear of each shape under its dotted name."""
    root = nn.Module()
    for name, (rows, columns) in shapes.items():
        *parents, leaf = name.split(".")
        module = root
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.add_module(leaf, nn.Linear(columns, rows, bias=False).requires_grad_(False))
    return root


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("name", ["kohya", "onetrainer", "comfy"])
def test_text_encoders_get_what_was_trained(name, prefix):
    """Under the names of transformers before 5, which have `text_model.` in front of CLIP's, and of later ones."""
    start = f"{name}/delta_text."
    wanted = {"clip": {}, "t5": {}}
    for key, x in EXPECTED.group(start).items():
        network, _, weight = key.partition(".")
        wanted[network][weight.removesuffix(".weight").removeprefix("" if prefix else "text_model.")] = x
    encoders = {network: tree({key: x.shape for key, x in found.items()}) for network, found in wanted.items()}
    with attach(MODEL, file_of(name), text=encoders, allow_partial=True) as handle:  # not all of them are there
        assert "left out" not in handle.summary
        for network, found in wanted.items():
            for module, delta in found.items():
                layer = encoders[network].get_submodule(module)
                ours = layer(torch.eye(delta.shape[1])).t() - layer.base.weight
                assert distance(ours, delta) < TOLERANCE
    assert all(type(x) is nn.Linear for x in encoders["clip"].modules() if hasattr(x, "in_features"))


def test_newer_names_of_onetrainer(tmp_path):
    """Its second layout has official names, with q, k, v as .0, .1, .2 and a single block's MLP as .3; final_layer as
    the official one."""
    old = load_file(file_of("onetrainer"))
    table = {
        "norm_out_linear": None,  # its halves are in the other order there
        "context_embedder": "txt_in",
        "proj_out": "final_layer.linear",
    }
    for side, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        for i, part in enumerate(parts):
            for block in range(2):
                table[f"transformer_blocks_{block}_attn_{part}"] = f"double_blocks.{block}.{side}_attn.qkv.{i}"
    for block in range(3):
        for i, part in enumerate(("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")):
            table[f"single_transformer_blocks_{block}_{part}"] = f"single_blocks.{block}.linear1.{i}"
        table[f"single_transformer_blocks_{block}_proj_out"] = f"single_blocks.{block}.linear2"
        table[f"single_transformer_blocks_{block}_norm_linear"] = f"single_blocks.{block}.modulation.lin"
    kept, new = {}, {}
    for key, x in old.items():
        stem, _, ending = key.removeprefix("lora_transformer_").partition(".")
        if key.startswith("lora_transformer_") and table.get(stem):
            kept[key], new[f"transformer.{table[stem]}.{ending}"] = x, x
    assert len(new) > 30
    pictures = []
    for number, tensors in enumerate((kept, new)):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        with attach(MODEL, path) as handle:
            assert "OneTrainer" in handle.summary or number
            pictures.append(velocity())
    assert torch.equal(*pictures) and distance(pictures[0], velocity()) > 0.01


@pytest.mark.parametrize(
    "names", [("bfl_control", "kohya"), ("bfl_control", "lycoris_full"), ("kohya", "lycoris_full")]
)
@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("order", [1, -1])
def test_a_wider_input_goes_with_others_in_any_order(names, order, first_out):
    """All of them train `img_in`, one makes it wider, one has a full difference to it."""
    before = {key: x.clone() for key, x in MODEL.state_dict().items()}
    wide = "bfl_control" if "bfl_control" in names else ""
    handles = {name: attach(MODEL, file_of(name)) for name in names[::order]}
    both = velocity(wide)
    handles[names[first_out]].remove()
    left = names[1 - first_out]
    assert distance(velocity(left), EXPECTED.tensors[f"{left}/out.velocity_1.0"]) < TOLERANCE
    assert distance(both, EXPECTED.tensors[f"{left}/out.velocity_1.0"]) > 1e-3
    handles[left].remove()
    after = MODEL.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], x) for key, x in before.items())
    assert MODEL.in_channels == MODEL.params.in_channels == 64
