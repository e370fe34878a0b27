"""Image-to-image enters the schedule where exact numbers say, in requests and in sampling alike."""

from fractions import Fraction

import pytest
import torch

from flux_core.request.generation import GenerationRequest
from flux_core.request.pictures import InitImage
from flux_core.sampling import start_from_image
from flux_core.strength import highest_strength, skipped_steps

ORIGIN = InitImage(file="cat.png", sha256="0" * 64)
STRENGTHS = sorted(
    {f"{k / 100:.2f}" for k in range(101)} | {f"{k / 20:g}" for k in range(21)} | {"1e-3", "0.333", "0.0625"}
)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_no_step_is_lost_to_rounding(strength):
    for steps in range(1, 51):
        exact = int((1 - Fraction(strength)) * steps)
        assert skipped_steps(steps, float(strength)) == exact
        latent, noise = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
        sigmas = [1 - i / steps for i in range(steps + 1)]
        x, rest = start_from_image(latent, noise, sigmas, float(strength))
        assert rest == sigmas[exact:] and x.item() == sigmas[exact]
    request = GenerationRequest(prompt="x", seed=1, init_image=ORIGIN, strength=strength, num_steps=10)
    assert request.num_forward_steps == 10 - int((1 - Fraction(strength)) * 10)


def test_floats_alone_would_lose_some():
    lost = [(k, n) for k in range(20) for n in range(1, 51) if int((1 - k / 20) * n) != skipped_steps(n, k / 20)]
    assert len(lost) > 10 and (18, 10) in lost


@pytest.mark.parametrize("steps", range(1, 51))
def test_a_strength_without_effect_is_told_with_one_that_has(steps):
    def notes(strength: float) -> list[str]:
        request = GenerationRequest(prompt="x", seed=1, init_image=ORIGIN, strength=strength, num_steps=steps)
        return [line for line in request.notes() if "no effect" in line]

    highest = highest_strength(steps)
    assert notes(1) and not notes(highest)
    if highest + 0.01 < 1:
        (line,) = notes(round(highest + 0.01, 2))
        assert f"all of {steps} step(s)" in line and f"--strength {highest:g} or lower" in line


def test_the_default_strength_says_so_at_four_steps():
    assert any("no effect" in line for line in GenerationRequest(
        prompt="x", seed=1, name="flux-schnell", init_image=ORIGIN
    ).notes())  # fmt: skip
    assert GenerationRequest(prompt="x", seed=1, init_image=ORIGIN).notes() == []
