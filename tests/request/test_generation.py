"""A request is whole, within bounds, and says in one line what is wrong (users.md 4c, rows 30 to 36)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_core.errors import UsageError
from flux_core.request.fields import FIELDS, MAX_SEED, REQUEST
from flux_core.request.generation import DRAWN_BY, GenerationRequest
from flux_core.variants import VARIANTS


def request(**fields) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a red apple", "seed": 1, **fields})


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_left_out_comes_from_the_row(name):
    made, row = request(name=name), VARIANTS[name]
    assert (made.width, made.height, made.num_steps) == (row.width, row.height, row.num_steps)
    assert made.guidance == (row.guidance if row.params.guidance_embed else None)


def test_none_is_the_same_as_left_out():
    assert request(width=None, guidance=None, dtype=None, init_image=None) == request()


def test_the_table_and_the_request_have_the_same_fields():
    computed = DRAWN_BY
    by_its_own_flags = {"plan", "batch"}
    assert {field.name for field in REQUEST} == set(GenerationRequest.model_fields) - computed - by_its_own_flags


WRONG = [
    ("width", ["0", "-16", "1", "15", "17", "100", "10000", "1000000000", "1e9", "abc", "1024.5", "nan", ""]),
    ("height", [0, -16, 10**9, 1024.5, float("nan"), float("inf"), [256], {}]),
    ("num_steps", ["0", "-1", "10001", "4.5", "many"]),
    ("guidance", ["nan", "inf", "-inf", "-1", "1e9", "high"]),
    ("true_cfg_scale", ["nan", "inf", "0.5", "0", "-1", "101", "high"]),
    ("cfg_zero", ["-1", "1.5", "yes"]),
    ("mimic_scale", ["0", "nan", "101"]),
    ("threshold_percentile", ["0.99", "101", "nan"]),
    ("cfg_schedule", ["cosinus", "", 7]),
    ("negative_prompt", ["a\udc80b", 7, ["a"]]),
    ("seed", ["-2", 2**32, 2**64, "9" * 5000, "abc", "1e3", "1.5"]),
    ("num_images", ["0", "-1", "1001", "two"]),
    ("strength", ["-0.1", "1.1", "nan"]),
    ("dtype", ["float16", "int3", "", 7]),
    ("name", ["flux", "", 7, "../flux-mini"]),
    ("prompt", ["", " ", "\t\n", "\u3000", "a\udc80b", 7, ["a"]]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG for value in values])
def test_wrong_values_are_refused_in_one_short_line(name, value):
    with pytest.raises(UsageError) as caught:
        request(**{name: value})
    text = str(caught.value)
    text.encode()  # also a prompt of half characters can be told of on any terminal
    assert "\n" not in text and len(text) < 250
    assert FIELDS[name].flag in text or "unknown model name" in text


@pytest.mark.parametrize(
    ("fields", "finding"),
    [
        ({"negative_prompt": "x"}, "--negative-prompt does nothing without --true-cfg-scale.*as in --true-cfg-scale 2"),
        ({"negative_prompt": "x", "true_cfg_scale": "1"}, "--negative-prompt does nothing at --true-cfg-scale 1"),
        ({"negative_prompt": "x", "true_cfg_scale": "0.5"}, "--true-cfg-scale must be a number from 1 to 100"),
        ({"cfg_zero": 1}, "--cfg-zero does nothing without --true-cfg-scale"),
        ({"mimic_scale": 2}, "--mimic-scale does nothing without --true-cfg-scale"),
        ({"threshold_percentile": 99}, "--threshold-percentile does nothing without --true-cfg-scale"),
        ({"cfg_schedule": "linear", "true_cfg_scale": 1}, "--cfg-schedule does nothing at --true-cfg-scale 1"),
        ({"threshold_percentile": 99, "true_cfg_scale": 2}, "does nothing without --mimic-scale.*add --mimic-scale"),
        ({"cfg_zero": 4, "num_steps": 4, "true_cfg_scale": 2}, "--cfg-zero 4 leaves none of 4"),
    ],
)
def test_steering_that_would_do_nothing_says_what_to_add(fields, finding):
    with pytest.raises(UsageError, match=finding):
        request(**fields)


@pytest.mark.parametrize("fields", [{"negative_prompt": ""}, {"negative_prompt": " "}, {"true_cfg_scale": 1}])
def test_no_words_and_scale_1_are_no_steering(fields):
    made = request(**fields)
    assert not made.uses_true_cfg and made.negative_prompt is None and made.texts == ("a red apple",)


def test_unknown_field_names_the_nearest():
    with pytest.raises(UsageError, match=r"widht.*Did you mean width"):
        request(widht=256)


def test_missing_prompt_names_its_flag():
    with pytest.raises(UsageError, match="--prompt is missing"):
        GenerationRequest()


def test_a_prompt_without_words_needs_permission():
    assert request(prompt="  ", allow_empty_prompt=True).prompt == "  "


@pytest.mark.parametrize(("width", "made"), [(1, 16), (17, 32), (1000, 1008), (512, 512)])
def test_forced_sizes_are_made_at_the_next_multiple_of_16(width, made):
    forced = request(width=width, force=True)
    assert forced.width == width and forced.padded_size == (made, 256)


def test_force_has_an_end():
    with pytest.raises(UsageError, match="65536"):
        request(width=10**9, force=True)


def test_permissions_do_not_ride_in_a_file():
    record = json.loads(request(force=True, allow_empty_prompt=True).model_dump_json())
    assert not record.keys() & {"force", "allow_empty_prompt"}


@pytest.mark.parametrize("seed", [-1, "-1", None])
def test_random_seeds_are_real_ones_and_differ(seed):
    seeds = {request(seed=seed, num_images=1000).seed for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= seed <= MAX_SEED - 999 for seed in seeds)


def test_images_have_consecutive_seeds():
    images = request(seed=7, num_images=3).images()
    assert [(one.seed, one.num_images) for one in images] == [(7, 1), (8, 1), (9, 1)]
    assert request(seed=MAX_SEED).images()[0].seed == MAX_SEED
    with pytest.raises(UsageError, match="past the last seed"):
        request(seed=MAX_SEED, num_images=2)


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"width": 200}, "200x256 is drawn at 208x256"),
        ({"guidance": 11}, "guidance 11 is high"),
        ({"name": "flux-schnell", "num_steps": 9}, "made for 4 steps"),
        ({"name": "flux-schnell", "guidance": 3.5}, "takes no guidance"),
        ({"strength": 0.5}, "without --init-image"),
        ({"prompt": "é" * 40_000}, "64 KB"),
        ({"negative_prompt": "x", "true_cfg_scale": 2}, "two forwards a step, about twice the time"),
    ],
)
def test_what_may_surprise_is_noted_once(fields, note):
    notes = request(**fields).notes()
    assert len(notes) == 1 and note in notes[0]


def test_a_plain_request_has_no_notes():
    assert request().notes() == [] and request(name="flux-schnell").notes() == []


def test_away_from_nothing_and_a_bound_above_the_scale_are_noted():
    notes = request(true_cfg_scale=2, mimic_scale=3).notes()
    assert any("empty prompt" in note for note in notes) and any("next to nothing" in note for note in notes)


def test_requests_do_not_change():
    with pytest.raises(Exception, match="frozen"):
        request().seed = 2


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1)


@given(TEXT, st.integers(0, MAX_SEED), st.integers(128, 512), st.floats(0, 100))
def test_json_round_trip(prompt, seed, width, guidance):
    made = request(prompt=prompt, seed=seed, width=width, guidance=guidance, allow_empty_prompt=True)
    text = made.model_dump_json(exclude_none=True)
    again = GenerationRequest(**json.loads(text), allow_empty_prompt=True)
    assert again == made
