"""The pictures of a request: how they are named, what is recorded of them, and what size they ask for."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_files import read
from PIL import Image

from flux_core.errors import FileError, UsageError
from flux_core.images.given import (
    NOTHING,
    Given,
    natural_size,
    open_given,
    pop_given,
    size_notes,
    with_image,
)
from flux_core.request.generation import GenerationRequest
from flux_core.sampling.family import kontext_size
from flux_core.variants import VARIANTS, Takes, nearest_size, of_ratio

MINI, DEV = VARIANTS["flux-mini"], VARIANTS["flux-dev"]
FILL, CANNY, KONTEXT = (VARIANTS[f"flux-dev-{name}"] for name in ("fill", "canny", "kontext"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("room", "photo", "cup")):
        noise(32, 24, seed).save(f"{name}.png")
    Image.new("L", (32, 24), 255).save("mask.png")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# Opened, and recorded ---------------------------------------------------------------------------------


def test_files_are_recorded_by_name_and_hash():
    found, records = open_given("room.png", "mask.png", "canny:photo.png", [["cup.png", "0.7"], "room.png"])
    assert found.image.tobytes() == noise(32, 24).tobytes() and found.mask.mode == "L"
    assert found.control.tobytes() == noise(32, 24, 1).tobytes()
    assert [one.tobytes() for one in found.references] == [noise(32, 24, 2).tobytes(), noise(32, 24).tobytes()]
    assert {name: json.loads(json.dumps(x, default=dict)) for name, x in records.items()} == {
        "init_image": {"file": "room.png", "sha256": sha256("room.png")},
        "mask": {"file": "mask.png", "sha256": sha256("mask.png")},
        "control": {"file": "photo.png", "sha256": sha256("photo.png"), "map": "canny"},
        "reference": [
            {"file": "cup.png", "sha256": sha256("cup.png"), "weight": 0.7},
            {"file": "room.png", "sha256": sha256("room.png"), "weight": 1.0},
        ],
    }


def test_the_picture_of_a_model_whose_maps_nobody_makes_is_a_map_itself():
    row = replace(VARIANTS["flux-dev-canny"], takes=Takes(channels=("control",)))
    assert with_image({}, "pose.png", row) == {"control": "pose.png"}
    assert with_image({}, "a.png", VARIANTS["flux-dev-canny"]) == {"control": "canny:a.png"}


def test_what_is_not_given_is_not_recorded():
    assert open_given() == (NOTHING, {}) and open_given(reference=[]) == (NOTHING, {})
    flags = {"init_image": "room.png", "prompt": "x", "pad": "8,8,8,8", "control": None}
    found, records = pop_given(flags)
    assert flags == {"prompt": "x", "pad": "8,8,8,8"} and records.keys() == {"init_image"}
    assert found == Given(found.image)


@pytest.mark.parametrize(
    ("reference", "weights"),
    [
        ("cup.png", [1]),
        (Path("cup.png"), [1]),
        (["cup.png", "photo.png"], [1, 1]),
        ([["cup.png"], ["photo.png", "-2"]], [1, -2]),
        (("cup.png", 0.7), [0.7]),
        (("cup.png", "photo.png"), [1, 1]),
        ([("cup.png", 0.7), "photo.png"], [0.7, 1]),
    ],
)
def test_a_reference_may_have_its_weight_after_it(reference, weights):
    found, records = open_given(reference=reference)
    assert [one.weight for one in records["reference"]] == weights
    assert len(found.references) == len(weights) and found.references[0].tobytes() == noise(32, 24, 2).tobytes()


def test_pictures_in_memory_have_the_hash_of_their_pixels():
    image = noise(8, 8)
    found, records = open_given(image, Image.new("L", (8, 8), 9), ("depth", image), image)
    assert records["init_image"].sha256 == hashlib.sha256(image.tobytes()).hexdigest()
    assert records["control"].map == "depth" and records["reference"][0].file == records["mask"].file == ""
    assert open_given(reference=(image, 0.5))[1]["reference"][0].weight == 0.5
    assert found.mask.getextrema() == (9, 9)


def test_only_the_name_of_a_map_stands_before_a_file(monkeypatch, tmp_path):
    Path("a:b.png").write_bytes(Path("photo.png").read_bytes())
    assert open_given(control="a:b.png")[1]["control"].map == ""
    assert open_given(control="depth:a:b.png")[1]["control"].file == "a:b.png"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_given(control="canny:~/photo.png")[1]["control"].file == "photo.png"


@pytest.mark.parametrize(
    ("given", "error", "finding"),
    [
        ({"init_image": "none.png"}, FileError, r"none\.png does not exist: give a picture file"),
        ({"mask": "none.png"}, FileError, r"none\.png does not exist"),
        ({"control": "canny:none.png"}, FileError, r"none\.png does not exist"),
        ({"reference": [["cup.png"], ["none.png", "1"]]}, FileError, r"none\.png does not exist"),
        ({"init_image": "room.png", "mask": Image.new("L", (9, 9), 1)}, UsageError, "9x9 pixels, the picture 32x24"),
        ({"reference": [["cup.png", "photo.png"]]}, UsageError, "cup.png must be a number from -100"),
        ({"reference": [["cup.png", "101"]]}, UsageError, "must be a number from -100 to 100, not '101'"),
        ({"reference": [["cup.png", "nan"]]}, UsageError, "must be a number from -100 to 100, not 'nan'"),
        ({"reference": [("cup.png", None)]}, UsageError, "must be a number from -100 to 100, not 'None'"),
        ({"reference": [["cup.png", "1", "photo.png", "2"]]}, UsageError, "takes a file and its weight, not 4 words"),
        ({"control": ("canny",)}, UsageError, "a pair of a map's name and one of these"),
        (
            {"controlnet": [("net.safetensors", "room.png", "close")]},
            UsageError,
            r"a ControlNet is \(file, picture, scale",
        ),
        (
            {"controlnet": [("net.safetensors", "room.png", 0.7, 0.8)]},
            UsageError,
            r"a ControlNet is \(file, picture, scale",
        ),
        ({"controlnet": ("net.safetensors", "room.png")}, UsageError, r"is \(file, picture, scale"),
        ({"control": "canny:~nobody-here/x.png"}, UsageError, "there is no such home folder"),
    ],
)
def test_what_cannot_be_opened_is_one_of_our_errors(given, error, finding):
    with pytest.raises(error, match=finding):
        open_given(**given)


# What a request names, and what there is --------------------------------------------------------------


def request(**fields) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "x", "seed": 1, "force": True, **fields})


def test_a_requests_pictures_must_be_there_and_no_others():
    found, records = open_given("room.png", "mask.png", None, None)
    found.check(request(**records))
    NOTHING.check(request())
    Given.of(found.image).check(request(init_image=records["init_image"]))
    for wrong, finding in (
        (Given(found.image), "a mask picture goes with a request that names one"),
        (NOTHING, "an init image goes with"),
        (found._replace(control=found.image), "a control picture goes with"),
        (found._replace(references=(found.image,)), "a reference picture goes with"),
    ):
        with pytest.raises(UsageError, match=finding):
            wrong.check(request(**records))


def test_one_reference_of_two_is_not_enough():
    found, records = open_given(reference=["cup.png", "room.png"])
    found.check(wanted := request(name="flux-dev-kontext", **records))
    with pytest.raises(UsageError, match="a reference picture goes with"):
        found._replace(references=found.references[:1]).check(wanted)


def test_a_picture_is_not_extended_beyond_what_is_read():
    """64 million pixels, as of files: a few bytes of a request could ask for gigabytes."""
    found, records = open_given("room.png")
    found.check(request(**records, pad="4000,0,0,9000"))
    with pytest.raises(UsageError, match="with --pad the picture has 20030x20022 pixels, at most 64,000,000"):
        found.check(request(**records, pad="9999,9999,9999,9999"))


# Sizes ------------------------------------------------------------------------------------------------


def test_a_ratio_of_sides_gives_the_official_size():
    golden = read("family/kontext")
    ratios = [tuple(map(float, text.split(":"))) for text in json.loads(golden.metadata["aspect_ratios"])]
    assert [list(of_ratio(w / h, 1024**2)) for w, h in ratios] == golden.tensors["out.aspect_wh"].tolist()
    assert of_ratio(1 / 9999, 256**2) == (16, 25_584)  # never nothing


def test_a_reference_gets_the_official_size():
    golden = read("family/kontext")
    sizes, expected = (golden.tensors[name].tolist() for name in ("in.sizes_wh", "out.resolution_wh"))
    assert [list(nearest_size(tuple(size), KONTEXT.takes.sizes)) for size in sizes] == expected
    assert [list(kontext_size(*size)) for size in sizes] == expected


def asked(variant, found: Given, **fields) -> tuple[int, int] | None:
    size = natural_size(fields, found, variant)
    return (size["width"], size["height"]) if size else None


def image(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def masked(width: int, height: int) -> Given:
    return Given(image(width, height), Image.new("L", (width, height), 255))


@pytest.mark.parametrize(
    ("variant", "size", "pad", "expected"),
    [
        (MINI, (200, 150), None, (200, 150)),
        (MINI, (201, 155), "8,0,8,1", (217, 156)),
        (MINI, (256, 512), None, (256, 512)),  # twice the model's area
        (MINI, (257, 512), None, (181, 361)),  # more: the shape, at the model's area
        (MINI, (64, 64), None, (256, 256)),  # too small for it
        (MINI, (600, 200), None, (443, 148)),  # too long for it
        (DEV, (1360, 768), None, (1360, 768)),
        (FILL, (1000, 1001), "no number", (1000, 1001)),  # the request says what is wrong with the text
        (DEV, (6000, 4000), None, (1252, 834)),
    ],
)
def test_a_picture_that_is_painted_in_keeps_its_size_or_its_shape(variant, size, pad, expected):
    assert asked(variant, masked(*size), pad=pad) == expected
    if pad and pad[0].isdigit():
        left, top, right, bottom = map(int, pad.split(","))
        assert asked(variant, Given(image(*size)), pad=(left, top, right, bottom)) == expected
    scale = expected[0] / expected[1] * (size[1] / size[0])
    assert pad or abs(scale - 1) < 0.01


def test_who_says_a_side_or_draws_a_part_alone_gets_the_models_own_size():
    for fields in ({"width": "200"}, {"height": 200}, {"mask_padding": "0"}):
        assert asked(MINI, masked(200, 150), **fields) is None
    assert asked(MINI, Given(image(200, 150))) is None  # image-to-image
    assert asked(MINI, NOTHING) is None


def test_maps_and_references_decide_the_size_where_the_model_follows_them():
    assert asked(CANNY, Given(control=image(1024, 512))) == (1024, 512)
    assert asked(CANNY, Given(control=image(4096, 2048))) == (1448, 724)
    assert asked(KONTEXT, Given(references=(image(300, 400), image(10, 10)))) == (880, 1184)
    other = replace(KONTEXT, takes=Takes(references=True))
    assert asked(other, Given(references=(image(800, 600),))) == (800, 600)
    redux = VARIANTS["flux-dev-redux"]
    assert asked(redux, Given(references=(image(300, 400),))) is None  # taken in as words
    assert asked(MINI, Given(control=image(300, 400))) is None


# Notes ------------------------------------------------------------------------------------------------


def notes(name: str, found: Given, **fields) -> list[str]:
    records = {key: {"file": "", "sha256": ""} for key, x in
               {"init_image": found.image, "mask": found.mask, "control": found.control}.items() if x}  # fmt: skip
    records |= {"reference": [{"file": "", "sha256": ""} for _ in found.references]} if found.references else {}
    return list(size_notes(request(name=name, **records, **fields), found))


def half_masked(width: int, height: int) -> Given:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return Given(image(width, height), mask)


def test_pictures_as_they_are_drawn_have_no_notes():
    assert notes("flux-mini", half_masked(200, 150), width=200, height=150) == []
    assert notes("flux-mini", half_masked(900, 900), mask_padding=8) == []
    assert notes("flux-mini", Given(image(184, 150)), width=200, height=150, pad=(16, 0, 0, 0)) == []
    assert notes("flux-dev-canny", Given(control=image(105, 100)), width=512, height=512) == []
    assert notes("flux-dev-kontext", Given(references=(image(832, 1248),))) == []
    assert notes("flux-dev-redux", Given(references=(image(10, 900),))) == []  # SigLIP's square is no concern of ours


def test_what_is_scaled_or_stretched_is_noted():
    (line,) = notes("flux-mini", half_masked(900, 600), width=313, height=209)
    assert line.startswith("the picture of 900x600 pixels is drawn at 313x209. --mask-padding 32 draws")
    (line,) = notes("flux-mini", Given(image(900, 600)), width=320, height=200, pad=(100, 0, 0, 0))
    assert line == "the picture of 1000x600 pixels is drawn at 320x200"  # without a mask there is no part
    (line,) = notes("flux-mini", Given(image(100, 300)), width=256, height=256)
    assert "100x300, not the shape of 256x256" in line
    (line,) = notes("flux-dev-canny", Given(control=image(300, 100)), width=512, height=512)
    assert line == "the control picture is 300x100, not the shape of 512x512: it is stretched"
    (line,) = notes("flux-dev-kontext", Given(references=(image(100, 100), image(100, 900))))
    assert line == "the reference is 100x900, not the shape of 672x1568: it is stretched"
    assert notes("flux-mini", masked(256, 256)) == ["the mask is white everywhere: nothing of the picture is kept"]
