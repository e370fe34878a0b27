"""A plan is data: it goes through JSON unchanged, and errors name the entry and what is wrong with it."""

import json

import pytest
import torch

from flux_core import GenerationRequest, load_pipeline
from flux_core.errors import FileError, FluxError, UsageError
from flux_core.hooks import Add, Capture, Custom, FirstBlockCache, Replace, Scale, ShareKV, Skip, check_plan, parse_plan
from flux_core.hooks.plan import KINDS, read_plan, short_form
from flux_core.images.metadata import read_request
from flux_core.images.output import save_picture
from flux_core.main import main
from flux_core.variants import VARIANTS

DEV = VARIANTS["flux-dev"].params
EXAMPLES = [
    {"kind": "skip", "blocks": ["single_blocks.9"], "steps": ["0-14", 20]},
    {"kind": "capture", "sites": ["double_blocks.*.img.out"], "to": "out.safetensors"},
    {"kind": "attention_maps", "blocks": ["layer.15-18"], "keys": [3], "to": "maps.safetensors"},
    {
        "kind": "attention_mask",
        "blocks": ["layer.*"],
        "value": {"file": "m.safetensors", "tensor": "mask"},
        "steps": "0-9",
    },
    {"kind": "share_kv", "blocks": ["layer.0-1"], "targets": ["edit"]},
    {"kind": "scale", "sites": ["single_blocks.3.mod.gate"], "value": 0.5},
    {"kind": "add", "sites": ["vec"], "value": {"file": "d.safetensors", "tensor": "smile"}},
    {"kind": "replace", "sites": ["double_blocks.2.img.attn"], "value": 0},
    {"kind": "first_block_cache", "threshold": 0.1, "schedule": "5-9"},
    {"kind": "lora", "file": "style.safetensors", "scale": 0.8, "blocks": ["single_blocks.*"], "steps": "0-13"},
    {"kind": "custom", "fn": "my.py:brighter", "sites": ["vec"], "steps": "0-9"},
    {"kind": "wrap", "fn": "my.py:away"},
    {"kind": "sampler", "fn": "my.py:midpoint"},
    {"kind": "python", "fn": "my_method.py"},
    {"kind": "step_cache", "steps": "7-26/3"},
]


def test_there_is_an_example_of_every_kind():
    assert [entry["kind"] for entry in EXAMPLES] == list(KINDS)


def test_a_plan_goes_through_json_unchanged():
    plan = parse_plan(EXAMPLES)
    again = parse_plan(json.loads(json.dumps([one.model_dump(mode="json") for one in plan])))
    assert again == plan
    assert plan[0].steps == (*range(15), 20)


@pytest.mark.parametrize(
    ("entries", "finding"),
    [
        (
            [{"kind": "skipp", "blocks": "layer.0"}],
            "entry 1 .*no intervention 'skipp'; .*Did you mean skip",
        ),
        ([{"blocks": "layer.0"}], "entry 1 of the plan: there is no intervention None"),
        (
            [EXAMPLES[0], {"kind": "skip", "block": "layer.0"}],
            r"entry 2 .*\(skip\) has no key 'block'.*blocks",
        ),
        ([{"kind": "skip"}], "lacks 'blocks'"),
        ([{"kind": "skip", "blocks": []}], "blocks"),
        ([{"kind": "skip", "blocks": "layer.0", "steps": "x"}], "steps: 'x' is no step"),
        ([{"kind": "skip", "blocks": "layer.0", "steps": [True]}], "steps: True is no step"),
        ([{"kind": "skip", "blocks": "layer.0", "steps": "9-3"}], "no steps are selected"),
        ([{"kind": "skip", "blocks": "layer.0", "steps": "0-9/0"}], "'0-9/0' is no step"),
        ([{"kind": "skip", "blocks": "layer.0", "steps": "0-99999999"}], "'0-99999999' is no step"),
        ([{"kind": "scale", "sites": "vec", "value": "much"}], "value: 'much' is neither a number"),
        ([{"kind": "scale", "sites": "vec", "value": float("inf")}], "neither a number"),
        ([{"kind": "capture", "sites": "vec"}], "give one destination"),
        ([{"kind": "first_block_cache", "threshold": -1}], "threshold"),
        (7, "a plan is a list"),
        ([7], "entry 1"),
    ],
)
def test_what_is_no_plan_is_told_with_entry_and_nearest_word(entries, finding):
    with pytest.raises(UsageError, match=finding):
        parse_plan(entries)


@pytest.mark.parametrize(
    ("plan", "finding"),
    [
        ([Skip(blocks="single_block.9")], "no block is called 'single_block.9'.*Did you mean single_blocks.9"),
        ([Scale(sites="double_blocks.1.img.kk", value=1)], "no site is called.*Did you mean double_blocks.1.img.k"),
        ([Skip(blocks="layer.3", steps=[28])], "skip: there is no step 28, the last is 27"),
        ([FirstBlockCache(schedule="1-29/2")], "first_block_cache: there is no step 29, the last is 27"),
        ([FirstBlockCache(schedule="0-27/2")], "step 0 has none before it to repeat"),
        ([Skip(blocks="layer.3"), Skip(blocks="layer.2-4")], "skip and skip both write double_blocks.3"),
        (
            [Scale(sites="*.img.k", value=2), Replace(sites="layer.40.img.k", value=0)],
            "write single_blocks.21.img.k",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_told(plan, finding):
    with pytest.raises(UsageError, match=finding):
        check_plan(plan, DEV, 28)


def test_every_second_step_is_said_with_a_stroke():
    assert FirstBlockCache(schedule="1-7/2, 8").schedule == (1, 3, 5, 7, 8)
    assert FirstBlockCache(schedule=range(2, 9, 3)).schedule == FirstBlockCache(schedule="2-9/3").schedule == (2, 5, 8)


def test_two_writers_may_meet_at_no_step_or_where_one_follows():
    check_plan([Skip(blocks="layer.3", steps="0-4"), Skip(blocks="layer.3", steps="5-9")], DEV, 28)
    check_plan([Scale(sites="vec", value=2), Add(sites="vec", value=1, follow=True)], DEV, 28)
    check_plan([Skip(blocks="layer.3"), FirstBlockCache(follow=True)], DEV, 28)
    check_plan([ShareKV(blocks="layer.3")], DEV, 28, branches=("source", "edit"))


def test_the_short_form_is_an_entry():
    assert parse_plan([short_form("skip", "layer.3,layer.5@0-4")]) == (
        Skip(blocks=["layer.3", "layer.5"], steps="0-4"),
    )


@pytest.mark.parametrize("text", ["layer.6@", "layer.6@ ", "layer.3,layer.6 @ "])
def test_a_short_form_without_its_steps_is_refused(text):
    with pytest.raises(UsageError, match=r"--skip layer.*: no steps behind the @. Next: layer\S*\.6@0-14, "):
        short_form("skip", text)


@pytest.mark.parametrize("text", ["@3", "layer.6@0@1", "layer.6@x"])
def test_a_short_form_of_anything_else_is_refused(text):
    with pytest.raises(UsageError):
        check_plan(parse_plan([short_form("skip", text)]), DEV, 28)


@pytest.mark.parametrize(
    ("text", "error", "finding"),
    [(None, FileError, "could not be read"), ("{", UsageError, "is no JSON"), ("3", UsageError, "a plan is a list"),
     ("[" * 100_000, UsageError, "is no JSON"), (" " * 2_000_000, UsageError, "at most")],
)  # fmt: skip
def test_a_file_that_holds_no_plan_is_named(tmp_path, text, error, finding):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=f"plan.json.*{finding}"):
        read_plan(path)


# In a picture -------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(small, one_thread):
    return load_pipeline("flux-mini", "cpu")


def test_the_paths_of_a_plan_file_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    entries = [
        {"kind": "capture", "sites": ["vec"], "to": "~/seen.safetensors"},
        {"kind": "add", "sites": ["img_in"], "value": {"file": "~/smile.safetensors", "tensor": "~"}},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(entries))
    capture, add = read_plan(tmp_path / "plan.json")
    assert (capture.to, add.value.file) == (tmp_path / "seen.safetensors", tmp_path / "smile.safetensors")
    assert add.value.tensor == "~"
    (tmp_path / "plan.json").write_text(json.dumps([entries[0] | {"to": "~nobody_has_this_name/x"}]))
    with pytest.raises(UsageError, match=r"plan\.json: to ~nobody_has_this_name/x: there is no such home folder"):
        read_plan(tmp_path / "plan.json")


def test_a_picture_keeps_its_plan_and_repeats_with_it(pipeline, tmp_path):
    plan = [Skip(blocks="layer.1", steps="0-1"), Scale(sites="vec", value=0.5)]
    image = pipeline.generate("a red apple", seed=1, num_steps=3, plan=plan)[0]
    request = read_request(save_picture(image, tmp_path, "one"))
    assert request.plan == tuple(plan)
    assert pipeline.generate(request)[0].tobytes() == image.tobytes()
    assert pipeline.generate("a red apple", seed=1, num_steps=3)[0].tobytes() != image.tobytes()


def test_an_empty_plan_draws_the_same_picture(pipeline):
    plain = pipeline.generate("a red apple", seed=1, num_steps=2)[0]
    assert pipeline.generate("a red apple", seed=1, num_steps=2, plan=[])[0].tobytes() == plain.tobytes()


def test_metadata_name_what_they_cannot_hold_and_no_file(pipeline, tmp_path):
    def dim(x, at):
        return 0.5 * x

    plan = [
        Custom(sites="vec", fn=dim),
        Add(sites="img_in", value=torch.zeros(1)),
        Capture(sites="velocity", to=tmp_path / "seen.safetensors"),
        Skip(blocks="layer.1"),
    ]
    image = pipeline.generate("a red apple", seed=1, num_steps=2, plan=plan)[0]
    request = read_request(save_picture(image, tmp_path, "one"))
    assert request.plan == (Skip(blocks="layer.1"),)
    assert request.functions == ("add a tensor at img_in", "dim at vec")
    assert (tmp_path / "seen.safetensors").exists() and "seen" not in image.info["flux_core"]


@pytest.mark.parametrize("entry", [EXAMPLES[1], EXAMPLES[5]], ids=["writes", "reads"])
def test_a_picture_cannot_make_us_read_or_write_files(pipeline, tmp_path, entry):
    image = pipeline.generate("a red apple", seed=1, num_steps=2)[0]
    fields = json.loads(image.info["flux_core"]) | {"plan": [entry]}
    image.info["flux_core"] = json.dumps(fields)
    with pytest.raises(FluxError):
        read_request(save_picture(image, tmp_path, "one"))


def test_the_plan_of_a_request_is_checked_against_its_model():
    with pytest.raises(UsageError, match=r"no block is called 'layer\.40'"):
        GenerationRequest(prompt="a", plan=[Skip(blocks="layer.40")])
    assert GenerationRequest(name="flux-dev", prompt="a", plan=[Skip(blocks="layer.40")]).plan


# On the command line --------------------------------------------------------------------------------------


def test_the_command_draws_with_a_plan_file_and_short_forms(small, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps([{"kind": "scale", "sites": ["vec"], "value": 0.9}]))
    flags = ["--prompt", "a", "--num_steps", "2", "--seed", "1", "--output_dir", str(tmp_path)]
    assert main([*flags, "--plan", str(tmp_path / "plan.json"), "--skip", "layer.0@1", "layer.2"]) == 0
    request = read_request(tmp_path / "flux-mini_seed1.png")
    assert [one.kind for one in request.plan] == ["scale", "skip", "skip"]
    assert "plan: scale, skip, skip" in capsys.readouterr().out


def test_a_wrong_plan_is_a_usage_error_before_anything_is_loaded(tmp_path, capsys):
    assert main(["--prompt", "a", "--skip", "layer.99"]) == 2
    assert "no block is called 'layer.99'" in capsys.readouterr().err
    assert main(["--prompt", "a", "--plan", str(tmp_path / "no.json")]) == 4
