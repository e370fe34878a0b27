"""Steps of a schedule: those that image-to-image skips, and that of a sigma. No torch."""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction


def skipped_steps(num_steps: int, strength: float) -> int:
    """The number of steps skipped at the noisy end: `int((1 - strength) * num_steps)` (official `demo_st.py`).

    Exact for the decimal strength: in floats (1 - 0.9) * 10 is less than 1.
    """
    return int((1 - Fraction(repr(float(strength)))) * num_steps)


def highest_strength(num_steps: int) -> float:
    """The highest strength, in hundredths, that skips a step. Above it the init image has no effect."""
    return int(100 * (1 - Fraction(1, num_steps))) / 100


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step of a schedule, which falls or rises, at a sigma.

    A sigma between two of the schedule belongs to the step across it, one beyond an end to the step at that end.
    """
    sign = 1 if sigmas[0] < sigmas[-1] else -1
    return max(min(bisect_right(sigmas, sign * sigma, key=lambda x: sign * x), len(sigmas) - 1) - 1, 0)
