"""Find where NaN or infinity came from, after a step's latents were found not to be finite.

A sampling without such an error costs one `isfinite` after each step, whose answer is read a step later on a card, so
that the host stays ahead of the device. After it fails, the step's forward is repeated from the latents before it, with
the same plan and a reader after every block, and the weights are checked. This distinguishes a damaged file from
overflow in the computation.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..device.choice import dtype_name
from ..errors import NonFiniteError
from ..hooks import At, Custom, HookRun
from ..hooks.sites import GLOBAL, split
from ..linears.frozen import Frozen
from ..sampling import Step, Velocity

WATCHED = (*GLOBAL, "*.out")
"""outputs of embedders, blocks and final layer; all are outside the blocks, so nothing is compiled for them"""
LISTED = 3
"""number of tensors named in an error; the others are counted"""
CHUNK = 2**24
"""numbers of a tensor checked at once: the device may be full"""


def is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def asked_finite(x: Tensor) -> Callable[[], bool]:
    """`is_finite`, asked now; the call waits for what the device had to do until now, and not for what came later."""
    found = torch.isfinite(x).all()
    if not x.is_cuda:
        return lambda: bool(found)
    there = found.to("cpu", non_blocking=True)
    asked = torch.cuda.current_stream(x.device).record_event()

    def answer() -> bool:
        asked.synchronize()
        return bool(there)

    return answer


def step_error(
    step: Step,
    velocity: Callable[[HookRun], Velocity],
    run: HookRun,
    dtype: torch.dtype,
    model: nn.Module,
    ae: nn.Module,
) -> NonFiniteError:
    """The error for a step whose latents are not finite. velocity: the model's velocity as a function of the run."""
    if is_finite(step.before):
        site, parts = first_site(step, velocity, run), [model]
    else:  # they come from an init image or a callback
        site, parts = "the start latents", [model, ae]
    first = f", first in {site}" if site else ""
    where = f"after step {step.index + 1} of {len(run.sigmas) - 1} (sigma {step.sigma:.3f}){first}"
    return nonfinite_error(where, dtype, *parts)


def nonfinite_error(where: str, dtype: torch.dtype, *parts: Any) -> NonFiniteError:
    """The error for a non-finite value found `where`; names the non-finite tensors of `parts`, if any."""
    found = f"NaN or infinity {where}, in {dtype_name(dtype)}; no picture is written"
    if bad := bad_tensors(*parts):
        return NonFiniteError(f"{found}. {listing(bad)}. Next: python cli.py verify FILE")
    if dtype != torch.float32:
        return NonFiniteError(f"{found}. Next: try --dtype float32")
    hint = "leave the plan out, if there is one, or fetch the files again"
    return NonFiniteError(f"{found}. Every weight is finite. Next: {hint}")


def first_site(step: Step, velocity: Callable[[HookRun], Velocity], run: HookRun) -> str:
    """The first block, or value of the whole forward, that is not finite; "" if all are finite in the repeated forward.

    A function of the plan may fail when it is called again. Its exception must not replace the error reported here, so
    it only ends the search.
    """
    found: list[str] = []

    def check(at: At, x: Tensor) -> None:
        if not found and not is_finite(x):
            found.append(split(at.name)[0] or at.name)

    with suppress(Exception):
        velocity(run.again(Custom(sites=WATCHED, fn=check, reads=True)))(step.before, step.sigma)
    return found[0] if found else ""


def bad_tensors(*parts: Any) -> dict[str, int]:
    """The number of non-finite values in each tensor that has any, by official name."""
    modules = [getattr(part, "model", part) for part in parts]  # of a text encoder: with its names
    tensors = chain(*(_numbers(m) for m in modules if isinstance(m, nn.Module)))
    counted = ((name, count_bad(x)) for name, x in tensors if x.is_floating_point())
    return {name: bad for name, bad in counted if bad}


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers; of a layer in few bits what its codes stand for, since scales may be among them."""
    for owner, module in model.named_modules():
        codes = {f"{owner}.{name}" for name in module.CODES} if isinstance(module, Frozen) else set()
        own = chain(module.named_parameters(owner, recurse=False), module.named_buffers(owner, recurse=False))
        yield from ((name, x) for name, x in own if name not in codes)
        if isinstance(module, Frozen):
            yield f"{owner}.weight", module.widen(torch.bfloat16)  # the range of fp32 in half of the memory


def count_bad(x: Tensor) -> int:
    return sum(int((~torch.isfinite(part.float())).sum()) for part in x.flatten().split(CHUNK))


def listing(bad: dict[str, int]) -> str:
    """`single_blocks.7.linear2.weight holds 5 non-finite numbers`, in the singular or plural."""
    names, numbers = list(bad), sum(bad.values())
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    verb, plural = "holds" if len(names) == 1 else "hold", "" if numbers == 1 else "s"
    return f"{', '.join(names[:LISTED])}{more} {verb} {numbers:,} non-finite number{plural}"
