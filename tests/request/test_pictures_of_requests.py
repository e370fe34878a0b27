"""Which pictures go with which model, what a request makes of them, and the sentence where they do not go together."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_core.errors import UsageError
from flux_core.images.metadata import describe, parameters, read_request
from flux_core.images.output import save_picture
from flux_core.request.generation import GenerationRequest
from flux_core.request.pictures import Control, InitImage, Reference, read_pad
from flux_core.strength import skipped_steps
from flux_core.variants import VARIANTS

ROOM, MASK = InitImage(file="room.png", sha256="aa"), InitImage(file="mask.png", sha256="bb")
EDGES = Control(file="photo.png", sha256="cc", map="canny")
CUP, HALF_CUP = Reference(file="cup.png", sha256="dd"), Reference(file="cup.png", sha256="dd", weight=0.5)
PAINTED = {"init_image": ROOM, "mask": MASK}
WHOLE = {
    "flux-dev-fill": [PAINTED, {"init_image": ROOM, "pad": "8,0,0,0"}],
    "flux-dev-canny": [{"control": EDGES}, {"control": EDGES, **PAINTED}],
    "flux-dev-depth-lora": [{"control": Control(file="map.png", sha256="c")}],
    "flux-dev-kontext": [{"reference": (CUP,)}, {"reference": (CUP, CUP), "init_image": ROOM, "strength": 0.5}],
    "flux-dev-redux": [{"reference": (CUP, HALF_CUP)}, {"reference": (HALF_CUP,), **PAINTED, "mask_padding": 32}],
    "flux-mini": [{}, {"init_image": ROOM}, PAINTED, {"init_image": ROOM, "pad": (1, 2, 3, 4), "mask": MASK}],
}
"""for each of these models, pictures with which it draws"""
REQUESTS = [(name, fields) for name, several in WHOLE.items() for fields in several]


def request(**fields) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a red apple", "seed": 1, "force": True, **fields})


# What goes with what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "finding"),
    [
        ({"mask": MASK}, "--mask does nothing without --init-image: give the picture to paint in"),
        ({"pad": "8,8,8,8"}, "--pad does nothing without --init-image: give the picture to paint in"),
        ({"mask_padding": 8}, "--mask-padding does nothing without --mask: it draws the masked part alone"),
        ({"init_image": ROOM, "pad": "8,8,8,8", "mask_padding": 8}, "--mask-padding does nothing without --mask"),
        ({**PAINTED, "mask_padding": -1}, "--mask-padding must be a whole number from 0 to 4096, not -1"),
        ({**PAINTED, "mask_padding": "4097"}, "--mask-padding must be a whole number from 0 to 4096, not '4097'"),
        ({**PAINTED, "mask_padding": "wide"}, "--mask-padding must be a whole number from 0 to 4096, not 'wide'"),
        ({**PAINTED, "strength": 1.1}, "--strength must be a number from 0 to 1, not 1.1"),
        (
            {"control": EDGES},
            "flux-mini takes no --control. Next: leave it out, or --name with one of .*flux-dev-canny,",
        ),
        ({"reference": [CUP]}, "--name with one of .*flux-dev-kontext, flux-dev-redux, flux-schnell-redux"),
        ({"name": "flux-dev-fill", "control": EDGES}, "flux-dev-fill takes no --control"),
        ({"name": "flux-dev-canny", "reference": [CUP]}, "flux-dev-canny takes no --reference"),
        ({"name": "flux-dev-redux", "control": EDGES}, "flux-dev-redux takes no --control"),
        ({"name": "flux-dev-canny", "control": {"file": "", "sha256": "", "map": "cany"}}, "there is no map 'cany'"),
        ({"name": "flux-dev-kontext", "reference": [HALF_CUP]}, "changes a picture as a whole: a weight does nothing"),
        ({"name": "flux-dev-redux", "reference": [{"file": "", "sha256": "", "weight": 101}]}, "reference.*100"),
        ({"name": "flux-dev-redux", "reference": [{"file": "", "sha256": "", "weight": "nan"}]}, "reference.*finite"),
        ({"init_image": {"file": "a/b.png", "sha256": ""}}, "names a folder"),
    ],
)
def test_a_picture_that_would_do_nothing_is_refused_in_a_line(fields, finding):
    with pytest.raises(UsageError, match=finding) as caught:
        request(**fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


WRONG = ["", "8", "8,8,8", "8,8,8,8,8", "8,8,8,-8", "8,8,8,x", "8;8;8;8", "1e3,0,0,0", "1.5,0,0,0", "99999,0,0,0", 8]


@pytest.mark.parametrize("pad", [*WRONG, [8, 8, 8], [8, 8, 8, 8.5], [8, 8, 8, True], {"left": 8}])
def test_what_is_no_four_numbers_of_pixels_is_told(pad):
    with pytest.raises(UsageError, match=r"--pad: give pixels for left, top, right and bottom, as in 128,0,128,0, not"):
        request(init_image=ROOM, pad=pad)


@pytest.mark.parametrize("pad", ["8,0,16,0", " 8, 0 ,16,0 ", (8, 0, 16, 0), ["8", 0, "16", 0]])
def test_four_numbers_of_pixels_in_any_spelling(pad):
    made = request(init_image=ROOM, pad=pad)
    assert made.pad == (8, 0, 16, 0) and made.paints


def test_nothing_on_any_side_is_no_pad():
    made = request(init_image=ROOM, pad="0,0,0,0")
    assert made.pad is None and not made.paints and made.strength == 0.8
    assert request(pad="0,0,0,0").pad is read_pad(None) is None


@pytest.mark.parametrize(("name", "fields"), REQUESTS)
def test_with_its_pictures_a_model_draws(name, fields):
    request(name=name, **fields).check_whole()


@pytest.mark.parametrize(
    ("name", "fields", "finding"),
    [
        ("flux-dev-fill", {}, "paints into a picture. Next: --image FILE with --mask FILE, or with --pad"),
        ("flux-dev-fill", {"init_image": ROOM}, "flux-dev-fill paints into a picture"),
        ("flux-dev-canny", {}, "flux-dev-canny follows a map. Next: --control canny:FILE, or --control MAP.png"),
        ("flux-dev-canny-lora", {"init_image": ROOM}, "Next: --control canny:FILE"),
        ("flux-dev-depth", PAINTED, "Next: --control depth:FILE"),
        ("flux-dev-kontext", {"init_image": ROOM}, "flux-dev-kontext takes a picture. Next: --reference FILE"),
        ("flux-dev-redux", {"reference": []}, "flux-dev-redux takes a picture. Next: --reference FILE"),
        ("flux-schnell-redux", {}, "flux-schnell-redux takes a picture"),
    ],
)
def test_without_them_it_says_what_to_give(name, fields, finding):
    """Only before it draws: a request without pictures may get them later, as in Python."""
    made = request(name=name, **fields)
    with pytest.raises(UsageError, match=finding):
        made.check_whole()


def test_every_model_of_the_family_needs_a_picture_and_no_other_does():
    for name, row in VARIANTS.items():
        if row.takes:
            with pytest.raises(UsageError, match=f"{name} .*Next: --"):
                request(name=name).check_whole()
        else:
            request(name=name).check_whole()


@pytest.mark.parametrize("name", ["flux-dev-redux", "flux-schnell-redux"])
def test_pictures_as_words_need_no_others(name):
    """The official command has no prompt either."""
    made = GenerationRequest(name=name, seed=1, reference=[CUP])
    assert made.prompt == "" == GenerationRequest(name=name, prompt="", seed=1).prompt
    assert GenerationRequest(**json.loads(made.model_dump_json(exclude_none=True))) == made
    for other in ("flux-mini", "flux-dev-kontext"):
        with pytest.raises(UsageError, match="--prompt is missing, as in --prompt"):
            GenerationRequest(name=other)
        with pytest.raises(UsageError, match="--prompt has no words"):
            request(name=other, prompt=" ")


# What follows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "strength", "fit"),
    [
        ({}, None, None),
        ({"init_image": ROOM}, 0.8, "crop"),
        (PAINTED, 1.0, "crop"),
        ({"init_image": ROOM, "pad": "8,0,0,0", "fit": "pad"}, 1.0, "pad"),
        ({**PAINTED, "strength": None}, 1.0, "crop"),
        ({**PAINTED, "strength": 0.3}, 0.3, "crop"),
        ({"name": "flux-dev-canny", "control": EDGES}, None, None),
        ({"name": "flux-dev-redux", "reference": [CUP]}, None, None),
    ],
)
def test_what_is_painted_starts_from_noise_unless_it_says_otherwise(fields, strength, fit):
    made = request(**fields)
    assert (made.strength, made.fit) == (strength, fit)


@given(st.integers(1, 60), st.integers(0, 100), st.booleans())
def test_the_steps_that_are_computed(num_steps, percent, masked):
    strength = percent / 100
    fields = PAINTED if masked else {"init_image": ROOM}
    made = request(num_steps=num_steps, strength=strength, **fields)
    assert made.num_forward_steps == num_steps - skipped_steps(num_steps, strength)
    assert request(num_steps=num_steps, **PAINTED).num_forward_steps == num_steps


def test_a_picture_that_is_painted_in_has_an_effect_at_every_strength():
    (line,) = request(init_image=ROOM, strength=1).notes()
    assert "the init image has no effect" in line
    assert request(**PAINTED).notes() == request(init_image=ROOM, pad="8,0,0,0").notes() == []


MAP = Control(file="map.png", sha256="")


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("flux-mini", PAINTED, ", in room.png, painted where mask.png is white"),
        ("flux-mini", {"init_image": ROOM, "pad": "8,0,0,4"}, ", in room.png, extended by 8,0,0,4 pixels"),
        ("flux-mini", {**PAINTED, "strength": 0.5}, ", in room.png at strength 0.5, painted where mask.png is white"),
        ("flux-dev-canny", {"control": EDGES}, ", along canny of photo.png"),
        ("flux-dev-canny", {"control": MAP}, ", along the map of map.png"),
        ("flux-dev-redux", {"reference": [CUP, HALF_CUP]}, ", with cup.png, with cup.png at 0.5"),
    ],
)
def test_the_line_of_settings_names_the_pictures(name, fields, words):
    assert request(name=name, **fields).settings().endswith(words)


def test_no_models_own_guidance_is_called_high():
    assert not any("burnt" in line for name in VARIANTS for line in request(name=name).notes())
    assert any("burnt" in line for line in request(name="flux-dev-fill", guidance=31).notes())


@pytest.mark.parametrize(("name", "fields"), REQUESTS)
def test_it_comes_back_from_json_and_from_a_picture(name, fields, tmp_path):
    made = request(name=name, width=64, height=32, **fields)
    assert GenerationRequest(**json.loads(made.model_dump_json(exclude_none=True)), force=True) == made
    path = save_picture(describe(Image.new("RGB", (64, 32)), made), tmp_path, "p")
    read = read_request(path)
    assert read.model_dump() == made.model_dump() and read.check_whole() is None
    assert ("Denoising strength" in parameters(made)) == ("init_image" in fields)


def test_records_name_no_folder_and_hold_no_other_field():
    for wrong in ({"file": "x", "sha256": "", "path": "/etc"}, {"file": "../x", "sha256": ""}, {"file": "x"}, "x.png"):
        for name in ("init_image", "mask", "control"):
            with pytest.raises(UsageError, match=name.replace("_", "-")):
                request(**{name: wrong})
        with pytest.raises(UsageError, match="reference"):
            request(reference=[wrong])
