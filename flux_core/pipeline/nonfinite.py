"""Where NaN or infinity came from: asked only when a picture is lost already.

A sampling that goes well pays for one `isfinite` after each step, and for nothing of this file. When that one fails,
the forward of its step is made again from the latents before it, with the same plan and a reader behind every block,
and the weights are searched. So a damaged file is told from numbers that grew too large on their way.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..device.choice import dtype_name
from ..errors import NonFiniteError
from ..hooks import At, Custom, HookRun
from ..hooks.sites import GLOBAL, split
from ..sampling import Step, Velocity

WATCHED = (*GLOBAL, "*.out")
"""what embedders, blocks and final layer give on; all of it lies outside the blocks, so nothing is compiled for it"""
LISTED = 3
"""tensors that are named; the others are counted"""
CHUNK = 2**24
"""numbers of a tensor that are looked at in one go: the device may be full"""


def is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def lost_at_step(
    step: Step,
    velocity: Callable[[HookRun], Velocity],
    run: HookRun,
    dtype: torch.dtype,
    model: nn.Module,
    ae: nn.Module,
) -> NonFiniteError:
    """The error of a step whose latents are not finite. velocity: makes the model's velocity with another run."""
    if is_finite(step.before):
        site, parts = first_site(step, velocity, run), [model]
    else:  # an init image or a callback brought them
        site, parts = "the latents it started from", [model, ae]
    first = f", first in {site}" if site else ""
    where = f"after step {step.index + 1} of {len(run.sigmas) - 1} (sigma {step.sigma:.3f}){first}"
    return lost(where, dtype, *parts)


def lost(where: str, dtype: torch.dtype, *parts: Any) -> NonFiniteError:
    """The error for what was found `where`, with the tensors of these parts of a pipeline that are to blame, if any."""
    found = f"NaN or infinity {where}, in {dtype_name(dtype)}; no picture is written"
    if bad := bad_tensors(*parts):
        return NonFiniteError(f"{found}. {listing(bad)}: python cli.py verify FILE says more")
    if dtype != torch.float32:
        return NonFiniteError(f"{found}: try --dtype float32")
    hint = "without the plan, if there is one, or fetch the files again"
    return NonFiniteError(f"{found}. Every weight is finite: try it {hint}")


def first_site(step: Step, velocity: Callable[[HookRun], Velocity], run: HookRun) -> str:
    """The block, or the value of the whole forward, that was the first to be not finite; "" if none is, this time.

    A function of the plan may not bear to be called once more. What it raises must not take the place of what is told
    here, so it ends the search and no more.
    """
    seen: list[str] = []

    def look(at: At, x: Tensor) -> None:
        if not seen and not is_finite(x):
            seen.append(split(at.name)[0] or at.name)

    with suppress(Exception):
        velocity(run.again(Custom(sites=WATCHED, fn=look, reads=True)))(step.before, step.sigma)
    return seen[0] if seen else ""


def bad_tensors(*parts: Any) -> dict[str, int]:
    """Tensors by their official names, and how many numbers of each are not finite, where any is."""
    modules = [getattr(part, "model", part) for part in parts]  # a text encoder's is transformers', with its names
    tensors = [chain(one.named_parameters(), one.named_buffers()) for one in modules if isinstance(one, nn.Module)]
    counted = ((name, count_bad(x)) for name, x in chain(*tensors) if x.is_floating_point())
    return {name: bad for name, bad in counted if bad}


def count_bad(x: Tensor) -> int:
    return sum(int((~torch.isfinite(part.float())).sum()) for part in x.flatten().split(CHUNK))


def listing(bad: dict[str, int]) -> str:
    """`single_blocks.7.linear2.weight holds 5 non-finite numbers`, for one tensor or for many."""
    names, numbers = list(bad), sum(bad.values())
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    verb, plural = "holds" if len(names) == 1 else "hold", "" if numbers == 1 else "s"
    return f"{', '.join(names[:LISTED])}{more} {verb} {numbers:,} non-finite number{plural}"
