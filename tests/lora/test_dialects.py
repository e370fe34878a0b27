"""Every dialect, as the tools themselves write it, against the official model with the difference merged in.

The files and what is expected of them: `tests/golden/lora/README.md`.
"""

import json

import pytest
import torch
from golden_files import FOLDER, distance, flux_of, read

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
