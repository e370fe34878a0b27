"""The run: what stands between the loop and the model while a plan is at work.

The loop asks it for every block and every value by name; it looks up what stands there at this step and does it.
Nothing of the plan enters a block but a `Taps`: functions and tensors under the names of sites, without an index or a
step. So all blocks of a kind whose taps hold the same functions share one compiled graph, whatever the layers, steps
and tensors.
"""

import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import Flux
from ..model.blocks import DoubleStreamBlock, SingleStreamBlock
from ..model.tap import UNTOUCHED, Tap
from ..params import FluxParams
from .capture import Capture
from .intervention import Intervention
from .plan import place_all
from .seam import ATTEND, Around, At, End, Read, Write
from .sites import INSIDE, split

Standing = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""a function and what it takes behind the value"""


class Taps(Tap):
    """The functions that stand inside one block, by site, and the values that readers want from it."""

    def __init__(self, txt_len: int, standing: dict[str, tuple[Standing, ...]], wanted: frozenset[str]) -> None:
        self.txt_len, self.standing, self.wanted = txt_len, standing, wanted
        self.seen: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor) -> Tensor:
        for fn, args in self.standing.get(site, ()):
            x = fn(x, *args)
        if site in self.wanted:
            self.seen[site] = x
        return x

    def joined(self, site: str, x: Tensor, dim: int) -> Tensor:
        txt_site, img_site = f"txt.{site}", f"img.{site}"
        names = (txt_site, img_site)
        if not any(name in self.standing or name in self.wanted for name in names):
            return x
        txt, img = x.split([self.txt_len, x.shape[dim] - self.txt_len], dim)
        changed = self(txt_site, txt), self(img_site, img)
        return torch.cat(changed, dim) if any(name in self.standing for name in names) else x

    def attend(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for fn, args in self.standing.get(ATTEND, ()):
            attend = _inner(fn, attend, args)
        return attend(q, k, v)


def _inner(fn: Callable[..., Tensor], attend: Callable[..., Tensor], args: tuple[Any, ...]) -> Callable[..., Tensor]:
    return lambda q, k, v: fn(attend, q, k, v, *args)


class HookRun:
    """A plan at work on one model, from the first step to the last. `finish` ends it.

    sigmas: the schedule, from which a forward's step is known; without it every forward is step 0. branches: names of
    the batch's rows, row = image * len(branches) + branch. passes: each branch has a forward of its own instead, in
    that order; nothing can then be shared between them.
    """

    def __init__(
        self,
        plan: Iterable[Intervention],
        params: FluxParams,
        sigmas: Sequence[float] = (1.0, 0.0),
        branches: tuple[str, ...] = ("image",),
        passes: bool = False,
    ) -> None:
        self.plan, self.params, self.sigmas, self.branches = tuple(plan), params, sigmas, branches
        self.passes = passes and len(branches) > 1
        self.step, self.sigma, self.call = 0, sigmas[0], -1
        self._txt_len, self._device = 0, torch.device("cpu")
        self._at_block: dict[str, list[tuple[Intervention, Any]]] = defaultdict(list)
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}
        self._told: set[str] = set()
        self._ends: list[Callable[[], None]] = []
        for one, thing in place_all(self.plan, params, branches[:1] if passes else branches):
            if isinstance(thing, End):
                self._ends.append(thing.fn)
            else:
                self._at_block[_block_of(thing)].append((one, thing))

    def again(self, *others: Intervention) -> "HookRun":
        """A run of the same plan with fresh state and these behind it. What only reads has read, and is left out."""
        plan = [one for one in self.plan if one.changes_pixels]
        return HookRun([*plan, *others], self.params, self.sigmas, self.branches, self.passes)

    @property
    def needs_vec(self) -> bool:
        """Whether anything stands at `vec`, which a forward lacks when its modulation was computed before."""
        return any("vec" in _sites_of(thing) for _, thing in self._at_block.get("", ()))

    def begin(self, sigma: float) -> None:
        """A forward at this sigma comes next. One between two of the schedule belongs to the step that passes it."""
        self.call = self.call + 1 if sigma == self.sigma else 0
        self.sigma = sigma
        self.step = min(bisect_right(self.sigmas, -sigma, key=lambda x: -x), len(self.sigmas) - 1) - 1

    def finish(self) -> None:
        """The last step is made: write what was gathered."""
        for end in self._ends:
            end()

    # What the model's loop calls -------------------------------------------------------------------

    def value(self, name: str, x: Any) -> Any:
        block, site = split(name)
        if site == "txt_in":
            self._txt_len = x.shape[1]
        here = self._standing(block)
        if site == "mod":
            return self._modulation(block, x, here) if here else x
        return self._exchange(name, x, here)

    def double_block(
        self, name: str, block: DoubleStreamBlock, img: Tensor, txt: Tensor, mods: Any, pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        def call(x: tuple[Tensor, Tensor], run: Callable[..., Any], tap: Tap) -> tuple[Tensor, Tensor]:
            return run(*x, *mods, pe, tap)

        img, txt = self._block(name, block, (img, txt), call)
        return img, txt

    def single_block(
        self, name: str, block: SingleStreamBlock, x: Tensor, txt_len: int, mods: Any, pe: Tensor
    ) -> Tensor:
        def call(x: Tensor, run: Callable[..., Any], tap: Tap) -> Tensor:
            return run(x, *mods, pe, tap)

        return self._block(name, block, x, call)

    # One block ---------------------------------------------------------------------------------------

    def _block(self, name: str, block: Any, x: Any, call: Callable[..., Any]) -> Any:
        here = self._standing(name)
        if not here:
            return call(x, block, UNTOUCHED)
        x = self._ends_of(name, "in", x, here)
        run, tap = self._reach_inside(name, block, here)

        inner: Callable[[Any], Any] = lambda x: call(x, run, tap)  # noqa: E731
        for thing in here:
            if isinstance(thing, Around):
                inner = self._wrap(thing, inner)
        x = self._ends_of(name, "out", inner(x), here)
        self._let_read(name, getattr(tap, "seen", {}), here)
        return x

    def _wrap(self, around: Around, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: around.fn(inner, x, self._at(around.block))

    def _reach_inside(self, name: str, block: Any, here: list[Any]) -> tuple[Callable[..., Any], Tap]:
        """How to run the block (compiled, or eagerly where a function is not traceable) and what stands inside it."""
        standing: dict[str, tuple[Standing, ...]] = {}
        run = block
        for thing in here:
            site = split(thing.site)[1] if isinstance(thing, Write) else ""
            if site in INSIDE or site == ATTEND:
                standing[site] = (*standing.get(site, ()), self._call_of(thing))
                if not thing.traceable:
                    run = block.forward
                    self._tell_eager(name, block, thing)
        reads = [thing for thing in here if isinstance(thing, Read)]
        wanted = frozenset(site for read in reads for site in (split(name)[1] for name in read.sites) if site in INSIDE)
        return run, Taps(self._txt_len, standing, wanted) if standing or wanted else UNTOUCHED

    def _call_of(self, write: Write) -> Standing:
        return (write.fn, self._args(write)) if write.traceable else (write.fn, (self._at(write.site),))

    def _args(self, write: Write) -> tuple[Tensor, ...]:
        """The tensors of a Write on the device of this forward; moved once."""
        if not write.args:
            return ()
        key = (id(write), self._device)
        if key not in self._moved:
            self._moved[key] = tuple(map(self._tensor, write.args))
        return self._moved[key]

    def _tensor(self, arg: Any) -> Tensor:
        """A tensor on the device of this forward; a number becomes fp32, whatever torch's default dtype is."""
        return torch.as_tensor(arg, dtype=torch.float32 if isinstance(arg, float) else None, device=self._device)

    def _tell_eager(self, name: str, block: Any, write: Write) -> None:
        if getattr(block, "_compiled_call_impl", None) is not None and not self._told:
            self._told.add(name)
            fn = getattr(write.fn, "__name__", repr(write.fn))
            warnings.warn(
                f"{name} runs eagerly: {fn}, which stands in it, is not marked @traceable (said once)", stacklevel=2
            )

    # Values outside blocks --------------------------------------------------------------------------

    def _ends_of(self, name: str, end: str, x: Any, here: list[Any]) -> Any:
        """`img.in` and `txt.in`, or `img.out` and `txt.out`, of a pair of streams or of the joined sequence."""
        names = [f"{name}.{stream}.{end}" for stream in ("img", "txt")]
        meant = {site for thing in here for site in _sites_of(thing)}
        if meant.isdisjoint(names):
            return x
        if isinstance(x, tuple):
            return self._exchange(names[0], x[0], here), self._exchange(names[1], x[1], here)
        txt, img = x[:, : self._txt_len], x[:, self._txt_len :]
        txt, img = self._exchange(names[1], txt, here), self._exchange(names[0], img, here)
        return torch.cat((txt, img), dim=1)

    def _modulation(self, block: str, sets: Any, here: list[Any]) -> Any:
        """Shift, scale and gate of a block's sets, each under its name."""
        stems = ("img_mod1", "img_mod2", "txt_mod1", "txt_mod2") if len(sets) == 4 else ("mod",)
        return tuple(
            one._replace(
                **{part: self._exchange(f"{block}.{stem}.{part}", getattr(one, part), here) for part in one._fields}
            )
            for stem, one in zip(stems, sets, strict=True)
        )

    def _exchange(self, name: str, x: Tensor, here: list[Any]) -> Tensor:
        """A value outside the blocks' graphs: written, then read."""
        self._device = x.device
        for thing in here:
            if isinstance(thing, Write) and thing.site == name:
                fn, args = self._call_of(thing)
                x = _laid_out_as(x, fn(x, *args))
        for thing in here:
            if isinstance(thing, Read) and thing.sites == (name,):
                thing.fn(self._at(name), x)
        return x

    def _let_read(self, block: str, seen: dict[str, Tensor], here: list[Any]) -> None:
        for thing in here:
            if isinstance(thing, Read):
                values = [seen.get(split(site)[1]) for site in thing.sites]
                if all(value is not None for value in values):
                    thing.fn(self._at(thing.sites[0]), *values)

    def _standing(self, block: str) -> list[Any]:
        """What stands at a block (or, by "", at the whole forward) at this step."""
        return [thing for one, thing in self._at_block.get(block, ()) if one.at_step(self.step)]

    def _at(self, name: str) -> At:
        call = max(self.call, 0)
        rows = (self.branches[call % len(self.branches)],) if self.passes else self.branches
        return At(name, self.step, self.sigma, call, self._txt_len, rows)


def _laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """The new value with the strides of the old, which a compiled block is specialized on."""
    if new.shape != old.shape or new.stride() == old.stride():
        return new
    return torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device).copy_(new)


def _sites_of(thing: Any) -> tuple[str, ...]:
    return (thing.site,) if isinstance(thing, Write) else thing.sites if isinstance(thing, Read) else ()


def _block_of(thing: Any) -> str:
    return thing.block if isinstance(thing, Around) else split(_sites_of(thing)[0])[0]


def run_with_cache(model: Flux, names: Any, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward and the values at the sites that the patterns mean, by full name. inputs: `Flux.forward`'s."""
    seen: dict[str, Tensor] = {}
    run = HookRun([Capture(sites=names, into=seen)], model.params)
    velocity = model(**inputs, run=run)
    return velocity, {name.partition(".")[2]: x for name, x in seen.items()}
