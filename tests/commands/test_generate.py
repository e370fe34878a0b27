"""Words in, picture files out: the default command, drawn by a tiny model (users.md 4c, rows 30 to 38, 40,
54).
"""

import io
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.commands.generate import generate
from flux_core.commands.info import info
from flux_core.commands.repeat import repeat
from flux_core.errors import DiskError, FileError, NonFiniteError, UsageError
from flux_core.images.metadata import png_bytes, read_request
from flux_core.images.output import save_picture
from flux_core.request.batch import Batch

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"prompt": "a red apple", "width": "32", "height": "48", "num_steps": "2", "force": True}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    monkeypatch.chdir(tmp_path)


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_picture_lies_where_the_command_says(tmp_path, capsys):
    (path,) = generate(**FAST, seed=["42"])
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "flux-mini: 32x48, 2 steps, guidance 3.5, seed 42, float32 on cpu",
        "output/flux-mini_seed42.png",
    ]
    assert err == ""
    assert names(tmp_path / "output") == ["flux-mini_seed42.png"]
    with Image.open(tmp_path / path) as image:
        assert image.size == (32, 48) and image.mode == "RGB"


def test_the_file_is_what_python_draws():
    (path,) = generate(**FAST, seed=["42"])
    with Image.open(path) as image:
        drawn = tiny_pipeline().generate("a red apple", 42, width=32, height=48, num_steps=2, force=True)[0]
        assert image.tobytes() == drawn.tobytes() and path.read_bytes() == png_bytes(drawn)


def test_a_file_of_prompts_is_drawn_in_batches_of_what_fits_together(tmp_path, capsys):
    lines = [("a red apple", 1, 2), ("a blue car", 2, 3), ("two pigs", 3, 2), ("a house", 4, 2)]
    (tmp_path / "p.csv").write_text("prompt,seed,num_steps\n" + "".join(f"{a},{b},{c}\n" for a, b, c in lines))
    fields = {"prompt_file": "p.csv", "width": "32", "height": "48", "force": True}
    alone = generate(**fields, output_dir="alone")
    paths = generate(**fields, batch="2", output_dir="rows", stepwise_dir="steps")
    assert [path.name for path in paths] == [f"flux-mini_seed{seed}.png" for seed in (1, 2, 3, 4)]
    (one, two) = (pixels(tmp_path / folder / "grid_flux-mini_seed1.png") for folder in ("alone", "rows"))
    assert np.abs(one - two).max() <= 1
    assert {path.name: read_request(path).batch for path in paths} == {
        "flux-mini_seed1.png": Batch(rows=2, row=0), "flux-mini_seed3.png": Batch(rows=2, row=1),
        "flux-mini_seed2.png": None, "flux-mini_seed4.png": None,
    }  # fmt: skip
    for path in alone:
        row = tmp_path / "rows" / path.name
        assert np.abs(pixels(path) - pixels(row)).max() <= 1
        (again,) = generate(from_image=str(row), force=True, output_dir="again")
        assert again.read_bytes() == row.read_bytes()
        (single,) = generate(from_image=str(row), force=True, batch="1", output_dir="again")
        assert single.read_bytes() == path.read_bytes()
    assert (pixels(tmp_path / "steps/seed_3_step2of2.png") == pixels(tmp_path / "rows/flux-mini_seed3.png")).all()
    (tmp_path / "plan.json").write_text('[{"kind": "first_block_cache"}]')
    with pytest.raises(UsageError, match="first_block_cache decides for all rows of a batch"):
        generate(**fields, batch="2", plan="plan.json")


def recorded_rows(path, rows, row=0):
    """A picture file that records that it was a row of a batch."""
    with Image.open(path) as image:
        request = {**json.loads(image.info["flux_core"]), "batch": {"rows": rows, "row": row}}
        image.info["flux_core"] = json.dumps(request)
        Path("row.png").write_bytes(png_bytes(image))
    return "row.png"


def test_only_the_same_picture_is_drawn_among_copies_and_that_is_told(capsys, monkeypatch):
    file = recorded_rows(generate(**FAST, seed=["42"])[0], rows=4, row=1)
    (same,) = generate(from_image=file, force=True)
    assert read_request(same).batch == Batch(rows=4, row=1)
    assert "as row 2 of 4: drawn among copies" in capsys.readouterr().err
    repeat(file, force=True)
    assert "as row 2 of 4: drawn among copies" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a blue car\n/q\n")))
    typed = generate(from_image=file, force=True, loop=True)
    assert [read_request(path).batch is None for path in typed] == [False, True]
    capsys.readouterr()
    for change in ({"seed": ["43"]}, {"prompt": "a blue car"}, {"guidance": "2"}, {"width": "48"}, {"num_steps": "1"}):
        (other,) = generate(from_image=file, force=True, **change)
        assert read_request(other).batch is None
    several = generate(from_image=file, force=True, seed=["42", "7"])
    assert [read_request(path).batch is None for path in several] == [False, True]
    assert capsys.readouterr().err.count("as row 2 of 4") == 1


def test_a_file_cannot_ask_for_any_number_of_rows():
    file = recorded_rows(generate(**FAST, seed=["42"])[0], rows=1024)
    for draw in (partial(generate, from_image=file), partial(repeat, file)):
        with pytest.raises(UsageError, match=r"row 1 of 1024, and 64 are drawn at most. Next: .* --batch 1"):
            draw(force=True)
    (alone,) = generate(from_image=file, force=True, batch="1")
    assert read_request(alone).batch is None


def test_several_seeds_make_a_grid(tmp_path, capsys):
    paths = generate(**FAST, seed=["5", "9"], num_images="3")
    assert [path.name for path in paths] == [f"flux-mini_seed{i}.png" for i in (5, 6, 7, 9, 10, 11)]
    with Image.open("output/grid_flux-mini_seed5.png") as grid:
        assert grid.size == (96, 96) and "xmp" in grid.info
    assert "seed 5, 6, 7, 9, 10, 11" in capsys.readouterr().out


def test_repeated_seeds_are_drawn_once(capsys):
    assert len(generate(**FAST, seed=["5", "5", "6"], num_images="2")) == 3
    assert "3 repeated seed(s) are drawn once" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [None, ["-1"]])
def test_the_real_seed_of_a_random_one_is_told(seed, capsys):
    (path,) = generate(**FAST, seed=seed)
    drawn = read_request(path).seed
    assert f"seed {drawn}," in capsys.readouterr().out and path.name == f"flux-mini_seed{drawn}.png"


def test_notes_come_once_however_many_images(capsys):
    generate(**{**FAST, "width": "33", "prompt": "one two three four five"}, seed=["1", "2"])
    err = capsys.readouterr().err
    assert err.count("33x48 is drawn at 48x48") == 1 and err.count("dropped: 'five'") == 1


def test_stepwise_pictures_end_with_the_picture(tmp_path):
    (path,) = generate(**FAST, seed=["7"], stepwise_dir="steps")
    assert names(tmp_path / "steps") == ["seed_7_composite.png", "seed_7_step1of2.png", "seed_7_step2of2.png"]
    last, sheet = (Image.open(f"steps/seed_7_{what}.png") for what in ("step2of2", "composite"))
    assert last.tobytes() == Image.open(path).tobytes()
    assert sheet.size == (64, 48) and sheet.crop((32, 0, 64, 48)).tobytes() == last.tobytes()


def test_a_failure_keeps_what_was_drawn_before_it(tmp_path, monkeypatch):
    def sick(*args):
        pipeline = tiny_pipeline(*args)
        whole, factors = pipeline.ae.decode, iter([1.0, float("nan")])
        pipeline.ae.decode = lambda z: whole(z) * next(factors)
        return pipeline

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", sick)
    with pytest.raises(NonFiniteError):
        generate(**FAST, seed=["1"], num_images="3")
    assert names(tmp_path / "output") == ["flux-mini_seed1.png"]


def test_an_interrupt_keeps_the_steps_so_far(tmp_path, monkeypatch):
    from flux_core.commands import stepwise

    def interrupt(image, folder, stem):
        if "step2" in stem:
            raise KeyboardInterrupt
        return save_picture(image, folder, stem)

    monkeypatch.setattr(stepwise, "save_picture", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(**FAST, seed=["1"], stepwise_dir="steps")
    assert names(tmp_path / "steps") == ["seed_1_composite.png", "seed_1_step1of2.png"]
    assert names(tmp_path / "output") == []


def test_a_picture_repeats_itself():
    (first,) = generate(**FAST, seed=["42"], guidance="2.5")
    (again,) = generate(from_image=str(first), force=True)
    assert again.name == "flux-mini_seed42_1.png" and again.read_bytes() == first.read_bytes()


def test_flags_change_a_repeated_picture():
    (first,) = generate(**FAST, seed=["42"])
    (other,) = generate(from_image=str(first), force=True, seed=["43"], prompt="a blue car")
    old, new = read_request(first), read_request(other)
    assert (new.seed, new.prompt) == (43, "a blue car")
    assert (new.width, new.num_steps) == (old.width, old.num_steps)


def test_a_steered_picture_is_repeated_and_shown(capsys):
    flags = {"negative_prompt": "a blue car", "true_cfg_scale": "3", "cfg_zero": "1", "mimic_scale": "1.5"}
    (first,) = generate(**{**FAST, **flags}, seed=["42"], stepwise_dir="steps")
    assert Image.open("steps/seed_42_step2of2.png").tobytes() == Image.open(first).tobytes()
    out, err = capsys.readouterr()
    assert (
        "guidance 3.5, true CFG 3, CFG-Zero*, thresholded as at 1.5, seed 42" in out
        and err.count("twice the time") == 1
    )
    assert "Negative prompt: a blue car" in info(str(first)) and '"cfg_zero": 1' in info(str(first))
    (again,) = generate(from_image=str(first), force=True)
    assert again.read_bytes() == first.read_bytes()
    (other,) = generate(from_image=str(first), force=True, negative_prompt="", true_cfg_scale="2")
    assert read_request(other).negative_prompt is None and other.read_bytes() != first.read_bytes()
    with pytest.raises(UsageError, match="--negative-prompt does nothing at --true-cfg-scale 1"):
        generate(from_image=str(first), force=True, true_cfg_scale="1")


def test_a_file_grants_no_permission():
    (first,) = generate(**FAST, seed=["42"])
    with pytest.raises(UsageError, match="--force"):
        generate(from_image=str(first))


def test_other_weights_are_told(monkeypatch, capsys):
    (first,) = generate(**FAST, seed=["42"])

    def retrained(*args):
        pipeline = tiny_pipeline(*args)
        pipeline.weights = {"flux-mini.safetensors": "def"}
        return pipeline

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", retrained)
    generate(from_image=str(first), force=True)
    assert "pixels may differ: it was drawn with other weights" in capsys.readouterr().err


def test_image_to_image_and_its_repetition(tmp_path, capsys):
    Image.radial_gradient("L").save("start.png")
    (first,) = generate(**{**FAST, "num_steps": "4"}, seed=["1"], init_image="start.png", strength="0.5")
    assert "from start.png at strength 0.5" in capsys.readouterr().out
    assert read_request(first).init_image.file == "start.png" and str(tmp_path) not in info(str(first))
    with pytest.raises(UsageError, match=r"made from 'start\.png'.*--init-image"):
        generate(from_image=str(first), force=True)
    (again,) = generate(from_image=str(first), force=True, init_image="start.png")
    assert again.read_bytes() == first.read_bytes()
    Image.new("L", (8, 8)).save("other.png")
    generate(from_image=str(first), force=True, init_image="other.png")
    assert "'other.png' is another picture" in capsys.readouterr().err


def test_stepwise_names_count_the_steps_that_are_made():
    Image.radial_gradient("L").save("start.png")
    settings = {**FAST, "num_steps": "4"}
    generate(**settings, seed=["1"], init_image="start.png", strength="0.5", stepwise_dir="steps")
    assert Image.open("steps/seed_1_step2of2.png").size == (32, 48)


def test_everything_wrong_is_found_before_a_model_is_loaded(tmp_path, monkeypatch):
    def loaded(*_):
        raise AssertionError("too late")

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", loaded)
    (tmp_path / "file").write_text("")
    for flags, error in (
        ({"width": "0"}, UsageError),
        ({"seed": ["1", "1e3"]}, UsageError),
        ({"init_image": "missing.png"}, FileError),
        ({"init_image": "file"}, FileError),
        ({"output_dir": "file"}, DiskError),
        ({"stepwise_dir": "file/below"}, DiskError),
        ({"from_image": "missing.png"}, FileError),
    ):
        with pytest.raises(error):
            generate(**{**FAST, **flags})


def test_info_shows_the_request_and_believes_nothing(tmp_path):
    (path,) = generate(**{**FAST, "prompt": "red\x1b[31m \x9b é"}, seed=["42"])
    text = info(str(path))
    record, parameters = text.split("\n\n")
    assert json.loads(record)["seed"] == 42 and "Model: flux-mini, Version: flux_core" in parameters
    assert "é" in text and not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in text)
    Image.new("RGB", (4, 4)).save("foreign.png")
    with pytest.raises(FileError, match="not made by flux_core"):
        info("foreign.png")


def test_no_warnings_reach_the_terminal(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(**{**FAST, "width": "33", "guidance": "11"}, seed=["1"])
