"""Pictures that follow a ControlNet: diffusers' velocities and steps, a plan beside it, and true CFG."""

import json
from dataclasses import replace

import pytest
import torch
from controlnets import PLAIN, UNION, golden, golden_flux, random_net, xlabs_params
from tiny import tiny_pipeline

from flux_core.errors import UsageError
from flux_core.hooks import Capture, HookRun, Skip
from flux_core.params import ControlNetParams
from flux_core.pipeline.conditions import conditioned
from flux_core.pipeline.controlnet import ControlNetCondition
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import FlowInputs, euler, flow_velocity, get_noise, get_schedule, pack
from flux_core.sampling.guidance import cfg_velocity, two_passes

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = golden().group("in.")
GOLDEN_SIZE = (96, 64)
FAST = {"width": 48, "height": 32, "num_steps": 4, "force": True}
SIZE, TOKENS = (48, 32), 6
CFG = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0}


# diffusers -------------------------------------------------------------------------------------------


def golden_inputs(rows=slice(None)) -> FlowInputs:
    names = {"img_ids": "img_ids", "txt": "txt", "txt_ids": "txt_ids", "vec": "y", "guidance": "guidance"}
    return FlowInputs(**{ours: INPUTS[name][rows] for ours, name in names.items()})


def velocity(inputs, *conditions, sigmas=()):
    inputs, run = conditioned(inputs, conditions, GOLDEN_SIZE, None)
    return flow_velocity(golden_flux(), **vars(inputs), run=run, sigmas=sigmas)


def near(found, name):
    assert torch.allclose(found, golden().tensors[name], atol=1e-5, rtol=0)


def by_rows(*conditions):
    """The velocity of both rows, each at a time of its own."""
    found = []
    for i, sigma in enumerate(INPUTS["timesteps"].tolist()):
        row = slice(i, i + 1)
        own = [replace(condition, cond=condition.cond[row]) for condition in conditions]
        found.append(velocity(golden_inputs(row), *own)(INPUTS["img"][row], sigma))
    return torch.cat(found)


def condition_of(case, **more):
    told = case.told
    return ControlNetCondition(case.net(), case.cond, **{"scale": told["scale"], "mode": told.get("mode")} | more)


@pytest.mark.parametrize("case", [PLAIN, UNION], ids=["plain", "union"])
def test_the_velocity_of_diffusers(case):
    near(by_rows(condition_of(case)), f"{case.name}.out.velocity")
    near(by_rows(), "out.velocity_without")


def test_several_conditions_add_up():
    told = json.loads(golden().metadata["cases"])["multi"]
    given = zip((UNION.cond, golden().tensors["multi.in.cond2"]), told["scales"], told["modes"], strict=True)
    conditions = [ControlNetCondition(UNION.net(), cond, scale, mode=mode) for cond, scale, mode in given]
    near(by_rows(*conditions), "multi.out.velocity")
    near(by_rows(*reversed(conditions)), "multi.out.velocity")


@pytest.mark.parametrize("case", [PLAIN, UNION], ids=["plain", "union"])
def test_the_steps_of_diffusers(case):
    told, sigmas = case.told, case.told["timesteps"]
    condition = condition_of(case, start=told["start"], end=told["end"])
    assert [condition.is_active(i, 4) for i in range(4)] == [keep == 1 for keep in told["keep"]]
    drawn = euler(velocity(golden_inputs(), condition, sigmas=sigmas[:-1]), INPUTS["img"], sigmas)
    assert torch.allclose(drawn, golden().tensors[f"{case.name}.out.denoised"], atol=2e-5, rtol=0)


# In a pipeline ---------------------------------------------------------------------------------------


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def condition(pipeline):
    of = pipeline.variant.params
    net = random_net(ControlNetParams(**{**vars(of), "blocks": (of.depth, of.depth_single_blocks)}))
    return ControlNetCondition(net, torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(1)), scale=0.8)


def request(**fields) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a red apple", "seed": 3, **FAST, **fields})


def start():
    noise = pack(get_noise(1, SIZE[1], SIZE[0], "cpu", torch.float32, 3))
    return noise, get_schedule(4, TOKENS, shift=True)


def inputs_of(pipeline, *prompts):
    return pipeline.denoiser.inputs(prompts, [3.5] * len(prompts), SIZE)


@torch.no_grad()
def residuals_of(condition, inputs, x, sigma):
    ones = torch.ones(1)
    given = inputs.txt, inputs.txt_ids, sigma * ones, inputs.vec, inputs.guidance
    return condition.net(x, inputs.img_ids, condition.cond, *given).map(lambda y: condition.scale * y)


def test_a_users_hooks_see_the_residuals_between_the_blocks(pipeline, condition):
    (x, sigmas), values = start(), {}
    sites = ["double_blocks.0.img.out", "single_blocks.0.*.in", "single_blocks.0.*.out", "velocity"]
    run = HookRun([Capture(sites=sites, into=values)], pipeline.variant.params, sigmas)
    given = ["a red apple"], [3.5], SIZE, run, sigmas[:-1], [condition]
    with torch.no_grad():
        v = pipeline.denoiser.velocity(*given)(x, sigmas[1])
        last = pipeline.model.final_layer
    found = {name.partition(".")[2]: x for name, x in values.items()}
    expected = residuals_of(condition, inputs_of(pipeline, "a red apple"), x, sigmas[1])
    after, before = found["single_blocks.0.img.in"], found["double_blocks.0.img.out"]
    assert torch.allclose(after - before, expected.double[0], atol=1e-5)
    assert torch.equal(found["velocity"], v) and len(found) == 6
    with torch.no_grad():
        given = inputs_of(pipeline, "a red apple")
        vec = pipeline.model.embed_vec(torch.tensor([sigmas[1]]), given.vec, given.guidance)
        steered = last(found["single_blocks.0.img.out"] + expected.single[0], *last.modulation(vec))
    assert torch.allclose(steered, v, atol=1e-5)


@pytest.mark.parametrize("plan", [(), (Skip(blocks="layer.0", steps="1-2"),)], ids=["alone", "with a plan"])
def test_a_picture_follows_it_beside_a_plan(pipeline, condition, plan):
    x, sigmas = start()
    hooks = HookRun(plan, pipeline.variant.params, sigmas)
    inputs, run = conditioned(inputs_of(pipeline, "a red apple"), [condition], SIZE, hooks)
    with torch.no_grad():
        x = euler(flow_velocity(pipeline.model, **vars(inputs), run=run, sigmas=sigmas[:-1]), x, sigmas)
    drawn = pipeline.draw(request(plan=plan), conditions=[condition])
    assert drawn.tobytes() == pipeline.picture(x, request()).tobytes()
    assert drawn.tobytes() != pipeline.draw(request(plan=plan)).tobytes()
    assert (drawn.tobytes() != pipeline.draw(request(), conditions=[condition]).tobytes()) == bool(plan)


def test_at_scale_zero_and_outside_its_steps_nothing_changes(pipeline, condition):
    plain = pipeline.draw(request()).tobytes()
    assert pipeline.draw(request(), conditions=[replace(condition, scale=0.0)]).tobytes() == plain
    parts = [replace(condition, start=a, end=b) for a, b in ((0, 0.2), (0.1, 0.45), (0.8, 1))]
    assert pipeline.draw(request(), conditions=parts).tobytes() == plain  # none holds a quarter of the steps
    assert pipeline.draw(request(), conditions=[replace(condition, end=0.25)]).tobytes() != plain


def test_pixels_need_no_latent(pipeline):
    net = random_net(xlabs_params(pipeline.variant.params))
    light, dark = (ControlNetCondition(net, torch.full((1, 3, 32, 48), x)) for x in (1.0, -1.0))
    drawn = {pipeline.draw(request(), conditions=given).tobytes() for given in ([], [light], [dark])}
    assert len(drawn) == 3


@pytest.mark.parametrize("together", [True, False], ids=["rows of a batch", "two passes"])
def test_a_negative_prompt_gets_the_residuals_of_the_positive(pipeline, condition, together):
    x, sigmas = start()
    positive, negative = (inputs_of(pipeline, prompt) for prompt in ("a red apple", "a blue car"))

    def steered(inputs, seen):
        return flow_velocity(pipeline.model, **vars(inputs), run=condition.run(seen), sigmas=sigmas[:-1])

    def drawn(seen):
        pair = two_passes(steered(positive, positive), steered(negative, seen))
        return euler(cfg_velocity(pair, sigmas, 3.0), x, sigmas)

    pipeline.denoiser.one_batch = together
    with torch.no_grad():
        found = pipeline.denoiser.denoise([request(**CFG)], conditions=[condition])
        assert torch.allclose(found, drawn(positive), atol=1e-5)
        assert not torch.allclose(found, drawn(negative), atol=1e-3)


def test_rows_of_pictures_follow_one_condition(pipeline, condition):
    requests = [request(**CFG), request(**{**CFG, "prompt": "a green pig", "seed": 4})]
    with torch.no_grad():
        rows = pipeline.denoiser.denoise(requests, conditions=[condition])
        alone = [pipeline.denoiser.denoise([one], conditions=[condition]) for one in requests]
    assert torch.allclose(rows, torch.cat(alone), atol=1e-5)


def test_only_the_tokens_that_are_drawn_are_steered(pipeline, condition):
    """Text comes before them, and with Kontext the tokens of another picture after them."""
    inputs, (x, sigmas) = inputs_of(pipeline, "a red apple"), start()
    run = condition.run(inputs)
    run.begin(sigmas[0])
    with torch.no_grad():
        run.see(x, sigmas[:-1])
    expected = residuals_of(condition, inputs, x, sigmas[0])
    long, txt = torch.zeros(1, TOKENS + 3, 16), torch.zeros(1, 4, 16)
    img, words = run.double_block("double_blocks.0", lambda img, txt, pe: (img, txt), long, txt, (), None)
    assert torch.allclose(img[:, :TOKENS], expected.double[0], atol=1e-6)
    assert not img[:, TOKENS:].any() and words is txt
    both = run.single_block("single_blocks.0", lambda x, pe: x, torch.cat((txt, long), dim=1), 4, (), None)
    assert torch.allclose(both[:, 4 : 4 + TOKENS], expected.single[0], atol=1e-6)
    assert not both[:, :4].any() and not both[:, 4 + TOKENS :].any()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mode": 1}, "for conditions of one kind. Next: leave the mode out"),
        ({"start": 0.5, "end": 0.5}, "must be in order"),
        ({"end": 1.5}, "between 0 and 1"),
        ({"net": UNION.net()}, "a union of 4 kinds. Next: give a mode from 0 to 3"),
        ({"net": UNION.net(), "mode": 4}, "a union of 4 kinds"),
    ],
)
def test_what_cannot_be_meant(condition, changes, text):
    with pytest.raises(UsageError, match=text):
        replace(condition, **changes)


def test_a_condition_of_another_size(pipeline, condition):
    wrong = replace(condition, cond=torch.zeros(1, 5, 64))
    with pytest.raises(UsageError, match=r"is \[1, 5, 64\], and for a picture of 48x32 pixels it takes \['B', 6, 64\]"):
        pipeline.draw(request(), conditions=[wrong])
    pixels = ControlNetCondition(random_net(xlabs_params(pipeline.variant.params)), torch.zeros(1, 3, 48, 32))
    with pytest.raises(UsageError, match=r"it takes \['B', 3, 32, 48\]"):
        pipeline.draw(request(), conditions=[pixels])
