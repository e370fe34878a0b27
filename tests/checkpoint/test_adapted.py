"""A variant that ships as another one and a LoRA: one file, the same as the LoRA beside the other."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flux_core import load_pipeline
from flux_core.checkpoint import load_flux
from flux_core.checkpoint.files import flow_path
from flux_core.hub.places import shipped_folder
from flux_core.lora import read_lora
from flux_core.lora.merge import merging
from flux_core.main import main
from flux_core.variants import VARIANTS

FAST = VARIANTS["flux-mini-fast"]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path


def test_its_weights_are_those_that_lora_merge_writes(own_cache):
    found, base = load_file(flow_path(FAST)), load_flux(VARIANTS["flux-mini"]).state_dict()
    assert found.keys() == base.keys() and {x.dtype for x in found.values()} == {torch.bfloat16}
    with merging([read_lora(shipped_folder(FAST.name), FAST.params)], [1.0]) as changes:
        for name, x in base.items():
            change = changes["transformer"].get(name)
            expected = x if change is None else change(x.float()).bfloat16()
            # sums in fp64 and fp32 may lie on two sides of a step of bf16
            torch.testing.assert_close(found[name], expected, rtol=2**-7, atol=1e-6)
            assert (found[name] == expected).float().mean() > 0.999
        assert set(changes) == {"transformer"} and changes["transformer"].keys() <= base.keys()


def test_it_is_written_once_and_again_to_the_byte(own_cache):
    path = flow_path(FAST)
    before, data = path.stat().st_mtime_ns, path.read_bytes()
    assert path.is_relative_to(own_cache) and path.name == FAST.flow_file
    assert flow_path(FAST) == path and path.stat().st_mtime_ns == before
    path.unlink()
    assert flow_path(FAST).read_bytes() == data


@pytest.mark.slow
def test_four_steps_are_nearer_to_28_than_those_of_the_other(own_cache):
    far = {"flux-mini": [], "flux-mini-fast": []}
    pipelines = {name: load_pipeline(name, "cpu") for name in far}
    for seed, prompt in enumerate(("a fox", "a red apple", "a cat to the left of a dog")):
        wanted, *found = (
            np.asarray(pipeline.generate(prompt, seed, num_steps=steps, width=128, height=128)[0], np.float32)
            for pipeline, steps in ((pipelines["flux-mini"], 28), *((one, 4) for one in pipelines.values()))
        )
        for name, x in zip(far, found, strict=True):
            far[name].append(float(np.square(x - wanted).mean()))
    assert sum(far["flux-mini-fast"]) < sum(far["flux-mini"])


def test_where_nothing_can_be_written_it_says_which_folder(own_cache, monkeypatch, capsys, tmp_path):
    (tmp_path / "flux_core").write_text("in the way")
    assert main(["--name", "flux-mini-fast", "--prompt", "x", "--output-dir", str(tmp_path / "o")]) == 6
    assert str(tmp_path / "flux_core") in capsys.readouterr().err
