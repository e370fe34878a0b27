"""True CFG, CFG-Zero* and dynamic thresholding: closed forms on velocities, and pictures of a pipeline."""

import math
import warnings

import pytest
import torch
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from golden_files import distance
from PIL import Image
from tiny import short_of_memory, tiny_pipeline

from flux_core.errors import MemoryShortage, NonFiniteError, UsageError
from flux_core.hooks import Capture, Custom, ShareKV, Skip
from flux_core.methods.stable_flow import Editing
from flux_core.request.fields import CFG_SCHEDULES
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import euler, flow_velocity, get_noise, get_schedule, image_ids, pack
from flux_core.sampling.guidance import (
    SCHEDULES,
    cfg_velocity,
    guided,
    one_batch,
    optimized_scale,
    threshold,
    two_passes,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DRAW = torch.Generator().manual_seed(0)
X, POSITIVE, NEGATIVE = torch.randn(3, 2, 6, 64, generator=DRAW)
SIGMAS = get_schedule(4, 6)
FAST = {"width": 48, "height": 32, "num_steps": 3, "force": True}
CFG = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0}
INIT = Image.radial_gradient("L").convert("RGB")


def constant(x, sigma):
    return POSITIVE, NEGATIVE


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def draw(pipeline, prompt="a red apple", seed=3, **fields) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline.generate(prompt, seed, **{**FAST, **fields})[0]


def pixels(image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


# --- velocities


def test_scale_1_is_the_positive_velocity_to_the_bit():
    assert torch.equal(guided(POSITIVE, NEGATIVE, 1.0), POSITIVE)
    assert torch.equal(cfg_velocity(constant, SIGMAS, 1.0)(X, 0.9), POSITIVE)
    x = euler(lambda x, sigma: POSITIVE * x, X, SIGMAS)
    pair = two_passes(lambda x, sigma: POSITIVE * x, lambda x, sigma: NEGATIVE * x)
    assert torch.equal(euler(cfg_velocity(pair, SIGMAS, 1.0), X, SIGMAS), x)


@pytest.mark.parametrize("scale", [1.5, 4.0, 30.0])
def test_true_guidance_goes_on_beyond_the_positive_velocity(scale):
    expected = NEGATIVE.double() + scale * (POSITIVE.double() - NEGATIVE.double())
    assert distance(guided(POSITIVE, NEGATIVE, scale), expected) <= 1e-6
    assert torch.equal(guided(POSITIVE, POSITIVE, scale), POSITIVE)


def test_one_batch_has_positive_and_negative_in_turn():
    rows = torch.stack((POSITIVE, NEGATIVE), 1).flatten(0, 1)
    found = one_batch(lambda x, sigma: rows * x * sigma)(X, 0.5)
    expected = two_passes(lambda x, s: POSITIVE * x * s, lambda x, s: NEGATIVE * x * s)(X, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_best_scale_leaves_nothing_along_the_negative_velocity():
    s = optimized_scale(POSITIVE, NEGATIVE)
    assert s.shape == (2, 1, 1)
    left = ((POSITIVE - s * NEGATIVE) * NEGATIVE).sum((1, 2)) / (NEGATIVE**2).sum((1, 2))
    assert left.abs().max() <= 1e-6
    assert torch.allclose(s[:, 0], cfg_zero_star_scale(POSITIVE.flatten(1), NEGATIVE.flatten(1)))
    assert optimized_scale(POSITIVE, torch.zeros_like(POSITIVE)).abs().max() == 0


@pytest.mark.parametrize("factor", [-2.0, 0.25, 3.0])
def test_of_parallel_velocities_cfg_zero_leaves_the_positive_one(factor):
    """v+ = f v-: s* is f, and with s* v- = v+ every scale gives v+."""
    negative = POSITIVE / factor
    assert torch.allclose(optimized_scale(POSITIVE, negative), torch.full((2, 1, 1), factor))
    velocity = cfg_velocity(lambda x, sigma: (POSITIVE, negative), SIGMAS, 5.0, zero_steps=0)
    assert distance(velocity(X, 0.9), POSITIVE) <= 1e-6


def test_cfg_zero_stands_still_first_and_asks_for_nothing():
    asked = []

    def pair(x, sigma):
        asked.append(sigma)
        return POSITIVE, NEGATIVE

    seen = []
    euler(cfg_velocity(pair, SIGMAS, 3.0, zero_steps=2), X, SIGMAS, on_step=seen.append)
    assert asked == SIGMAS[2:4]
    assert torch.equal(seen[1].x, X) and not torch.equal(seen[2].x, X)
    expected = guided(POSITIVE, optimized_scale(POSITIVE, NEGATIVE) * NEGATIVE, 3.0)
    assert torch.equal(seen[2].velocity, expected)


def predicted(v, sigma):
    """The picture that a velocity means, [B, channel, L * 4], and its mean."""
    data = (X - sigma * v).unflatten(-1, (16, 4)).permute(0, 2, 1, 3).flatten(2)
    return data, data.mean(-1, keepdim=True)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 100.0])
def test_thresholding_at_the_same_scale_is_the_identity_to_the_bit(percentile):
    plain = cfg_velocity(constant, SIGMAS, 4.0)
    same = cfg_velocity(constant, SIGMAS, 4.0, mimic_scale=4.0, percentile=percentile)
    for sigma in SIGMAS[:-1]:
        assert torch.equal(same(X, sigma), plain(X, sigma))


@pytest.mark.parametrize("percentile", [70.0, 100.0])
def test_thresholding_brings_the_percentile_to_the_mimic_scale(percentile):
    """The largest of what is left, and the percentile of what was, are the largest at the mimic scale."""
    sigma, high, low = 0.8, guided(POSITIVE, NEGATIVE, 8.0), guided(POSITIVE, NEGATIVE, 1.5)
    held, _ = predicted(threshold(high, low, X, sigma, percentile), sigma)
    (before, mean), (bound, tint) = predicted(high, sigma), predicted(low, sigma)
    before, after, largest = (before - mean).abs(), (held - tint).abs(), (bound - tint).abs().amax(-1)
    assert torch.allclose(after.amax(-1), largest, rtol=1e-4)
    of_before = torch.quantile(before, percentile / 100, dim=-1)
    assert (of_before > largest).all(), "or nothing was bounded"
    below = before < of_before[..., None]
    ratio = (largest / of_before)[..., None].expand_as(before)
    assert torch.allclose(after[below], (before * ratio)[below], atol=1e-4)
    if percentile == 100:
        assert torch.allclose(held.mean(-1, keepdim=True), tint, atol=1e-5)


def test_thresholding_keeps_a_prediction_of_one_colour():
    flat = X / 0.8
    assert torch.isfinite(threshold(flat, flat, X, 0.8, 99.0)).all()


@pytest.mark.parametrize(("name", "shares"), [
    ("constant", [1, 1, 1, 1]),
    ("linear", [1, 2 / 3, 1 / 3, 0]),
    ("cosine", [1, math.sqrt(3) / 2, 1 / 2, 0]),
])  # fmt: skip
def test_schedules_take_the_scale_down_to_1(name, shares):
    velocity = cfg_velocity(constant, SIGMAS, 5.0, schedule=name)
    for sigma, share in zip(SIGMAS[:-1], shares, strict=True):
        assert distance(velocity(X, sigma), guided(POSITIVE, NEGATIVE, 1 + 4 * share)) <= 1e-6
    between = (SIGMAS[1] + SIGMAS[2]) / 2  # as a sampler with two velocities a step asks
    assert torch.equal(velocity(X, between), velocity(X, SIGMAS[1]))


def test_the_table_names_the_schedules():
    assert tuple(SCHEDULES) == CFG_SCHEDULES


# --- pictures


def test_scale_1_draws_the_plain_picture(pipeline):
    assert draw(pipeline, true_cfg_scale=1.0).tobytes() == draw(pipeline).tobytes()


def test_a_prompt_against_itself_is_the_plain_picture(pipeline):
    same = draw(pipeline, negative_prompt="a red apple", true_cfg_scale=7.0)
    assert (pixels(same) - pixels(draw(pipeline))).abs().max() <= 1


ALL = [
    {},
    {"negative_prompt": "a blue car"},
    {"true_cfg_scale": 4.0},
    {"cfg_zero": 0},
    {"cfg_zero": 1},
    {"mimic_scale": 1.5},
    {"mimic_scale": 1.5, "threshold_percentile": 90.0},
    {"cfg_schedule": "linear"},
    {"cfg_schedule": "cosine"},
]


def test_every_part_of_the_steering_matters(pipeline):
    base = {"negative_prompt": "a house", "true_cfg_scale": 3.0}
    pictures = [draw(pipeline, **base | change).tobytes() for change in ALL]
    assert len({*pictures, draw(pipeline).tobytes()}) == len(ALL) + 1


@pytest.mark.parametrize("change", ALL)
@pytest.mark.parametrize("image", [None, INIT])
def test_one_batch_and_two_passes_draw_the_same(change, image):
    pipeline = tiny_pipeline()
    fields = CFG | change | ({"init_image": image, "strength": 0.7} if image else {})
    together = draw(pipeline, **fields)
    pipeline.denoiser.one_batch = False
    assert (pixels(draw(pipeline, **fields)) - pixels(together)).abs().max() <= 1


def test_it_is_two_velocities_by_hand(pipeline):
    x = pack(get_noise(1, 32, 48, "cpu", torch.float32, 3))
    sigmas, ids = get_schedule(3, x.shape[1]), image_ids(1, 2, 3)

    def flow(text):
        txt, vec = pipeline.prompts(text)
        return flow_velocity(pipeline.model, ids, txt, torch.zeros(1, 4, 3), vec, guidance=torch.tensor([3.5]))

    positive, negative = flow("a red apple"), flow("a blue car")
    with torch.no_grad():
        x = euler(lambda x, s: negative(x, s) + 3.0 * (positive(x, s) - negative(x, s)), x, sigmas)
        expected = pipeline.picture(x, GenerationRequest(prompt="x", seed=3, **FAST))
    assert (pixels(draw(pipeline, **CFG)) - pixels(expected)).abs().max() <= 1


def test_text_is_encoded_once_however_many_pictures():
    pipeline = tiny_pipeline()
    for scale in (2.0, 3.0):
        draw(pipeline, **CFG | {"true_cfg_scale": scale}, num_images=2)
    draw(pipeline, prompt="a blue car")
    assert pipeline.t5.calls == pipeline.clip.calls == 2


def test_an_empty_negative_prompt_is_none(pipeline):
    plain, empty = draw(pipeline, true_cfg_scale=3.0), draw(pipeline, negative_prompt=" ", true_cfg_scale=3.0)
    assert empty.tobytes() == plain.tobytes() and empty.info == plain.info


def test_rows_of_a_batch_are_the_pictures_alone(pipeline):
    requests = [GenerationRequest(prompt=text, seed=seed, **FAST, **CFG) for text, seed in (("x", 1), ("y z", 2))]
    for row, one in zip(pipeline.draw_rows(requests), requests, strict=True):
        assert (pixels(row) - pixels(pipeline.draw(one))).abs().max() <= 1


def test_schnell_and_bf16_steer_too():
    assert draw(tiny_pipeline("flux-schnell"), **CFG).tobytes() != draw(tiny_pipeline("flux-schnell")).tobytes()
    draw(tiny_pipeline(dtype="bfloat16"), **CFG, cfg_zero=1, mimic_scale=1.5)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_becomes_two_passes_and_that_is_said(error, capsys):
    pipeline = tiny_pipeline()
    pipeline.denoiser.one_batch = False
    expected = draw(pipeline, **CFG)
    pipeline.denoiser.one_batch = True
    short_of_memory(pipeline, error)
    assert draw(pipeline, **CFG).tobytes() == expected.tobytes()
    assert capsys.readouterr().err.count("two passes") == 1


def test_what_is_no_shortage_is_not_tried_again(capsys):
    pipeline = tiny_pipeline()
    short_of_memory(pipeline, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        draw(pipeline, **CFG)
    with pytest.raises(MemoryShortage):
        short_of_memory(pipeline, torch.OutOfMemoryError())
        pipeline.draw_rows([GenerationRequest(prompt="x", seed=seed, **FAST) for seed in (1, 2)])
    assert "two passes" not in capsys.readouterr().err


# --- with a plan


def seen_branches(pipeline, **fields):
    seen = []
    look = Custom(sites="velocity", fn=lambda at, x: seen.append((at.step, at.call, at.branches, len(x))), reads=True)
    draw(pipeline, plan=[look], **CFG, **fields)
    return seen


def test_a_plan_sees_rows_or_passes_by_name():
    pipeline = tiny_pipeline()
    assert seen_branches(pipeline) == [(i, 0, ("positive", "negative"), 2) for i in range(3)]
    assert [step for step, *_ in seen_branches(pipeline, cfg_zero=1)] == [1, 2]
    pipeline.denoiser.one_batch = False
    passes = [(0, ("positive",), 1), (1, ("negative",), 1)]
    assert seen_branches(pipeline) == [(i, *one) for i in range(3) for one in passes]


def test_a_capture_holds_rows_or_passes():
    pipeline, rows, passes = tiny_pipeline(), {}, {}
    draw(pipeline, plan=[Capture(sites="velocity", into=rows)], **CFG)
    pipeline.denoiser.one_batch = False
    draw(pipeline, plan=[Capture(sites="velocity", into=passes)], **CFG)
    assert rows.keys() == {f"{i}.velocity" for i in range(3)}
    assert passes.keys() == rows.keys() | {f"{i}.1.velocity" for i in range(3)}
    for i in range(3):
        both = torch.cat((passes[f"{i}.velocity"], passes[f"{i}.1.velocity"]))
        assert distance(rows[f"{i}.velocity"], both) <= 1e-5


def test_a_plan_works_on_both_branches():
    pipeline = tiny_pipeline()
    skip = [Skip(blocks="double_blocks.0")]
    together = draw(pipeline, plan=skip, **CFG)
    pipeline.denoiser.one_batch = False
    assert (pixels(draw(pipeline, plan=skip, **CFG)) - pixels(together)).abs().max() <= 1
    assert draw(pipeline, **CFG).tobytes() != together.tobytes()


def test_rows_can_share_and_passes_cannot():
    pipeline, share = tiny_pipeline(), [ShareKV(blocks="layer.0", source="positive")]
    assert draw(pipeline, plan=share, **CFG).tobytes() != draw(pipeline, **CFG).tobytes()
    pipeline.denoiser.one_batch = False
    with pytest.raises(UsageError, match="only one branch"):
        draw(pipeline, plan=share, **CFG)


@pytest.mark.parametrize("together", [True, False])
def test_what_is_lost_is_found_with_the_plan_at_work(together):
    pipeline = tiny_pipeline()
    pipeline.denoiser.one_batch = together
    spoil = Custom(sites="single_blocks.0.img.out", fn=lambda x, at: x * float("nan"), steps=[1])
    with pytest.raises(NonFiniteError, match=r"after step 2 of 3 .*first in single_blocks\.0"):
        draw(pipeline, plan=[spoil], **CFG)


def test_edits_take_no_negative_prompt(pipeline):
    with pytest.raises(UsageError, match="leave --true-cfg-scale out"):
        Editing(pipeline, GenerationRequest(prompt="x", **FAST, **CFG), ["y"], [])
