"""`--fit` and init images without effect, on the command line and in what a picture says of itself."""

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.commands.table import COMMANDS
from flux_core.images.metadata import KEY, read_request
from flux_core.main import main
from flux_core.methods.stable_flow import NUDGE

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ["--prompt=a red apple", "--width=32", "--height=32", "--steps=4", "--force", "--seed=1"]


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    """A working directory with a picture of another shape in it."""
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    image = Image.linear_gradient("L").resize((96, 32)).convert("RGB")
    image.paste("red", (0, 0, 20, 32))
    image.save("wide.png")
    image.resize((32, 32), Image.Resampling.LANCZOS).save("square.png")


def drawn(*flags: str) -> bytes:
    """The pixels of one picture; its file is out.png."""
    assert main([*FAST, "--output-dir=out", *flags]) == 0
    (path,) = Path("out").iterdir()
    path.rename("out.png")
    return Image.open("out.png").tobytes()


START = ["--init-image=wide.png", "--strength=0.5"]


def test_each_way_draws_another_picture_and_is_recorded(capsys):
    found = {}
    for how in ("crop", "pad", "stretch"):
        found[how] = drawn(*START, f"--fit={how}")
        assert read_request("out.png").fit == how
        assert "96x32, not the shape of 32x32" in capsys.readouterr().err
    assert len(set(found.values())) == 3
    assert drawn(*START) == found["crop"] and read_request("out.png").fit == "crop"
    assert drawn("--init-image=square.png", "--strength=0.5") == found["stretch"]


def test_a_picture_is_repeated_as_it_was_fitted(capsys):
    first = drawn(*START, "--fit=pad")
    Image.open("out.png").save("pad.png", pnginfo=texts(read("out.png")))
    assert drawn("--from-image=pad.png", *START) == first
    assert drawn("--from-image=pad.png", *START, "--fit=stretch") != first


def read(path: str) -> str:
    return Image.open(path).info[KEY]


def texts(request: str) -> PngInfo:
    chunks = PngInfo()
    chunks.add_itxt(KEY, request)
    return chunks


def test_a_request_of_before_was_stretched():
    stretched = drawn(*START, "--fit=stretch")
    old = json.loads(read("out.png"))
    del old["fit"]
    Image.new("RGB", (8, 8)).save("old.png", pnginfo=texts(json.dumps(old)))
    assert read_request("old.png").fit == "stretch"
    assert drawn("--from-image=old.png", *START) == stretched
    del old["init_image"], old["strength"]
    Image.new("RGB", (8, 8)).save("old.png", pnginfo=texts(json.dumps(old)))
    assert read_request("old.png").fit is None
    drawn("--from-image=old.png", *START)
    assert read_request("out.png").fit == "crop"


def test_pictures_without_an_init_image_do_not_speak_of_it(capsys):
    drawn()
    assert "fit" not in json.loads(read("out.png"))
    assert main([*FAST, "--fit=pad"]) == 0
    assert "--fit does nothing without --init-image" in capsys.readouterr().err


def test_a_wrong_way_is_refused(capsys):
    assert main([*FAST, *START, "--fit=squash"]) == 2
    assert "--fit must be one of crop, pad, stretch, not 'squash'" in capsys.readouterr().err


def test_an_init_image_without_effect_is_told(capsys):
    plain = drawn()
    assert capsys.readouterr().err == ""
    assert drawn("--init-image=square.png") == plain
    err = capsys.readouterr().err
    assert "strength 0.8 draws all of 4 step(s)" in err and "Next: --strength 0.75 or lower" in err
    assert drawn("--init-image=square.png", "--strength=0.75") != plain
    assert "no effect" not in capsys.readouterr().err


def test_an_edited_photograph_is_fitted(capsys):
    edit = ["edit", "--source=a pig", "--edit=a cat", "--layers=double_blocks.0", *FAST[1:]]
    found = {}
    for how in ("crop", "pad", "stretch"):
        assert main([*edit, "--image=wide.png", f"--fit={how}", f"--output-dir={how}"]) == 0
        assert "96x32, not the shape of 32x32" in capsys.readouterr().err
        found[how] = Image.open(f"{how}/flux-mini_seed1_source.png").tobytes()
        assert json.loads(read(f"{how}/flux-mini_seed1_edit1.png"))["fit"] == how
    assert len(set(found.values())) == 3
    assert main([*edit, "--fit=pad", "--nudge=1.1", "--init-image=wide.png"]) == 0
    err = capsys.readouterr().err
    assert "--nudge does nothing without a photograph" in err and "--fit does nothing" not in err
    assert json.loads(read("output/flux-mini_seed1_edit1.png"))["fit"] == "pad"
    assert main([*edit, "--fit=pad"]) == 0
    assert "--fit does nothing without a photograph" in capsys.readouterr().err


def test_the_nudge_of_the_flag_is_that_of_the_method():
    (field,) = (field for field in COMMANDS["edit"].fields if field.name == "nudge")
    assert field.default == NUDGE == 1.15
