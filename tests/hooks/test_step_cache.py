"""Steps left out: what they follow, what pictures record of it, and presets for any number of steps."""

import json

import pytest
import torch
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.errors import FileError, UsageError
from flux_core.hooks import Custom, FirstBlockCache, Skip, StepCache
from flux_core.hooks.step_cache import PRESETS
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.request.generation import GenerationRequest
from flux_core.request.plans import given_plan
from flux_core.sampling import euler, get_schedule

SIGMAS = get_schedule(12, 256)
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:true CFG")]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def draw(pipeline, *plan, steps=6, **fields):
    size = {"width": 32, "height": 32, "force": True}
    return pipeline.generate("a red apple", 1, num_steps=steps, plan=list(plan), **size, **fields)[0]


def recorded(image):
    return json.loads(image.info["flux_core"])


def forwards(pipeline, *plan, **fields):
    """The steps at which the model runs, by a hook at its first value."""
    ran = []
    draw(pipeline, Custom(sites="vec", fn=lambda at, x: ran.append(at.step), reads=True), *plan, **fields)
    return ran


def followed(cache, velocity, sigmas=SIGMAS):
    return euler(cache.following(velocity, sigmas), torch.ones(1, dtype=torch.float64), sigmas)


def test_slope_1_is_exact_where_the_velocity_is_linear_in_sigma():
    cache, reused = (StepCache(steps="2-11/3,3-11/3", slope=slope) for slope in (1.0, 0.0))

    def linear(x, sigma):
        return torch.full_like(x, 3 * sigma - 2)

    exact = followed(cache, linear)
    torch.testing.assert_close(exact, euler(linear, torch.ones(1, dtype=torch.float64), SIGMAS))
    ran = [step for step in range(12) if step not in cache.steps]
    held = [3 * SIGMAS[max(x for x in ran if x <= step)] - 2 for step in range(12)]
    by_hand = 1 + sum(v * (b - a) for v, a, b in zip(held, SIGMAS, SIGMAS[1:], strict=False))
    torch.testing.assert_close(followed(reused, linear).item(), by_hand)


def test_each_step_has_its_own_slope_and_one_step_that_ran_none():
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    at = {1.0: 5.0, 0.6: 7.0}
    seen = []
    velocity = StepCache(steps="1,3,4", slope=(2.0, 0.5, -1.0)).following(lambda x, sigma: at[sigma], sigmas)
    seen = [velocity(None, sigma) for sigma in sigmas[:-1]]
    assert seen == pytest.approx([5, 5, 7, 7 + 0.5 * 0.5 * 2, 7 - 1.0 * 2])


def test_the_model_runs_at_the_other_steps_alone(pipeline):
    assert forwards(pipeline, StepCache(steps="2,4-5")) == [0, 1, 3]
    assert forwards(pipeline, StepCache(steps="1-5/2"), true_cfg_scale=2.0) == [0, 2, 4]


def test_an_init_image_leaves_the_schedules_first_steps_out(pipeline, tmp_path):
    picture = tmp_path / "start.png"
    draw(pipeline).save(picture)
    given = {"init_image": str(picture), "strength": 0.5}  # of steps 3 to 5
    assert forwards(pipeline, StepCache(steps="1,3,5", num_steps=6), **given) == [0, 1]
    assert forwards(pipeline, StepCache(steps="1", num_steps=6), **given) == [0, 1, 2]
    assert forwards(pipeline, StepCache(steps="1"), **given) == [0, 2]  # counted from the first that is drawn
    plain = draw(pipeline, **given)
    assert draw(pipeline, StepCache(steps="1-3", num_steps=6), **given).tobytes() == plain.tobytes()


def test_a_picture_with_all_its_steps_is_the_plain_one_and_other_caches_work_beside(pipeline):
    plain = draw(pipeline)
    both = draw(pipeline, StepCache(steps="5"), FirstBlockCache(threshold=0))
    assert both.tobytes() == draw(pipeline, StepCache(steps="5")).tobytes() != plain.tobytes()
    assert draw(pipeline, StepCache(preset="fast"), steps=1).tobytes() == draw(pipeline, steps=1).tobytes()


def test_guidance_is_left_out_with_its_step(pipeline):
    """The step cache is around the guided velocity: the same as around one that is guided by hand."""
    guided = draw(pipeline, StepCache(steps="2-3"), true_cfg_scale=3.0, negative_prompt="a blue heart")
    size = {"width": 32, "height": 32}
    good, bad = (pipeline.velocity(text, **size) for text in ("a red apple", "a blue heart"))
    sigmas, x = pipeline.schedule(6, **size), pipeline.noise(1, **size)
    with torch.no_grad():
        cache = StepCache(steps="2-3")
        x = euler(cache.following(lambda x, s: bad(x, s) + 3 * (good(x, s) - bad(x, s)), sigmas), x, sigmas)
    difference = [abs(a - b) for a, b in zip(guided.tobytes(), pipeline.decode(x, **size)[0].tobytes(), strict=True)]
    assert max(difference) <= 1


def test_a_record_holds_the_steps_and_repeats(pipeline):
    image = draw(pipeline, StepCache(preset="faster"), steps=28)
    (entry,) = recorded(image)["plan"]
    assert tuple(entry["steps"]) == tuple(PRESETS["faster"].slopes) and entry["num_steps"] == 28
    again = pipeline.generate(GenerationRequest(**{k: v for k, v in recorded(image).items() if k in (
        "prompt", "seed", "width", "height", "num_steps", "plan")}, force=True))[0]  # fmt: skip
    assert again.tobytes() == image.tobytes()
    entry["steps"], entry["slope"] = entry["steps"][1:], entry["slope"][1:]  # as another version's preset
    request = GenerationRequest(prompt="x", num_steps=28, plan=[entry])
    assert request.plan[0].steps == tuple(entry["steps"])


def test_a_searched_file_is_an_entry_of_a_plan_that_pictures_do_not_quote():
    searched = {"forwards": 5, "width": 32, "height": 32, "weights": {}, "prompts": ["a"], "seeds": [1], "psnr_db": 30}
    searched |= {"held_out_prompts": ["b"], "held_out_seeds": [2], "held_out_psnr_db": 29, "by_hand_psnr_db": {}}
    entry = {"kind": "step_cache", "steps": [5], "num_steps": 6, "model": "flux-mini", "searched": searched}
    request = GenerationRequest(prompt="x", num_steps=6, plan=[entry])
    assert request.plan[0].searched.psnr_db == 30
    assert "searched" not in request.model_dump_json()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_any_number_of_steps(preset):
    own = PRESETS[preset]
    share = own.num_steps - len(own.slopes)
    for number in (1, 2, 3, 4, 7, 8, 15, 20, 27, 28, 29, 50, 100):
        entry = GenerationRequest(prompt="x", num_steps=number, plan=[{"kind": "step_cache", "preset": preset}]).plan[0]
        left_out = entry.steps or ()
        assert (
            number - len(left_out) == max(min(number, 2), round(share * number / own.num_steps)) and 0 not in left_out
        )
        assert len(entry.slope) == len(left_out)


def test_doubled_steps_run_at_the_same_places():
    for preset in PRESETS.values():
        own = [step for step in range(28) if step not in preset.slopes]
        doubled = [step for step in range(56) if step not in preset.of(56)]
        assert doubled[::2] == [2 * step for step in own]


@pytest.mark.parametrize(("entry", "finding"), [
    ({}, 'no steps to leave out: write "steps"'),
    ({"preset": "fastest"}, "'fast' or 'faster'"),
    ({"steps": "0-3"}, "step 0 has none before it to repeat. Next: leave out steps from 1 on"),
    ({"steps": "1,9"}, "there is no step 9, the last is 5"),
    ({"steps": "1-2", "slope": [1]}, "1 slopes for 2 steps"),
    ({"steps": "1-2", "num_steps": 28}, "chosen for 28 steps, not for 6. Next: .*cache search"),
    ({"steps": "1-2", "model": "flux-dev"}, "chosen for flux-dev, not for flux-mini. Next: .*cache search"),
])  # fmt: skip
def test_what_does_not_fit_is_said(entry, finding):
    with pytest.raises(UsageError, match=finding):
        GenerationRequest(prompt="x", num_steps=6, plan=[{"kind": "step_cache", **entry}])


def test_the_flag_takes_presets_and_files(tmp_path):
    file = tmp_path / "cache.json"
    file.write_text('{"kind": "step_cache", "steps": [5], "num_steps": 6}', encoding="utf-8")
    plan = given_plan({"cache": str(file), "skip": ["layer.1"]})
    assert plan == (Skip(blocks="layer.1"), StepCache(steps=[5], num_steps=6))
    assert given_plan({"cache": "faster"}) == (StepCache(preset="faster"),)
    file.write_text('[{"kind": "skip", "blocks": ["layer.1"]}]', encoding="utf-8")
    with pytest.raises(UsageError, match="no file of cache search"):
        given_plan({"cache": str(file)})
    with pytest.raises(FileError, match=r"no file fastr; presets are fast, faster\. Did you mean fast"):
        given_plan({"cache": "fastr"})


def test_commands_draw_record_and_repeat_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", "a red apple", "--width", "32", "--height", "32", "--force", "--cache", "fast"]
    assert main(["explore", *flags, "--seeds", "1", "--steps", "8,6"]) == 0
    drawn = map(read_request, tmp_path.rglob("inference_steps_images/*.png"))
    found = {request.num_steps: request.plan[0] for request in drawn}
    assert {steps: len(entry.steps) for steps, entry in found.items()} == {6: 3, 8: 4}
    assert main([*flags, "--seed", "1", "--steps", "6", "--output-dir", "drawn"]) == 0
    (drawn,) = tmp_path.glob("drawn/*.png")
    assert main(["--from-image", str(drawn), "--force", "--output-dir", "again"]) == 0
    (again,) = tmp_path.glob("again/*.png")
    assert again.read_bytes() == drawn.read_bytes()
