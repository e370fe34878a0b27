"""A budget of a CPU's memory: Linears that are read from their file for each product give the same pixels."""

import json
from random import Random

import pytest
import torch
from capped import Capped
from random_lora import factors, write
from torch import nn

from flux_core.checkpoint import load_flux, with_files, write_safetensors
from flux_core.checkpoint.layouts import file_state
from flux_core.commands.save import save
from flux_core.device.budget import Budget, available
from flux_core.device.file_plan import WORKSPACE, make_file_plan
from flux_core.device.memory import Picture, prompt_cache, ram
from flux_core.errors import MemoryShortage
from flux_core.hooks import Lora, Skip
from flux_core.linears.formats import quantize
from flux_core.linears.mapped import MappedLinear
from flux_core.main import main
from flux_core.pipeline import load_pipeline
from flux_core.variants import VARIANTS

FAST = {"num_steps": 2, "width": 64, "height": 32, "force": True}
MINI = VARIANTS["flux-mini"]
SMALL = "220MB"


def load(memory=None, dtype=None, **files):
    return load_pipeline("flux-mini", "cpu", dtype, memory=memory, **files)


def draw(pipeline, **fields):
    return pipeline.generate("a red apple", 1, **FAST | fields)[0].tobytes()


def mapped(pipeline):
    return [layer for part in pipeline.components for layer in part.modules() if isinstance(layer, MappedLinear)]


@pytest.mark.parametrize(
    "dtype", [None, "int8", "nf4", *(pytest.param(other, marks=pytest.mark.slow) for other in ("bfloat16", "fp8"))]
)
def test_the_pixels_are_the_same_and_no_linear_is_held(dtype):
    whole, ours = load(dtype=dtype), load(SMALL, dtype)
    assert draw(ours) == draw(whole)
    assert mapped(ours) and not mapped(whole)
    assert not any(isinstance(layer, nn.Linear) for part in ours.components for layer in part.modules())


def test_of_a_budget_in_which_all_fits_nothing_is_seen():
    assert not mapped(load("1GB")) and not mapped(load("auto"))


@pytest.mark.parametrize(("dtype", "t5"), [("float32", None), ("bfloat16", None), ("int8", None), ("nf4", "nf4")])
def test_the_plan_knows_what_is_held(dtype, t5):
    pipeline = load_pipeline("flux-mini", "cpu", dtype, t5_dtype=t5, memory=SMALL)
    held = sum(x.nbytes for part in pipeline.components for x in (*part.parameters(), *part.buffers()))
    plan = make_file_plan(MINI, 220 * 10**6, dtype, t5, Picture(256, 256))
    assert not plan.whole and plan.held - prompt_cache(MINI, 2 if dtype == "bfloat16" else 4) == pytest.approx(
        held, rel=0.02
    )


def test_what_a_layer_reads_is_what_would_have_been_loaded(tmp_path):
    """From every layout, in few bits too: read when it is used, by the same function."""
    loaded = load_flux(MINI, dtype=torch.float32)
    save("flux-mini", "diffusers", "bf16", tmp_path / "diffusers")
    few = load_flux(MINI, dtype=torch.bfloat16)
    quantize(few, "fp8")
    write_safetensors(tmp_path / "fp8.safetensors", file_state(few))
    for path in (tmp_path / "diffusers", tmp_path / "fp8.safetensors"):
        variant = with_files("flux-mini", model=path)
        whole, ours = (load_flux(variant, dtype=torch.float32, mapped=on) for on in (False, True))
        for name, layer in whole.named_modules():
            if isinstance(layer, nn.Linear):
                assert torch.equal(ours.get_submodule(name).widen(torch.float32), layer.weight)
    assert torch.equal(ours.img_in.bias, loaded.img_in.bias)


def test_plans_loras_and_guidance_are_drawn_the_same(tmp_path):
    file = str(write(tmp_path / "some.safetensors", factors(MINI.params)))
    whole, ours = load(), load(SMALL)
    for fields in (
        {"plan": [Skip(blocks="layer.1")]},
        {"plan": [Lora(file=file, scale=0.5, steps=["1"])]},
        {"negative_prompt": "a pig", "true_cfg_scale": 2.0},
    ):
        assert draw(ours, **fields) == draw(whole, **fields)


def test_below_the_smallest_budget_it_is_said_before_anything_is_loaded(capsys, monkeypatch):
    smallest = make_file_plan(MINI, 0, "float32", None, Picture(256, 256)).smallest
    plain = ["--prompt", "a", "--device", "cpu", "--memory"]
    monkeypatch.setattr("flux_core.pipeline.load.load_components", lambda *rest: pytest.fail("loaded"))
    assert main([*plain, "50MB"]) == 5
    error = capsys.readouterr().err
    assert "too little for 128x128 pixels: it takes at least 0." in error and "Next:" in error
    assert smallest < 2 * 10**8


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--num-steps", "10000"], 5, "is too little for 64x64 pixels"),  # a table of modulation grows with them
        (["--compile"], 2, "--compile needs weights that are loaded whole"),
        (["--lora-merge", "--lora", "FILE"], 2, "--lora-merge writes into bf16 or fp32 weights"),
    ],
)
def test_what_a_budget_has_no_room_for_is_said(tmp_path, capsys, flags, code, said):
    file = str(write(tmp_path / "some.safetensors", factors(MINI.params)))
    flags = [file if flag == "FILE" else flag for flag in flags]
    plain = ["--prompt", "a", "--device", "cpu", "--memory", "180MB", "--width", "64", "--height", "64", "--force"]
    assert main([*plain, *flags, "--output-dir", str(tmp_path)]) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_an_edit_is_refused_like_a_picture(tmp_path, capsys):
    flags = ["--source", "a pig", "--edit", "a red pig", "--width", "512", "--height", "512", "--device", "cpu"]
    assert main(["edit", *flags, "--memory", "200MB", "--output-dir", str(tmp_path)]) == 5
    assert "is too little for 512x512 pixels" in capsys.readouterr().err


def test_weights_that_are_loaded_whole_count():
    """A picture beside them is refused where they leave it no room, though it would fit beside a mapped file."""
    plan = make_file_plan(VARIANTS["flux-dev"], 120 * 10**9, "float32", None, Picture(4096, 4096, rows=4))
    assert plan.whole and plan.needed == plan.all + plan.at_work > plan.budget > plan.smallest


def test_the_machine_is_the_container(tmp_path, monkeypatch):
    assert available(torch.device("cpu")) <= ram()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\nfile 200000\n")
    monkeypatch.setattr("flux_core.device.budget.CGROUP", tmp_path)
    assert available(torch.device("cpu")) == 700000
    (tmp_path / "memory.max").write_text("max\n")
    assert available(torch.device("cpu")) > 10**8


def test_a_picture_that_does_not_fit_is_refused_with_what_it_takes():
    pipeline = load("250MB")
    with pytest.raises(MemoryShortage, match=r"--memory 250MB \(0\.25 GB\) is too little for 512x512 pixels"):
        pipeline.generate("a red apple", 1, width=512, height=512)
    pipeline.fallback.vae_tiling = True  # which takes less
    pipeline.placement.admit((512, 512), rows=1, steps=28)


@pytest.mark.parametrize("number", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_random_budgets_under_an_allocator_that_runs_out(number):
    """From the smallest budget on that is printed none fails, and pixels are those of a model that is there whole."""
    whole, ours, random, expected = load(), load(SMALL), Random(0), {}
    for _ in range(number):
        how = {"width": random.choice([32, 64, 128]), "height": random.choice([32, 64, 128]), "num_steps": 2}
        guided = {"negative_prompt": "a pig", "true_cfg_scale": 2.0}
        how |= random.choice([{}, {"plan": [Skip(blocks="layer.1")]}, guided])
        plan = make_file_plan(
            MINI, 0, "float32", None, Picture(how["width"], how["height"], 1 + ("negative_prompt" in how))
        )
        ours.placement.budget = Budget(random.randint(plan.smallest, 2 * plan.smallest))
        key = json.dumps(how, default=str)
        if key not in expected:
            expected[key] = draw(whole, **how)
        with Capped(ours.placement.budget.size - plan.held - WORKSPACE) as allocator:
            assert draw(ours, **how) == expected[key]
        assert not allocator.failures
        ours.prompts._kept.clear()
