"""`HookRun`: applies a plan while the model runs.

The model's loop calls it with every block and every named value; it applies the interventions active at that place and
step. The only part of a plan that enters a block is a `Taps`: functions and tensors by site, without a block's index or
a step. So all blocks of a kind whose taps hold the same functions share one compiled graph, whatever the layers, steps
and tensors.
"""

import traceback
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import HookError, UsageError, foreign, is_foreign
from ..model import Flux
from ..model.blocks import DoubleStreamBlock, SingleStreamBlock
from ..model.tap import UNTOUCHED, Tap
from ..params import FluxParams
from ..strength import step_of
from .capture import Capture
from .intervention import Intervention
from .plan import expanded, hidden, listed, place_all
from .seam import About, Around, At, End, Read, Write
from .sites import is_inside, split
from .taps import BoundFunction, Misfit, Taps, described, fitting


class Token:
    """Stands for a run, without keeping it."""


class HookRun:
    """A plan applied to one model during one sampling: `with HookRun(…) as run:`, whose end writes captures to files.

    sigmas: the schedule, which falls or rises, and gives the step of a forward; without it every forward is of step 0.
    branches: names of the batch's rows, row = image * len(branches) + branch. passes: each branch has its own forward
    instead, in that order; then branches cannot share values. image, request: what captures and functions are told of
    the picture. UsageError for a plan that does not fit.
    """

    def __init__(
        self,
        plan: Intervention | Iterable[Intervention],
        params: FluxParams,
        sigmas: Sequence[float] = (1.0, 0.0),
        branches: tuple[str, ...] = ("image",),
        passes: bool = False,
        image: int = 0,
        request: str | None = None,
    ) -> None:
        self.plan = expanded(listed(plan), params)
        if others := [entry.kind for entry in self.plan if not entry.in_forward]:
            raise UsageError(
                f"{others[0]} is no part of a forward. Next: give it to the pipeline, as in generate(plan=…)"
            )
        self.params, self.sigmas, self.branches = params, tuple(sigmas), branches
        self.passes, self.image = passes and len(branches) > 1, image
        _check_schedule(self.sigmas)
        self.step, self.sigma, self.call = 0, self.sigmas[0], -1
        self._calls: Counter[int] = Counter()
        self._txt_len, self._device = 0, torch.device("cpu")
        self._by_block: dict[str, list[tuple[Intervention, Any]]] = defaultdict(list)
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}
        self._warned: set[str] = set()
        for intervention in self.plan:
            intervention.check_steps(self.num_steps)
        functions = place_all(self.plan, params, branches[:1] if passes else branches)
        ends = [placed for _, placed in functions if isinstance(placed, End)]
        for intervention, placed in functions:
            if not isinstance(placed, End):
                self._by_block[_block_of(placed)].append((intervention, placed))
        for line in hidden(functions):
            warnings.warn(line, stacklevel=2)
        # a run that is dropped without its end writes its files all the same
        self._end = weakref.finalize(self, _end_all, ends, About(self.sigmas, branches, self.passes, request))
        self._ends, self._token = ends, Token()

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def again(self, *others: Intervention) -> "HookRun":
        """A run with fresh state of the same plan and then `others`. Interventions that only read are left out."""
        plan = [intervention for intervention in self.plan if intervention.changes_pixels]
        return HookRun([*plan, *others], self.params, self.sigmas, self.branches, self.passes, self.image)

    @property
    def needs_vec(self) -> bool:
        """Whether the plan uses `vec` or `y`, which a forward lacks when its modulation was computed before."""
        used = {site for _, placed in self._by_block.get("", ()) for site in _sites_of(placed)}
        return not used.isdisjoint(("vec", "y"))

    def begin(self, sigma: float) -> None:
        """Set the step for the next forwards."""
        self.sigma, self.step = sigma, step_of(sigma, self.sigmas)

    def finish(self) -> None:
        """End the sampling: captured values are written to files, whose paths are printed. DiskError."""
        self._end()

    def discard(self) -> None:
        """End a sampling that will be done again: nothing of it is kept."""
        self._end.detach()
        for end in self._ends:
            end.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    # What the model's loop calls -------------------------------------------------------------------

    def value(self, name: str, x: Any) -> Any:
        block, site = split(name)
        if site == "txt_in":  # the first of a forward
            if self._ends and not self._end.alive:
                raise UsageError(
                    "this run has ended, and its captures are written. Next: another run for other forwards"
                )
            self._txt_len = x.shape[1]
            self.call = self._calls[self.step]
            self._calls[self.step] += 1
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

        inner: Callable[[Any], Any] = lambda x: self._run_block(name, block, active, lambda run: call(x, run, tap), run)  # noqa: E731
        for placed in active:
            if isinstance(placed, Around):
                inner = self._wrap(placed, inner)
        x = inner(x)
        self._read_at(name, x, active)
        x = self._streams(name, "out", x, active)
        self._call_readers(getattr(tap, "values", {}), active)
        return x

    def _wrap(self, around: Around, inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapped(x: Any) -> Any:
            new = self._called(around.fn, around.block, inner, x, self._at(around.block))
            try:
                if isinstance(x, Tensor):
                    return fitting(new, x.shape, x, around.fn, "")
                if not isinstance(new, tuple) or len(new) != len(x):
                    raise Misfit(around.fn, "", f"returned {described(new, x[0])}; expected (img, txt)")
                return tuple(fitting(one, old.shape, old, around.fn, "") for one, old in zip(new, x, strict=True))
            except Misfit as misfit:
                raise self._hook_error(misfit.fn, around.block, misfit.text) from None

        return wrapped

    def _run_block(
        self, name: str, block: Any, active: list[Any], call: Callable[[Callable[..., Any]], Any], run: Any
    ) -> Any:
        """Run the block with its taps. HookError for what a function inside it did."""
        try:
            return call(run)
        except Misfit as misfit:
            raise self._hook_error(misfit.fn, f"{name}.{misfit.site}", misfit.text) from None
        except Exception as error:
            inside = [x for x in active if isinstance(x, Write) and x.traceable and is_inside(split(x.site)[1])]
            compiled = run is block and getattr(block, "_compiled_call_impl", None) is not None
            if inside and compiled and not is_foreign(error):
                self._run_block(name, block, active, call, block.forward)  # whose error says more
            if not inside or compiled or is_foreign(error):  # it is the block's own, or compiling that fails
                with foreign():
                    raise
            raise self._failure(inside[0].fn, inside[0].site, error) from error

    def _prepare(self, name: str, block: Any, active: list[Any]) -> tuple[Callable[..., Any], Tap]:
        """The block as a function (compiled, or eager where a function inside is not traceable), and its taps."""
        functions: dict[str, tuple[BoundFunction, ...]] = {}
        run = block
        for placed in active:
            site = split(placed.site)[1] if isinstance(placed, Write) else ""
            if is_inside(site):
                functions[site] = (*functions.get(site, ()), self._bind(placed))
                if not placed.traceable:
                    run = block.forward
                    self._warn_eager(name, block, placed)
        readers = [placed for placed in active if isinstance(placed, Read)]
        sites = (split(name)[1] for read in readers for name in read.sites)
        reads = frozenset(site for site in sites if is_inside(site))
        return run, Taps(self._txt_len, functions, reads) if functions or reads else UNTOUCHED

    def _bind(self, write: Write) -> BoundFunction:
        if write.traceable:
            return write.fn, self._args(write)
        return wraps(write.fn)(partial(self._called, write.fn, write.site)), (self._at(write.site),)

    def _args(self, write: Write) -> tuple[Tensor, ...]:
        """The tensors of a Write on the device of this forward; moved once."""
        if any(isinstance(arg, Tensor) and arg.requires_grad for arg in write.args):
            return tuple(map(self._tensor, write.args))  # which an optimizer may change from step to step
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
                x = _with_strides_of(x, self._written(placed, x))
        self._read_at(name, x, active)
        return x

    def _written(self, write: Write, x: Tensor) -> Tensor:
        try:
            args = self._args(write) if write.traceable else (self._at(write.site),)
            return fitting(self._called(write.fn, write.site, x, *args), x.shape, x, write.fn, write.site)
        except Misfit as misfit:
            raise self._hook_error(misfit.fn, write.site, misfit.text) from None

    # Readers ----------------------------------------------------------------------------------------

    def _read_at(self, name: str, x: Any, active: list[Any]) -> None:
        """Call the Reads of a site outside the blocks' graphs, or of a block itself."""
        for placed in active:
            if isinstance(placed, Read) and placed.sites == (name,):
                self._read(placed, x)

    def _call_readers(self, found: dict[str, Tensor], active: list[Any]) -> None:
        """Call the Reads whose sites are all among the values found inside a block."""
        for placed in active:
            if isinstance(placed, Read):
                values = [found.get(split(site)[1]) for site in placed.sites]
                if all(value is not None for value in values):
                    self._read(placed, *values)

    def _read(self, read: Read, *values: Any) -> None:
        """Call a reader. HookError where it writes into a value."""
        tensors = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
        versions = [None if x.is_inference() else x._version for x in tensors]
        self._called(read.fn, read.sites[0], self._at(read.sites[0]), *values)
        if versions != [None if x.is_inference() else x._version for x in tensors]:
            said = "changed a value in place. A reader changes nothing. Next: clone it, or leave reads=True out"
            raise self._hook_error(read.fn, read.sites[0], said)

    # Calling functions ------------------------------------------------------------------------------

    def _called(self, fn: Callable[..., Any], name: str, *values: Any) -> Any:
        """What a function returns. HookError with its place where it raises."""
        try:
            return fn(*values)
        except Exception as error:
            if isinstance(error, Misfit) or is_foreign(error):
                raise
            raise self._failure(fn, name, error) from error

    def _failure(self, fn: Callable[..., Any], name: str, error: Exception) -> HookError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return self._hook_error(fn, name, f"raised {type(error).__name__}: {error} ({where})")

    def _hook_error(self, fn: Callable[..., Any], name: str, text: str) -> HookError:
        called = getattr(fn, "__name__", None) or type(fn).__name__
        return HookError(f"{called} at {name}, step {self.step}, {text}")

    def _active_at(self, block: str) -> list[Any]:
        """The functions placed at a block (or, by "", at the whole forward) that are active at this step."""
        return [placed for intervention, placed in self._by_block.get(block, ()) if intervention.at_step(self.step)]

    def _at(self, name: str) -> At:
        call = max(self.call, 0)
        branches = (self.branches[call % len(self.branches)],) if self.passes else self.branches
        return At(name, self.step, self.sigma, call, self._txt_len, branches, self.num_steps, self.image, self._token)


def _check_schedule(sigmas: Sequence[float]) -> None:
    """UsageError for a schedule that neither falls nor rises."""
    pairs = list(pairwise(sigmas))
    if not sigmas or not (all(a > b for a, b in pairs) or all(a < b for a, b in pairs)):
        shown = ", ".join(f"{sigma:g}" for sigma in sigmas[:6])
        raise UsageError(f"the sigmas of a schedule all fall or all rise, and these are {shown or 'none'}")


def _end_all(ends: list[End], about: About) -> None:
    with ExitStack() as stack:  # where one fails, the others end all the same
        for end in reversed(ends):
            stack.callback(end.finish, about)


def _with_strides_of(old: Tensor, new: Tensor) -> Tensor:
    """The new value with the strides of the old, which a compiled block is specialized on."""
    if new.stride() == old.stride():
        return new
    return torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device).copy_(new)


def _sites_of(placed: Any) -> tuple[str, ...]:
    return (placed.site,) if isinstance(placed, Write) else placed.sites if isinstance(placed, Read) else ()


def _block_of(placed: Any) -> str:
    return placed.block if isinstance(placed, Around) else split(_sites_of(placed)[0])[0]


def run_with_cache(model: Flux, names: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity of one forward, and by full name the values at the sites that `names` match.

    names: patterns, as in `Capture.sites`. inputs: those of `Flux.forward`, or what `prepare` gives with timesteps and
    guidance, which may be numbers.
    """
    if "vec" in inputs:
        inputs["y"] = inputs.pop("vec")
    img, values = inputs["img"], dict[str, Tensor]()
    for name in ("timesteps", "guidance"):
        if isinstance(inputs.get(name), int | float):
            inputs[name] = torch.full(img.shape[:1], inputs[name], dtype=img.dtype, device=img.device)
    run = HookRun([Capture(sites=names, into=values)], model.params)
    velocity = model(**inputs, run=run)
    return velocity, {name.partition(".")[2]: x for name, x in values.items()}
