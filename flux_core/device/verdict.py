"""Whether a model fits a device, in words: from its sizes, without loading it."""

from collections.abc import Mapping

from ..variants import Variant
from .budget import CONTEXT
from .file_plan import make_file_plan
from .memory import MEGAPIXEL
from .plan import is_whole, make_plan


def verdict(variant: Variant, kind: str, memory: int, dtypes: Mapping[str, str]) -> str:
    """How a picture of a megapixel is drawn in so many bytes, and with which flag all weights stay there.

    kind: of the device, as torch names it. dtypes: those that it computes in -> the flag that asks for it, its own
    choice first. 0 bytes are unknown.
    """
    if not memory:
        return "does not say its memory"
    if kind == "cpu":
        return _of_cpu(variant, memory, dtypes)
    for dtype in dtypes if kind != "cuda" else [next(iter(dtypes))]:
        if is_whole(variant, memory - CONTEXT, dtype, None):
            return _whole(dtypes[dtype])
    return _streamed(variant, memory, dtypes) if kind == "cuda" else "does not fit"


def _whole(flag: str) -> str:
    return "fits whole" + f" with {flag}" * bool(flag)


def _streamed(variant: Variant, memory: int, dtypes: Mapping[str, str]) -> str:
    plans = {dtype: make_plan(variant, memory, dtype, None, MEGAPIXEL) for dtype in dtypes}
    plan = plans[next(iter(dtypes))]
    if not plan.fits:
        return "does not fit"
    copied = f", {plan.streamed / 1e9:.1f} GB come at each step" * bool(plan.streamed)
    others = [dtypes[dtype] for dtype, other in plans.items() if copied and other.fits and not other.streamed]
    stay = f"; all stay with {others[0]}" if others else ""
    return f"fits, {len(plan.resident)} of {len(plan.blocks)} blocks stay{copied}{stay}"


def _of_cpu(variant: Variant, memory: int, dtypes: Mapping[str, str]) -> str:
    plans = {dtype: make_file_plan(variant, memory, dtype, None, MEGAPIXEL) for dtype in dtypes}
    whole = next((dtypes[dtype] for dtype, plan in plans.items() if plan.whole), None)
    if whole is not None:
        return _whole(whole)
    fits = next(iter(plans.values())).fits
    return "does not fit whole: --memory auto leaves what finds no room in its files" if fits else "does not fit"
