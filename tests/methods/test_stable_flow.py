"""The parts of Stable Flow: layers, batch, inversion and replay."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import flux_core.pipeline
from flux_core import GenerationRequest, load_pipeline
from flux_core.commands.edit import choose_layers
from flux_core.errors import FileError, UsageError
from flux_core.hooks import layers as layers_module
from flux_core.hooks.layers import layers_of
from flux_core.hooks.sites import block_names
from flux_core.methods import stable_flow
from flux_core.methods.stable_flow import Editing
from flux_core.sampling import euler, invert
from flux_core.variants import VARIANTS, get_variant

DEV = VARIANTS["flux-dev"].params


@pytest.fixture
def pipeline(small, one_thread):
    return load_pipeline("flux-mini", "cpu")


@pytest.fixture
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def editing(pipeline, edits=("a green pig",), layers="all", prompt="a pig", steps=4, **more):
    request = GenerationRequest(prompt=prompt, seed=3, num_steps=steps, width=64, height=64, force=True)
    return Editing(pipeline, request, edits, layers_of(layers, "flux-mini", pipeline.variant.params), **more)


def test_the_published_layers_of_dev_and_all_others():
    flat = [block_names(DEV).index(block) for block in layers_of("vital", "flux-dev", DEV)]
    assert flat == [0, 1, 17, 18, 25, 28, 53, 54, 56]
    others = layers_of("non-vital", "flux-dev", DEV)
    assert len(others) == 48 and not set(others) & set(layers_of("vital", "flux-dev", DEV))
    assert layers_of("none", "flux-dev", DEV) == [] and layers_of("all", "flux-dev", DEV) == block_names(DEV)
    assert layers_of("layer.3, single_blocks.0", "flux-dev", DEV) == ["double_blocks.3", "single_blocks.0"]


def test_layers_come_from_a_file_made_for_the_model(tmp_path):
    path = tmp_path / "vital.json"
    path.write_text(json.dumps({"model": "flux-dev", "layers": ["layer.0", "single_blocks.2"]}))
    assert layers_of(str(path), "flux-dev", DEV) == ["double_blocks.0", "single_blocks.2"]
    with pytest.raises(UsageError, match=r"vital.json holds the layers of 'flux-dev', but flux-mini is loaded"):
        layers_of(str(path), "flux-mini", DEV)
    path.write_text("[]")
    with pytest.raises(UsageError, match=r"vital.json holds no layers"):
        layers_of(str(path), "flux-dev", DEV)
    with pytest.raises(FileError, match=r"no.json"):
        layers_of(str(tmp_path / "no.json"), "flux-dev", DEV)
    with pytest.raises(UsageError, match="no vital layers are known for flux-schnell"):
        layers_of("vital", "flux-schnell", DEV)


def test_an_edit_with_the_source_prompt_is_the_source(pipeline):
    x = editing(pipeline, edits=("a pig", "a pig")).generated()
    assert torch.equal(x[1], x[0]) and torch.equal(x[2], x[0])


def test_the_source_is_not_touched_by_its_edits(pipeline):
    alone, crowd = editing(pipeline).generated(), editing(pipeline, layers="none").generated()
    assert torch.equal(alone[0], crowd[0])
    assert not torch.allclose(alone[1], crowd[1])


def test_without_layers_an_edit_is_the_picture_of_its_prompt(pipeline):
    edit = editing(pipeline, layers="none").generated()[1]
    assert torch.allclose(edit, editing(pipeline, prompt="a green pig", layers="none").generated()[0], atol=1e-5)


def test_guidance_has_a_value_for_each_row(pipeline):
    same, other = editing(pipeline).generated(), editing(pipeline, source_guidance=1.0).generated()
    assert not torch.allclose(same[0], other[0])


def test_the_way_back_retraces_an_exact_flow():
    """Where the velocity depends on sigma alone, forward and back are the same steps."""
    sigmas, x = [1.0, 0.7, 0.2, 0.0], torch.randn(1, 3, 4)
    path = invert(lambda x, sigma: torch.full_like(x, sigma), x, sigmas)
    assert len(path) == 4 and path[0] is x
    assert torch.allclose(euler(lambda x, sigma: torch.full_like(x, sigma), path[-1], sigmas), x, atol=1e-6)


def test_an_exact_replay_ends_at_the_photograph_and_the_released_one_two_steps_late(pipeline, photo):
    job = editing(pipeline)
    path = job.inverted(photo, nudge=1.0)
    assert torch.equal(job.of_photo(photo, nudge=1.0)[0], path[0][0])
    assert torch.equal(job.of_photo(photo, nudge=1.0, replay="released")[0], path[2][0])
    assert torch.equal(job.inverted(photo)[0], 1.15 * path[0])


@pytest.mark.parametrize(("replay", "held"), [("exact", [3, 2, 1, 0]), ("released", [1, 4, 3, 2])])
def test_the_source_row_is_held_at_these_places_of_its_path(pipeline, photo, monkeypatch, replay, held):
    from flux_core.methods import stable_flow as module

    seen, plain = [], module.euler

    def watching(velocity, x, sigmas, on_step):
        return plain(velocity, x, sigmas, lambda step: seen.append(on_step(step)) or seen[-1])

    monkeypatch.setattr(module, "euler", watching)
    job = editing(pipeline)
    path = job.inverted(photo)
    job.of_photo(photo, replay=replay)
    assert [next(i for i, x in enumerate(path) if torch.equal(x[0], row[0])) for row in seen] == held


def test_nothing_to_edit_is_an_error(pipeline):
    with pytest.raises(UsageError, match="nothing to edit"):
        editing(pipeline, edits=())


# The command -----------------------------------------------------------------------------------------


def run(tmp_path, *flags):
    from flux_core.main import main

    sizes = ["--width", "64", "--height", "64", "--force", "--num_steps", "2", "--seed", "3"]
    return main(
        ["edit", "--source", "a pig", "--edit", "a cat", "a dog", *sizes, "--output_dir", str(tmp_path), *flags]
    )


def test_the_command_writes_a_strip_and_each_picture(small, one_thread, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(layers_module.VITAL, "flux-mini")
    assert run(tmp_path) == 0
    names = ["strip", "source", "edit1", "edit2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"flux-mini_seed3_{name}.png" for name in names)
    strip = Image.open(tmp_path / "flux-mini_seed3_strip.png")
    assert strip.size == (3 * 64, 64)
    for i, name in enumerate(names[1:]):
        one = Image.open(tmp_path / f"flux-mini_seed3_{name}.png")
        assert strip.crop((64 * i, 0, 64 * (i + 1), 64)).tobytes() == one.convert("RGB").tobytes()
    assert json.loads(one.info["flux_core"])["prompt"] == "a dog" and "Stable Flow" in one.info["flux_core"]
    assert "no vital layers are known for flux-mini" in capsys.readouterr().err


def test_vital_blocks_are_the_default_where_they_are_known():
    request = GenerationRequest(name="flux-mini", prompt="a pig")
    assert choose_layers(None, request) == ["double_blocks.0", "double_blocks.3"]


def test_the_command_edits_a_photograph_and_marks_it(small, one_thread, tmp_path, photo):
    photo.save(tmp_path / "photo.png")
    out = tmp_path / "out"
    assert run(out, "--image", str(tmp_path / "photo.png"), "--layers", "layer.0", "--replay", "released") == 0
    info = Image.open(out / "flux-mini_seed3_edit1.png").info
    assert "photo.png" in info["flux_core"] and "compositeWithTrained" in str(info)


def test_a_model_without_guidance_gets_none(small, pipeline, monkeypatch, tmp_path, photo, capsys):
    row = get_variant("flux-mini")
    monkeypatch.setitem(VARIANTS, row.name, replace(row, params=replace(row.params, guidance_embed=False)))
    photo.save(tmp_path / "photo.png")
    flags = ["--image", str(tmp_path / "photo.png"), "--layers", "layer.0"]
    assert run(tmp_path / "out", *flags, "--source-guidance", "2") == 2
    assert "flux-mini takes no guidance. Next: leave --source-guidance out" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr("flux_core.commands.edit.check_files", lambda variant: None)
    monkeypatch.setattr(stable_flow, "Editing", lambda pipeline, request, edits, blocks, own, *_: asked.append(own))
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", lambda *_, **__: pipeline)
    assert run(tmp_path / "out", *flags) != 2
    assert asked == [None] and "guidance" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "finding"),
    [
        (["--replay", "late"], 2, "--replay must be one of exact, released"),
        (["--nudge", "much"], 2, "--nudge must be a number from 0 to 10"),
        (["--source-guidance", "-1"], 2, "--source-guidance must be a number from 0 to 100"),
        (["--layers", "layer.99"], 2, "no block is called 'layer.99'"),
        (["--layers", "no.json"], 4, "no.json: the layers could not be read"),
        (["--image", "no.png"], 4, "no.png does not exist"),
        (["--source", " "], 2, "--source has no words"),
        (["--edit", "a cat", ""], 2, "--edit has no words"),
    ],
)
def test_what_cannot_be_edited_is_told(small, tmp_path, capsys, flags, code, finding):
    assert run(tmp_path, *flags) == code
    assert finding in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
