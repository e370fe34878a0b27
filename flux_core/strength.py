"""Where image-to-image enters the schedule. No torch: a request counts its steps before torch is imported."""

from fractions import Fraction


def skipped_steps(num_steps: int, strength: float) -> int:
    """Steps that are left out at the noisy end: `int((1 - strength) * num_steps)` (official `demo_st.py`).

    Exact for the strength as it is written: in floats (1 - 0.9) * 10 is less than 1.
    """
    return int((1 - Fraction(repr(float(strength)))) * num_steps)


def highest_strength(num_steps: int) -> float:
    """The highest strength, in hundredths, that leaves out a step: above it, all are drawn from noise alone."""
    return int(100 * (1 - Fraction(1, num_steps))) / 100
