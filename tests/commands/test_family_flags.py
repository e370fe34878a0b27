"""Pictures on the command line: masks and pads on flux-mini, the family by small models in files, and every error."""

import io
import json
import sys
from pathlib import Path

import cv2
import family_files
import numpy as np
import pytest
from family_files import control_lora, noise, redux_adapter, small_model
from PIL import Image

import flux_core.pipeline
from flux_core import load_pipeline
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS, Takes
from flux_core.vision.maps import canny

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ["--prompt", "a fox", "--steps", "2", "--seed", "5"]
SIDES = ["--width", "128", "--height", "128"]


ROOM, LARGE, PHOTO = noise(128, 128), noise(300, 200, 1), noise(96, 64, 2)
MASK, LARGE_MASK = Image.new("L", ROOM.size), Image.new("L", LARGE.size)
MASK.paste(255, (20, 30, 90, 100))
LARGE_MASK.paste(255, (120, 40, 180, 90))


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"room": ROOM, "mask": MASK, "large": LARGE, "large-mask": LARGE_MASK, "photo": PHOTO}
    for name, image in files.items():
        image.save(f"{name}.png")
    noise(70, 112).save("cup.png")
    Image.new("L", ROOM.size).save("black.png")
    Image.new("RGB", (8, 8)).save("small.png")
    return tmp_path


@pytest.fixture(scope="module")
def loaded():
    return load_pipeline("flux-mini", "cpu")


@pytest.fixture
def mini(loaded, monkeypatch):
    """The model that ships, loaded once."""
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", lambda *_, **__: loaded)
    return loaded


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def outputs() -> list[str]:
    return sorted(path.name for path in Path("output").iterdir())


DRAWN = "output/flux-mini_seed5.png"


# Masks and pads, on flux-mini -------------------------------------------------------------------------


def test_a_mask_paints_and_keeps_the_rest(mini, capsys):
    assert main([*FAST, "--image", "room.png", "--mask", "mask.png"]) == 0
    out, err = capsys.readouterr()
    assert "flux-mini: 128x128" in out and ", in room.png, painted where mask.png is white, seed 5" in out and err == ""
    found, painted = pixels(DRAWN), np.asarray(MASK) > 0
    assert np.array_equal(found[~painted], np.asarray(ROOM)[~painted])
    assert (found[painted] != np.asarray(ROOM)[painted]).any(-1).mean() > 0.9
    (same,) = mini.generate("a fox", 5, init_image=ROOM, mask=MASK, num_steps=2)
    assert np.array_equal(found, same)
    record = read_request(DRAWN)
    assert (record.init_image.file, record.mask.file, record.strength) == ("room.png", "mask.png", 1.0)


def test_the_official_names_are_the_same_flags(mini):
    plain = ["--init-image", "room.png", "--mask", "mask.png"]
    for words in (plain, ["--img_cond_path", "room.png", "--img_mask_path=mask.png"], ["--image=room.png", *plain[2:]]):
        assert main([*FAST, *words]) == 0
    first, *others = (Path("output", name).read_bytes() for name in outputs())
    assert others == [first, first]


def test_a_part_is_drawn_alone_and_the_picture_keeps_its_size(mini):
    words = ["--image", "large.png", "--mask", "large-mask.png", "--mask-padding", "8", *SIDES]
    assert main([*FAST, *words]) == 0
    found, painted = pixels(DRAWN), np.asarray(LARGE_MASK) > 0
    assert found.shape == (200, 300, 3) and np.array_equal(found[~painted], np.asarray(LARGE)[~painted])
    assert (found[painted] != np.asarray(LARGE)[painted]).any(-1).mean() > 0.9


def test_a_picture_is_extended(mini, capsys):
    assert main([*FAST, "--image", "room.png", "--pad", "16,0,0,9"]) == 0
    out, err = capsys.readouterr()
    assert "in room.png, extended by 16,0,0,9 pixels" in out and "144x137 is drawn at 144x144" in err
    found = pixels(DRAWN)
    assert found.shape == (137, 144, 3) and np.array_equal(found[:128, 16:], ROOM)
    assert main([*FAST, "--from-image", DRAWN, "--image", "room.png", "--force"]) == 0
    assert Path("output/flux-mini_seed5_1.png").read_bytes() == Path(DRAWN).read_bytes()


def test_a_mask_of_transparency_paints_where_nothing_is(mini):
    hole = ROOM.copy()
    hole.putalpha(MASK.point(lambda level: 255 - level))
    hole.save("hole.png")
    for mask in ("hole.png", "mask.png"):
        assert main([*FAST, "--image", "room.png", "--mask", mask]) == 0
    assert np.array_equal(*map(pixels, (DRAWN, "output/flux-mini_seed5_1.png")))


def test_stepwise_pictures_keep_what_the_picture_keeps(mini):
    words = ["--image", "large.png", "--mask", "large-mask.png", "--mask-padding", "8", *SIDES]
    assert main([*FAST, *words, "--stepwise-dir", "steps"]) == 0
    first, last = (pixels(f"steps/seed_5_step{i}of2.png") for i in (1, 2))
    kept = np.asarray(LARGE_MASK) == 0
    assert np.array_equal(last, pixels(DRAWN)) and np.array_equal(first[kept], np.asarray(LARGE)[kept])


def test_an_exploration_paints_in_its_picture(mini):
    words = ["--prompt", "a fox", "--seeds", "5", "--steps", "2", "--init-image", "room.png", "--mask", "mask.png"]
    assert main(["explore", *words, "--stepwise-dir", "steps"]) == 0
    (drawn,) = (path for path in Path("output").rglob("*.png") if "grid" not in path.name)
    (expected,) = mini.generate("a fox", 5, init_image=ROOM, mask=MASK, num_steps=2)
    assert np.array_equal(pixels(drawn), expected)
    first, last = (pixels(next(Path("steps").rglob(f"seed_5_step{i}of2.png"))) for i in (1, 2))
    kept = np.asarray(MASK) == 0
    assert np.array_equal(last, expected) and np.array_equal(first[kept], np.asarray(ROOM)[kept])


def test_lines_of_a_file_share_the_runs_pictures_each_as_it_takes_them(mini):
    lines = [{"strength": 0.5}, {"mask_padding": 4}, {"pad": "16,0,0,0"}, {"width": 144, "height": 128}]
    Path("lines.jsonl").write_text("\n".join(json.dumps({"prompt": "a fox", **line}) for line in lines))
    words = ["--prompt-file", "lines.jsonl", "--steps", "2", "--seed", "5", "--image", "room.png", "--mask", "mask.png"]
    assert main(words) == 0
    kept, room = np.asarray(MASK) == 0, np.asarray(ROOM)
    drawn = [f"output/flux-mini_seed5{end}.png" for end in ("", "_1", "_2", "_3")]
    for path, size, asked, left in zip(
        drawn, [128, 128, 144, 144], [(128, 128), (256, 256), (144, 128), (144, 128)], [0, 0, 16, None], strict=True
    ):
        found, record = pixels(path), read_request(path)
        assert found.shape == (128, size, 3) and (record.width, record.height) == asked
        assert left is None or np.array_equal(found[:, left:][kept], room[kept])


def test_prompts_that_are_typed_share_them_too(mini, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/s 6\na dog\n/q\n")))
    assert main([*FAST, "--loop", "--image", "room.png", "--mask", "mask.png"]) == 0
    assert outputs() == ["flux-mini_seed5.png", "flux-mini_seed6.png"]
    kept = np.asarray(MASK) == 0
    assert np.array_equal(pixels("output/flux-mini_seed6.png")[kept], np.asarray(ROOM)[kept])


@pytest.mark.parametrize(("ratio", "size"), [("16:9", (336, 192)), ("2.35:1", (384, 160))])
def test_a_ratio_stands_for_width_and_height(mini, ratio, size, capsys):
    assert main([*FAST, "--aspect-ratio", ratio, "--num-steps", "1"]) == 0
    assert pixels(DRAWN).shape[1::-1] == size


def test_a_ratio_changes_a_repeated_picture(mini):
    assert main([*FAST, *SIDES, "--steps=1"]) == 0
    assert main(["--from-image", DRAWN, "--aspect-ratio", "4:3"]) == 0
    assert pixels("output/flux-mini_seed5_1.png").shape == (208, 288, 3)


# What cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "finding"),
    [
        ("--mask mask.png", 2, "--mask does nothing without --init-image: give the picture to paint in"),
        ("--pad 8,8,8,8", 2, "--pad does nothing without --init-image"),
        ("--image room.png --mask-padding 8", 2, "--mask-padding does nothing without --mask"),
        ("--image room.png --mask mask.png --mask-padding -1", 2, "--mask-padding must be a whole number from 0 to"),
        ("--image room.png --pad 8,8,8", 2, "--pad: give pixels for left, top, right and bottom, as in 128,0,128,0"),
        ("--image room.png --pad 9999,9999,9999,9999", 2, "at most 64,000,000 are drawn from"),
        ("--image none.png", 4, "none.png does not exist: give a picture file"),
        ("--image room.png --mask none.png", 4, "none.png does not exist"),
        ("--image room.png --mask lines.txt", 4, "lines.txt is no picture that can be read"),
        ("--image room.png --mask small.png", 2, "small.png has 8x8 pixels, the picture 128x128. Next: give a mask of"),
        ("--image room.png --mask black.png", 2, "black.png is black everywhere: nothing would be painted"),
        ("--image room.png --init-image room.png", 2, "--image and --init-image are the same for flux-mini"),
        ("--image room.png --fit cut", 2, "--fit must be one of crop, pad, stretch"),
        ("--control canny:photo.png", 2, "flux-mini takes no --control. Next: leave it out, or --name with one of"),
        ("--reference cup.png", 2, "flux-mini takes no --reference"),
        ("--aspect-ratio 16-9", 2, "--aspect-ratio must be two numbers, as in 16:9, not '16-9'"),
        ("--aspect-ratio 0:9", 2, "--aspect-ratio must be two numbers"),
        ("--aspect-ratio 0.0:9", 2, "--aspect-ratio must be two numbers"),
        ("--aspect-ratio 1:2:3", 2, "--aspect-ratio must be two numbers"),
        ("--aspect-ratio \u0661:\u0662", 2, "--aspect-ratio must be two numbers"),
        ("--aspect-ratio 16:9 --width 128", 2, "--aspect-ratio and --width both say the shape: leave one out"),
        ("--aspect-ratio 1:999", 2, "--width 16 is not among the 128 to 512 pixels flux-mini is made for"),
        (
            "--name flux-dev-fill --image room.png",
            2,
            "flux-dev-fill paints into a picture. Next: --image FILE with --m",
        ),
        ("--name flux-dev-fill", 2, "flux-dev-fill paints into a picture"),
        ("--name flux-dev-canny", 2, "flux-dev-canny follows a map. Next: --control canny:FILE, or --control MAP.png"),
        ("--name flux-dev-depth --control none.png", 4, "none.png does not exist"),
        ("--name flux-dev-canny --control cany:photo.png", 2, "no map 'cany': there are canny, depth. Did you mean"),
        ("--name flux-dev-canny --image photo.png --control photo.png", 2, "--image and --control are the same for"),
        (
            "--name flux-dev-canny --image photo.png --mask mask.png",
            2,
            "takes --image as its control. Next: give that by --init-image",
        ),
        ("--name flux-dev-kontext --image cup.png --reference cup.png", 2, "--image and --reference are the same for"),
        ("--name flux-dev-kontext --reference cup.png 0.7", 2, "flux-dev-kontext changes a picture as a whole"),
        ("--name flux-dev-redux", 2, "flux-dev-redux takes a picture. Next: --reference FILE"),
        (
            "--name flux-dev-redux --reference cup.png photo.png",
            2,
            "the weight of --reference cup.png must be a number",
        ),
        ("--name flux-dev-redux --reference cup.png nan", 2, "must be a number from -100 to 100, not 'nan'"),
        ("--name flux-dev-redux --reference cup.png 1 photo.png 2", 2, "takes a file and its weight, not 4 words"),
    ],
)
def test_an_error_is_one_line_before_a_model_is_looked_for(words, code, finding, monkeypatch, capsys):
    def too_late(*_, **__):
        raise AssertionError("a model was looked for")

    for place in ("flux_core.commands.generate.check_files", "flux_core.pipeline.load_pipeline"):
        monkeypatch.setattr(place, too_late)
    Path("lines.txt").write_text("a fox")
    assert main([*FAST, *words.split()]) == code
    out, err = capsys.readouterr()
    *notes, line = err.splitlines()
    assert out == "" and line.startswith("error: ") and finding in line and not any("error" in one for one in notes)
    assert not Path("output").exists()


def test_edges_without_opencv_are_told_as_early(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("flux_core.commands.generate.check_files", lambda _: 1 / 0)
    assert main([*FAST, "--name", "flux-dev-canny", "--image", "photo.png"]) == 2
    said = "the map canny needs OpenCV. Next: pip install opencv-python-headless"
    assert said in capsys.readouterr().err
    monkeypatch.setattr("flux_core.commands.explore.check_files", lambda _: 1 / 0)
    words = ["explore", "--prompt", "a fox", "--name", "flux-mini-canny"]
    assert main([*words, "--image", "photo.png"]) == 2 and said in capsys.readouterr().err
    assert main(words) == 2 and "follows a map" in capsys.readouterr().err
    assert not Path("output").exists()  # no session was begun


@pytest.mark.parametrize(("name", "field"), [("flux-mini-canny", "control"), ("flux-mini-kontext", "reference")])
def test_the_models_that_ship_take_a_picture(name, field):
    assert main([*FAST, *SIDES, "--name", name, "--image", "room.png"]) == 0
    record = read_request(f"output/{name}_seed5.png")
    assert "room.png" in str(getattr(record, field)) and f"{name}.safetensors" in record.weights
    assert main([*FAST, *SIDES, "--name", name, "--image", "photo.png"]) == 0
    assert not np.array_equal(pixels(f"output/{name}_seed5.png"), pixels(f"output/{name}_seed5_1.png"))


def test_the_scale_of_the_models_own_lora_is_typed_and_recorded(monkeypatch, capsys):
    """The official demo's --lora_scale: the record draws it again, also where the file was never named."""
    flags = [*FAST, *SIDES, "--name", "flux-mini-canny", "--control", "photo.png"]
    assert main(flags) == main([*flags, "--lora_scale", "0.4"]) == 0
    plain, weak, again, from_plain = (f"output/flux-mini-canny_seed5{end}.png" for end in ("", "_1", "_2", "_3"))
    assert not np.array_equal(pixels(weak), pixels(plain))
    (entry,) = read_request(weak).loras
    assert (entry.file, entry.scale, read_request(plain).loras) == ("flux-mini-canny.safetensors", 0.4, ())
    monkeypatch.setattr("flux_core.lora.known._place", lambda: Path("nothing.json"))
    monkeypatch.setattr("flux_core.lora.known._NAMED", {})
    assert main(["--from-image", weak, "--control", "photo.png"]) == 0
    assert np.array_equal(pixels(again), pixels(weak))
    assert main(["--from-image", plain, "--control", "photo.png", "--lora-scale", "0.4"]) == 0
    assert np.array_equal(pixels(from_plain), pixels(weak))
    assert main([*flags, "--lora-merge", "--lora-scale", "0.4"]) == 2
    assert "--lora-merge does nothing without --lora" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["save", "lora merge lora.safetensors"])
@pytest.mark.parametrize(("name", "base"), [("flux-mini-canny", "flux-mini"), ("flux-schnell-redux", "flux-schnell")])
def test_what_is_written_lacks_no_adapter(words, name, base, capsys):
    assert main([*words.split(), "--name", name, "--output", "written"]) == 2
    assert f"{name} is {base} with" in (err := capsys.readouterr().err) and f"Next: --name {base}\n" in err
    assert not Path("written").exists()


# The family -------------------------------------------------------------------------------------------


@pytest.fixture
def family(monkeypatch, tmp_path):
    """A function from a model's name to the words that name a small one's files, and a place for its adapter."""

    def made(name: str, **changes) -> tuple[list[str], Path]:
        sizes = {"width": 128, "height": 96, "min_side": 16}
        row, files = small_model(tmp_path / "models" / name, name, **sizes, **changes)
        monkeypatch.setitem(VARIANTS, name, row)
        flags = [f"--{flag.replace('_', '-')}={path}" for flag, path in files.items()]
        return [f"--name={name}", *flags, *FAST], tmp_path / f"{name}.safetensors"

    return made


def test_the_picture_of_fill_is_painted_in(family, capsys):
    words, _ = family("flux-dev-fill")
    assert main([*words, "--image", "room.png", "--mask", "mask.png"]) == 0
    found, kept = pixels("output/flux-dev-fill_seed5.png"), np.asarray(MASK) == 0
    assert found.shape == (128, 128, 3) and np.array_equal(found[kept], np.asarray(ROOM)[kept])
    err = capsys.readouterr().err
    assert "licence of flux-dev-fill" in err and "burnt" not in err
    assert main([*words, "--img-cond-path", "room.png", "--pad", "0,16,0,0"]) == 0
    assert np.array_equal(pixels("output/flux-dev-fill_seed5_1.png")[16:], ROOM)


def test_the_picture_of_canny_becomes_its_map_which_is_saved_beside_the_picture(family, capsys):
    words, _ = family("flux-dev-canny")
    assert main([*words, "--image", "photo.png", "--num-images", "2"]) == 0
    names = ["flux-dev-canny_seed5.png", "flux-dev-canny_seed5_canny.png", "flux-dev-canny_seed6.png"]
    assert outputs() == [*names, "grid_flux-dev-canny_seed5.png"]
    out = capsys.readouterr().out
    assert "along canny of photo.png" in out and all(f"output/{name}" in out for name in names)
    scaled = (np.asarray(PHOTO, dtype=np.float32) / 127.5 - 1 + 1) * 127.5
    edges = cv2.Canny(scaled.astype(np.uint8), 50, 200)
    assert 0 < edges.mean() < 255 and np.array_equal(pixels(f"output/{names[1]}"), np.repeat(edges[..., None], 3, -1))
    record = read_request(f"output/{names[0]}")
    assert (record.control.file, record.control.map, record.width, record.height) == ("photo.png", "canny", 96, 64)
    assert main([*words, "--control", f"output/{names[1]}"]) == 0  # the map again, as it is: the same picture
    assert np.array_equal(pixels("output/flux-dev-canny_seed5_1.png"), pixels(f"output/{names[0]}"))
    assert len(outputs()) == 5


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["explore", "--prompt", "a fox", "--seeds", "5"], "*/canny.png"),
        (["edit", "--source", "a fox", "--edit", "a car", "--seed", "5"], "flux-dev-canny_seed5_canny.png"),
    ],
    ids=["explore", "edit"],
)
def test_other_commands_save_the_map_too(family, words, place):
    typed, _ = family("flux-dev-canny")
    assert main([*words, *typed[: -len(FAST)], "--steps", "2", "--control", "canny:photo.png"]) == 0
    (map,) = Path("output").glob(place)
    assert np.array_equal(pixels(map), canny(PHOTO))


def test_the_picture_of_kontext_is_changed_and_decides_the_size(family):
    words, _ = family("flux-dev-kontext", takes=Takes(references=True, sizes=((64, 48), (48, 64), (48, 96))))
    assert main([*words, "--image", "photo.png"]) == 0
    assert pixels("output/flux-dev-kontext_seed5.png").shape == (48, 64, 3)
    assert main([*words, "--reference", "photo.png", "--reference", "cup.png", "--width=48", "--height=32"]) == 0
    record = read_request("output/flux-dev-kontext_seed5_1.png")
    assert [one.file for one in record.reference] == ["photo.png", "cup.png"]
    assert (record.width, record.height) == (48, 32)


def test_pictures_of_redux_have_their_weights(family, monkeypatch):
    folder = family_files.siglip(Path("siglip").absolute())
    words, adapter = family("flux-dev-redux", takes=Takes(words=str(folder)))
    monkeypatch.setenv("FLUX_REDUX", str(redux_adapter(adapter, VARIANTS["flux-dev-redux"].params.context_in_dim)))
    size = ["--width=48", "--height=32"]
    assert main([*words, *size, "--reference", "photo.png", "0.5", "--reference", "cup.png"]) == 0
    record = read_request("output/flux-dev-redux_seed5.png")
    assert [(one.file, one.weight) for one in record.reference] == [("photo.png", 0.5), ("cup.png", 1.0)]
    monkeypatch.setenv("FLUX_REDUX", str(folder / "model.safetensors"))
    with monkeypatch.context() as early:
        early.setattr("flux_core.pipeline.load_pipeline", lambda *_, **__: 1 / 0)
        assert main([*words, *size, "--image", "photo.png"]) == 4  # before a model is loaded
    monkeypatch.setenv("FLUX_REDUX", str(adapter))
    without = [word for word in words if word not in FAST[:2]]
    assert main([*without, *size, "--image", "photo.png"]) == 0
    record = read_request("output/flux-dev-redux_seed5_1.png")
    assert record.prompt == "" and [one.weight for one in record.reference] == [1.0]


def test_a_picture_of_the_family_asks_for_its_own_pictures_and_is_repeated(family, monkeypatch, capsys):
    words, adapter = family("flux-dev-canny-lora")
    monkeypatch.setenv("FLUX_LORA", str(control_lora(adapter, VARIANTS["flux-dev-canny-lora"].params)))
    first, second = (f"output/flux-dev-canny-lora_seed5{end}.png" for end in ("", "_1"))
    again, given = [word for word in words if "=" in word], ["--control", "canny:photo.png"]
    assert main([*words, *given]) == 0
    capsys.readouterr()
    assert main(["--from-image", first, *again]) == 2
    assert "was made from 'photo.png': give it with --control canny:photo.png" in capsys.readouterr().err
    assert main(["--from-image", first, *again, *given]) == 0
    assert Path(first).read_bytes() == Path(second).read_bytes()
    capsys.readouterr()
    assert main(["--from-image", first, *again, "--control", "photo.png"]) == 0
    assert "that picture was made with --control canny:photo.png" in capsys.readouterr().err
    assert main(["--from-image", first, *again, "--control", "canny:room.png"]) == 0
    assert "'room.png' is another picture than the 'photo.png' that was used" in capsys.readouterr().err


def kept(file: str | Path) -> bool:
    """Whether a picture is the room's where the mask is black, and is not elsewhere."""
    black, (found, room) = pixels("mask.png") == 0, (pixels(file), np.asarray(ROOM))
    return np.array_equal(found[black], room[black]) and not np.array_equal(found, room)


@pytest.mark.parametrize("words", ["edit --source x --edit y", "importance --limit 1"])
def test_edits_and_studies_ask_for_what_is_painted_in(words, capsys):
    assert main([*words.split(), "--name", "flux-dev-fill"]) == 2
    assert "flux-dev-fill paints into a picture. Next: --image FILE with --mask FILE" in capsys.readouterr().err


@pytest.mark.parametrize("image", ["--image", "--init-image"])
def test_edits_inside_a_mask_by_the_model_for_it(family, image):
    words, _ = family("flux-dev-fill")
    typed = [*words[: -len(FAST)], "--steps", "2", "--seed", "5", image, "room.png", "--mask", "mask.png"]
    assert main(["edit", "--source", "a fox", "--edit", "a car", *typed]) == 0
    assert all(kept(f"output/flux-dev-fill_seed5_{branch}.png") for branch in ("source", "edit1"))
    record = read_request("output/flux-dev-fill_seed5_edit1.png")
    assert (record.init_image.file, record.mask.file, record.prompt) == ("room.png", "mask.png", "a car")


def test_edits_inside_a_mask_by_any_model(mini, capsys):
    place = ["--init-image", "room.png", "--mask", "mask.png", "--steps", "4", "--seed", "5"]
    assert main(["edit", "--source", "a fox", "--edit", "a red car", *place]) == 0
    assert all(kept(f"output/flux-mini_seed5_{branch}.png") for branch in ("source", "edit1"))
    assert main(["--prompt", "a fox", *place]) == 0
    source, alone = (pixels(f"output/flux-mini_seed5{end}.png").astype(int) for end in ("_source", ""))
    assert np.abs(source - alone).max() <= 2  # a row of two and a row alone
    assert main(["repeat", "output/flux-mini_seed5_edit1.png"]) == 2
    assert "cannot hold is missing: Stable Flow, edit1 of 'a fox'" in capsys.readouterr().err


def test_no_step_is_no_edit(capsys):
    words = ["edit", "--source", "a fox", "--edit", "a car", "--init-image", "room.png", "--strength", "0"]
    assert main(words) == 2 and "--strength 0 leaves no step" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--mask", "mask.png"], ["--strength", "0.5"], ["--init-image", "room.png"]])
def test_a_photograph_that_is_inverted_is_not_started_from(flags, capsys):
    assert main(["edit", "--image", "room.png", "--source", "a fox", "--edit", "a car", *flags]) == 2
    assert f"--image is inverted to the noise that it starts from: leave out {flags[0]}" in capsys.readouterr().err


def test_what_is_inverted_is_no_map(capsys):
    words = ["edit", "--name", "flux-mini-canny", "--image", "room.png", "--source", "a fox", "--edit", "a car"]
    assert main(words) == 2
    assert "--image is the photograph that is inverted" in capsys.readouterr().err


def test_a_study_inside_a_mask(family, capsys):
    words, _ = family("flux-dev-fill")
    study = ["importance", *words[: -len(FAST)], "--steps", "1", "--limit", "1", "--scorer", "dinov2-mini"]
    study += ["--output-dir", "study", "--image", "room.png", *SIDES]
    assert main([*study, "--mask", "mask.png"]) == 0
    drawn = list(Path("study").glob("images/*/*.png"))
    assert len(drawn) > 1 and all(map(kept, drawn))
    at = {path: path.stat().st_mtime_ns for path in drawn}
    assert main([*study, "--mask", "mask.png"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("study").glob("images/*/*.png")} == at
    Image.new("L", ROOM.size, 255).save("white.png")
    for others, said in (
        (["--mask", "white.png"], "study holds a study with another --mask"),
        (["--mask", "mask.png", "--mask-padding", "0"], "study holds a study with mask_padding 'none', this one has 0"),
        (["--mask", "mask.png", "--strength", "0.5"], "study holds a study with strength 1.0, this one has 0.5"),
        (["--mask", "mask.png", "--strength", "0"], "--strength 0 leaves no step"),
    ):
        capsys.readouterr()
        assert main([*study, *others]) == 2
        assert said in capsys.readouterr().err


def test_a_study_beyond_a_border_goes_on_and_one_of_before_had_no_picture(family, capsys):
    words, _ = family("flux-dev")
    study = ["importance", *words[: -len(FAST)], "--steps", "1", "--limit", "1", "--scorer", "dinov2-mini"]
    sizes = ["--width", "144", "--height", "128"]
    study += ["--output-dir", "study", *sizes, "--init-image", "room.png"]
    for _ in range(2):
        assert main([*study, "--pad", "16,0,0,0"]) == 0
    told = json.loads(Path("study/study.json").read_text(encoding="utf-8"))
    assert told["pad"] == [16, 0, 0, 0] and told["mask"] == "none"
    before = {key: value for key, value in told.items() if key not in ("pad", "init_image", "strength", "fit", "mask")}
    Path("study/study.json").write_text(json.dumps(before), encoding="utf-8")
    capsys.readouterr()
    assert main([*study, "--pad", "16,0,0,0"]) == 2
    assert "study holds a study with no --init-image: use the same" in capsys.readouterr().err


def test_a_map_of_another_kind_is_told():
    control = {"file": "photo.png", "sha256": "0" * 64, "map": "depth"}
    request = GenerationRequest(name="flux-dev-canny", prompt="a fox", control=control)
    assert "flux-dev-canny follows maps of canny, and this is one of depth" in request.notes()
