"""`HookRun`: applies a plan while the model runs.

The model's loop calls it with every block and every named value; it applies the interventions active at that place and
step. The only part of a plan that enters a block is a `Taps`: functions and tensors by site, without a block's index or
a step. So all blocks of a kind whose taps hold the same functions share one compiled graph, whatever the layers, steps
and tensors.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import Flux
from ..model.blocks import DoubleStreamBlock, SingleStreamBlock
from ..model.tap import UNTOUCHED, Tap
from ..params import FluxParams
from ..strength import step_of
from .capture import Capture
from .intervention import Intervention
from .plan import place_all
from .seam import ATTEND, Around, At, End, Read, Write
from .sites import INSIDE, split

BoundFunction = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""a function and its arguments after the value"""


class Taps(Tap):
    """The functions to apply inside a block, by site, and the values to return to readers."""

    def __init__(self, txt_len: int, functions: dict[str, tuple[BoundFunction, ...]], reads: frozenset[str]) -> None:
        self.txt_len, self.functions, self.reads = txt_len, functions, reads
        self.values: dict[str, Tensor] = {}

    def __call__(self, site: str, x: Tensor) -> Tensor:
        for fn, args in self.functions.get(site, ()):
            x = fn(x, *args)
        if site in self.reads:
            self.values[site] = x
        return x

    def joined(self, site: str, x: Tensor, dim: int) -> Tensor:
        txt_site, img_site = f"txt.{site}", f"img.{site}"
        names = (txt_site, img_site)
        if not any(name in self.functions or name in self.reads for name in names):
            return x
        txt, img = x.split([self.txt_len, x.shape[dim] - self.txt_len], dim)
        changed = self(txt_site, txt), self(img_site, img)
        return torch.cat(changed, dim) if any(name in self.functions for name in names) else x

    def attend(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for fn, args in self.functions.get(ATTEND, ()):
            attend = _wrap_attention(fn, attend, args)
        return attend(q, k, v)


def _wrap_attention(
    fn: Callable[..., Tensor], attend: Callable[..., Tensor], args: tuple[Any, ...]
) -> Callable[..., Tensor]:
    return lambda q, k, v: fn(attend, q, k, v, *args)


class HookRun:
    """A plan applied to one model during one sampling. `finish` ends it.

    sigmas: the schedule, which gives the step of a forward; without it every forward is step 0. branches: names of the
    batch's rows, row = image * len(branches) + branch. passes: each branch has its own forward instead, in that order;
    then branches cannot share values.
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
        self._by_block: dict[str, list[tuple[Intervention, Any]]] = defaultdict(list)
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}
        self._warned: set[str] = set()
        self._ends: list[Callable[[], None]] = []
        for intervention, placed in place_all(self.plan, params, branches[:1] if passes else branches):
            if isinstance(placed, End):
                self._ends.append(placed.fn)
            else:
                self._by_block[_block_of(placed)].append((intervention, placed))

    def again(self, *others: Intervention) -> "HookRun":
        """A run with fresh state of the same plan and then `others`. Interventions that only read are left out."""
        plan = [intervention for intervention in self.plan if intervention.changes_pixels]
        return HookRun([*plan, *others], self.params, self.sigmas, self.branches, self.passes)

    @property
    def needs_vec(self) -> bool:
        """Whether the plan uses `vec`, which a forward lacks when its modulation was computed before."""
        return any("vec" in _sites_of(placed) for _, placed in self._by_block.get("", ()))

    def begin(self, sigma: float) -> None:
        """Set step and call for the next forward. A sigma between two of the schedule belongs to the step across it."""
        self.call = self.call + 1 if sigma == self.sigma else 0
        self.sigma = sigma
        self.step = step_of(sigma, self.sigmas)

    def finish(self) -> None:
        """Call the End functions (which write files), after the last step."""
        for end in self._ends:
            end()

    # What the model's loop calls -------------------------------------------------------------------

    def value(self, name: str, x: Any) -> Any:
        block, site = split(name)
        if site == "txt_in":
            self._txt_len = x.shape[1]
        active = self._active_at(block)
        if site == "mod":
            return self._modulation(block, x, active) if active else x
        return self._write_and_read(name, x, active)

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

    # Inside a block ----------------------------------------------------------------------------------

    def _block(self, name: str, block: Any, x: Any, call: Callable[..., Any]) -> Any:
        active = self._active_at(name)
        if not active:
            return call(x, block, UNTOUCHED)
        x = self._streams(name, "in", x, active)
        run, tap = self._prepare(name, block, active)

        inner: Callable[[Any], Any] = lambda x: call(x, run, tap)  # noqa: E731
        for placed in active:
            if isinstance(placed, Around):
                inner = self._wrap(placed, inner)
        x = self._streams(name, "out", inner(x), active)
        self._call_readers(getattr(tap, "values", {}), active)
        return x

    def _wrap(self, around: Around, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: around.fn(inner, x, self._at(around.block))

    def _prepare(self, name: str, block: Any, active: list[Any]) -> tuple[Callable[..., Any], Tap]:
        """The block as a function (compiled, or eager where a function inside is not traceable), and its taps."""
        functions: dict[str, tuple[BoundFunction, ...]] = {}
        run = block
        for placed in active:
            site = split(placed.site)[1] if isinstance(placed, Write) else ""
            if site in INSIDE or site == ATTEND:
                functions[site] = (*functions.get(site, ()), self._bind(placed))
                if not placed.traceable:
                    run = block.forward
                    self._warn_eager(name, block, placed)
        readers = [placed for placed in active if isinstance(placed, Read)]
        reads = frozenset(
            site for read in readers for site in (split(name)[1] for name in read.sites) if site in INSIDE
        )
        return run, Taps(self._txt_len, functions, reads) if functions or reads else UNTOUCHED

    def _bind(self, write: Write) -> BoundFunction:
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

    def _warn_eager(self, name: str, block: Any, write: Write) -> None:
        """Warn once for each run that a compiled block runs eagerly."""
        if getattr(block, "_compiled_call_impl", None) is not None and not self._warned:
            self._warned.add(name)
            fn = getattr(write.fn, "__name__", repr(write.fn))
            warnings.warn(f"{name} runs eagerly, because {fn} is not marked @traceable (reported once)", stacklevel=2)

    # Values outside blocks --------------------------------------------------------------------------

    def _streams(self, name: str, end: str, x: Any, active: list[Any]) -> Any:
        """Apply `img.in` and `txt.in`, or `img.out` and `txt.out`, to a pair of streams or to the joined sequence."""
        names = [f"{name}.{stream}.{end}" for stream in ("img", "txt")]
        used = {site for placed in active for site in _sites_of(placed)}
        if used.isdisjoint(names):
            return x
        if isinstance(x, tuple):
            return self._write_and_read(names[0], x[0], active), self._write_and_read(names[1], x[1], active)
        txt, img = x[:, : self._txt_len], x[:, self._txt_len :]
        txt, img = self._write_and_read(names[1], txt, active), self._write_and_read(names[0], img, active)
        return torch.cat((txt, img), dim=1)

    def _modulation(self, block: str, sets: Any, active: list[Any]) -> Any:
        """Apply each set's shift, scale and gate under its own name."""
        stems = ("img_mod1", "img_mod2", "txt_mod1", "txt_mod2") if len(sets) == 4 else ("mod",)
        return tuple(
            mod._replace(
                **{
                    part: self._write_and_read(f"{block}.{stem}.{part}", getattr(mod, part), active)
                    for part in mod._fields
                }
            )
            for stem, mod in zip(stems, sets, strict=True)
        )

    def _write_and_read(self, name: str, x: Tensor, active: list[Any]) -> Tensor:
        """A value outside the blocks' graphs, after its Writes; its Reads get it then."""
        self._device = x.device
        for placed in active:
            if isinstance(placed, Write) and placed.site == name:
                fn, args = self._bind(placed)
                x = _with_strides_of(x, fn(x, *args))
        for placed in active:
            if isinstance(placed, Read) and placed.sites == (name,):
                placed.fn(self._at(name), x)
        return x

    def _call_readers(self, found: dict[str, Tensor], active: list[Any]) -> None:
        """Call the Reads whose sites are all among the values found inside a block."""
        for placed in active:
            if isinstance(placed, Read):
                values = [found.get(split(site)[1]) for site in placed.sites]
                if all(value is not None for value in values):
                    placed.fn(self._at(placed.sites[0]), *values)

    def _active_at(self, block: str) -> list[Any]:
        """The functions placed at a block (or, by "", at the whole forward) that are active at this step."""
        return [placed for intervention, placed in self._by_block.get(block, ()) if intervention.at_step(self.step)]

    def _at(self, name: str) -> At:
        call = max(self.call, 0)
        branches = (self.branches[call % len(self.branches)],) if self.passes else self.branches
        return At(name, self.step, self.sigma, call, self._txt_len, branches)


def _with_strides_of(old: Tensor, new: Tensor) -> Tensor:
    """The new value with the strides of the old, which a compiled block is specialized on."""
    if new.shape != old.shape or new.stride() == old.stride():
        return new
    return torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device).copy_(new)


def _sites_of(placed: Any) -> tuple[str, ...]:
    return (placed.site,) if isinstance(placed, Write) else placed.sites if isinstance(placed, Read) else ()


def _block_of(placed: Any) -> str:
    return placed.block if isinstance(placed, Around) else split(_sites_of(placed)[0])[0]


def run_with_cache(model: Flux, names: Any, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity of one forward, and by full name the values at the sites that `names` match.

    names: patterns, as in `Capture.sites`. inputs: those of `Flux.forward`.
    """
    values: dict[str, Tensor] = {}
    run = HookRun([Capture(sites=names, into=values)], model.params)
    velocity = model(**inputs, run=run)
    return velocity, {name.partition(".")[2]: x for name, x in values.items()}
