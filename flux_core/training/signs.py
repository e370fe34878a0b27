"""Signs of trouble while a LoRA is trained, each a line that says what to do: stripes, overfitting, no effect.

Stripes: a transformer that was trained badly leaves lines where its tokens meet, every 16 pixels. In the spectrum of a
picture they are a comb, at multiples of 1/16 of the sampling rate, and nothing else in a picture is.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

PERIOD = 16
"""pixels of a token"""
NEAR = 3
"""bins on either side of a tooth that it is compared with"""
STRIPED = 1.8
"""power at the comb over that beside it, from which it is told; pictures of flux-mini have 0.97 to 1.13, and 2.1 to 4.3
with lines that are four levels brighter"""
RISES, RISEN = 3, 1.02
"""validations in a row that were worse than the best by that factor"""
UNSEEN = 0.5
"""levels of 255 by which samples differ from those before the first step, at most, where nothing is learned"""


def comb(image: Image.Image) -> float:
    """How much more power there is at multiples of 1/16 than beside them, by the worse direction; 1: as much."""
    grey = np.asarray(image.convert("L"), np.float64)
    return max(_comb(grey), _comb(grey.T))


def _comb(rows: np.ndarray) -> float:
    length = rows.shape[1] // PERIOD * PERIOD
    if length < 4 * PERIOD:
        return 1.0
    steps = np.diff(rows[:, :length], axis=1, append=rows[:, :1])  # flat but for edges
    power = np.log(np.square(np.abs(np.fft.rfft(steps, axis=1))).mean(0) + 1e-9)
    teeth = np.arange(1, PERIOD // 2) * (length // PERIOD)
    beside = [np.concatenate((power[k - NEAR : k], power[k + 1 : k + 1 + NEAR])).mean() for k in teeth]
    return float(np.exp(np.mean(power[teeth] - beside)))


def stripes(before: Sequence[Image.Image], now: Sequence[Image.Image]) -> str:
    """A line where samples have stripes that those before the first step have not; else nothing."""
    first, last = (max((comb(one) for one in some), default=0.0) for some in (before, now))
    if last < STRIPED or last < 2 * first:
        return ""
    return (
        f"samples have stripes every {PERIOD} pixels ({last:.1f} times the power beside them). Next: a lower --lr, "
        "a higher --weight-decay, fewer steps, or a checkpoint before"
    )


def overfits(validated: Mapping[int, float]) -> str:
    """A line where the validation loss is well above its least, and has been for some time; else nothing."""
    steps = sorted(validated)
    if not steps:
        return ""
    best = min(steps, key=lambda step: validated[step])
    worse = [step for step in steps if step > best]
    if len(worse) < RISES or any(validated[step] < RISEN * validated[best] for step in worse[-RISES:]):
        return ""
    return (
        f"the validation loss was least behind step {best} ({validated[best]:.4f}), and is {validated[steps[-1]]:.4f}. "
        "Next: stop there, a lower --lr, or more pictures"
    )


def no_effect(before: Sequence[Image.Image], now: Sequence[Image.Image], rate: float) -> str:
    """A line where samples are as they were before the first step; else nothing. rate: the largest so far."""
    pairs = list(zip(before, now, strict=True))
    most = max((_difference(*pair) for pair in pairs), default=UNSEEN)
    if not pairs or most >= UNSEEN:
        return ""
    return f"samples are as they were without it (rate {rate:g}). Next: a higher --lr, more steps, or other --targets"


def _difference(one: Image.Image, other: Image.Image) -> float:
    pixels = (np.asarray(x.convert("RGB"), np.float64) for x in (one, other))
    first, second = pixels
    return float(np.abs(first - second).mean())
