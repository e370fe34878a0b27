"""The training loop, and what it needs to go on after it was killed, to the bit.

What a step draws (pictures, crops, captions, noise, noise levels) is a function of the seed and the step alone, so
there is no state of generators to keep: a checkpoint is the factors, what the optimizer and the average know of them,
and the losses so far, in one file that appears whole. The same sources, recipe and machine give the same bytes.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint.write import write_safetensors
from ..errors import FileError, NonFiniteError, UsageError
from ..files import disk_errors
from ..model.transformer import Fetch
from .adapter import Adapter
from .loss import parts
from .objective import MAPS, on_table, shifted
from .optimizers import OPTIMIZERS, average_of, grouped, restore, set_rate, state_of
from .ranks import ALONE, Ranks
from .recipe import SCHEDULES, Example, Recipe, Source
from .recompute import differentiable

CHECKPOINT = "step-{:07d}.safetensors"
SAVED = re.compile(r"step-(\d{7})\.safetensors")
DRAWN = ("order", "noise", "level", "example", "validation")
"""what is drawn, each from numbers of its own"""
ADDED = (
    "takes", "lora_plus", "loss", "huber_c", "huber_schedule", "preserve", "preserve_weight", "contrast", "mask_prior",
)  # fmt: skip
"""what recipes had no word for at first: at its default it is no part of a run's identity"""
DATA = "data"
"""settings that examples are made by, as JSON, in `about`: they say what differs where pictures do, and no more"""
VALIDATED = (0.1, 0.3, 0.5, 0.7, 0.9)
"""noise levels at which held-out pictures are judged"""
WHOLE = slice(None)
SCALE, DOUBLED_AFTER = 2.0**16, 2000
"""of the loss at first, and the steps without an overflow after which it doubles (Micikevicius et al. 2018)"""


class Progress(NamedTuple):
    """What is told after a step."""

    step: int
    """steps that are done"""
    loss: float
    rate: float
    norm: float
    """of the gradient before it is clipped; infinite where fp16 overflowed, and nothing was learned"""
    names: list[str]
    """of the pictures that this process computed"""


@torch.enable_grad()
def train(
    adapter: Adapter,
    sources: Sequence[Source],
    recipe: Recipe,
    folder: Path | None = None,
    every: int = 100,
    keep: int = 2,
    on_step: Callable[[Progress], bool | None] | None = None,
    about: Mapping[str, str] | None = None,
    fetch: Fetch | None = None,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Train an adapter in place, and return the loss of each step.

    folder: where checkpoints are, from the last of which it goes on; one is written every so many steps and at the end,
    and the newest `keep` stay. on_step: called after each step; when it returns True, the state is saved, and training
    ends. about: what else a run hangs on, by name, such as a hash of the base; all but `DATA` must be the same to go
    on. fetch: as in `Flux.forward`, instead of the recipe's checkpointing. ranks: who trains; the first saves, all
    return the losses. UsageError where a checkpoint is of another run, FileError for one that cannot be read,
    DiskError; NonFiniteError names step and pictures, and changes nothing that was saved.
    """
    check(sources)
    share = ranks.share(recipe)
    state, run = State(adapter, recipe), identity(recipe, sources, adapter) | dict(about or {})
    losses = [] if folder is None else resume(folder, state, run)
    with differentiable(adapter.model, recipe.checkpointing):
        for step in range(len(losses), recipe.steps):
            found: list[Tensor] = []
            names: list[str] = []
            for micro in range(step * recipe.accumulation, (step + 1) * recipe.accumulation)[share.micros]:
                batch = drawn(sources, recipe, micro)
                for part in parts_of(adapter, batch, recipe, micro, fetch, share.rows):
                    if part.requires_grad:  # not without the word that learns alone: it has no part in such a text
                        (part * (state.scale / recipe.accumulation / share.parts)).backward()
                    found.append(part.detach())  # looked at behind the backward, so that a card need not wait
                names += [one.name for one in batch[share.rows]]
            own = float(torch.stack(found).double().sum() / recipe.accumulation / share.parts)
            total = ranks.total(own)
            if not math.isfinite(total):
                names = ranks.all_of(names if not math.isfinite(own) else [])
                raise NonFiniteError(unstable(recipe, f"the loss of {', '.join(names)} is {total}", step))
            ranks.add_gradients(state.parameters)
            rate = recipe.lr * factor(recipe, step)
            norm = state.update(rate, partial(unstable, recipe, step=step), names)
            losses.append(total)
            ends = ranks.any(on_step is not None and on_step(Progress(step + 1, total, rate, norm, names)) is True)
            if folder is not None and (ends or len(losses) == recipe.steps or len(losses) % every == 0):
                ranks.check_equal(state.parameters)
                if ranks.is_first:
                    save(folder, state, losses, run, keep)
            if ends:
                break
    return losses


class State:
    """All that a step changes: factors, what the optimizer knows of them, their average, the scale of the loss."""

    def __init__(self, adapter: Adapter, recipe: Recipe) -> None:
        self.adapter, self.recipe, self.named = adapter, recipe, adapter.named_parameters()
        self.parameters = list(self.named.values())
        groups = grouped(self.named, adapter.factors_of_rate(recipe.lr, recipe.lora_plus))
        self.optimizer = OPTIMIZERS[recipe.optimizer](groups, recipe.lr, recipe.weight_decay)
        adapter.average = average_of(self.optimizer, self.named, recipe.ema)
        self.scale, self.good = SCALE if recipe.precision == "fp16" else 1.0, 0

    def update(self, rate: float, explain: Callable[[str], str], names: Sequence[str]) -> float:
        """Learn from the gradients, and forget them. Returns their norm. NonFiniteError."""
        set_rate(self.optimizer, rate)
        if self.scale != 1:
            for x in self.parameters:
                if x.grad is not None:
                    x.grad.div_(self.scale)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm or math.inf))
        if math.isfinite(norm):
            self.optimizer.step()
            if self.adapter.average is not None:
                self.adapter.average.update()
            self.good += 1
        elif self.recipe.precision != "fp16" or self.scale <= 1:
            raise NonFiniteError(explain(f"the gradient of {', '.join(names)} is not finite"))
        self.optimizer.zero_grad()
        if self.recipe.precision == "fp16" and not math.isfinite(norm):
            self.scale, self.good = self.scale / 2, 0
        elif self.recipe.precision == "fp16" and self.good == DOUBLED_AFTER:
            self.scale, self.good = min(2 * self.scale, SCALE), 0
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        found = {name: x.detach() for name, x in self.named.items()} | state_of(self.optimizer, self.named)
        if self.adapter.average is not None:
            found |= self.adapter.average.state()
        scale = torch.tensor([self.scale, self.good], dtype=torch.float64, device="cpu")
        return {name: x.cpu() for name, x in (found | {"scale": scale}).items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take everything from tensors of these names."""
        for name, x in self.named.items():
            x.copy_(tensors[name])
        restore(self.optimizer, self.named, tensors)
        if self.adapter.average is not None:
            self.adapter.average.load(tensors)
        scale, good = tensors["scale"].tolist()
        self.scale, self.good = scale, int(good)


def unstable(recipe: Recipe, what: str, step: int) -> str:
    """An error's text."""
    wide = " Next: leave --precision fp16 out: its numbers end at 65504" if recipe.precision == "fp16" else ""
    return f"step {step + 1}: {what}.{wide or ' Next: a smaller --lr'}"


def factor(recipe: Recipe, step: int) -> float:
    """Of the rate, at a step counted from 0."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return SCHEDULES[recipe.schedule]((step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))


def loss_of(
    adapter: Adapter, batch: Sequence[Example], recipe: Recipe, micro: int, fetch: Fetch | None = None
) -> Tensor:
    """The loss of a micro-batch, at the noise and the levels that are its own."""
    return torch.stack([*parts_of(adapter, batch, recipe, micro, fetch)]).sum()


def parts_of(
    adapter: Adapter, batch: Sequence[Example], recipe: Recipe, micro: int, fetch: Fetch | None = None,
    rows: slice = WHOLE,
) -> Iterator[Tensor]:  # fmt: skip
    """Its parts, the mean over those pictures of each: gradients of one are taken before the next is computed."""
    noise = noise_like(batch, generator(recipe, "noise", micro))
    tokens = batch[0].latents[0].numel() // 4  # packed two by two
    sigma = levels(recipe, micro, len(batch), tokens)
    for part in parts(adapter, batch[rows], recipe, noise[rows], sigma[rows], fetch):
        yield part.mean()


def noise_like(batch: Sequence[Example], draw: torch.Generator) -> Tensor:
    """Noise for the latents of a batch, on the CPU."""
    return torch.randn((len(batch), *batch[0].latents.shape), dtype=torch.float32, device="cpu", generator=draw)


def each_loss(
    adapter: Adapter, batch: Sequence[Example], recipe: Recipe, noise: Tensor, sigma: Tensor, fetch: Fetch | None = None
) -> Tensor:
    """The loss of each picture of a batch, fp32 [B]. noise: as the latents; sigma: [B]."""
    return torch.stack([*parts(adapter, batch, recipe, noise, sigma, fetch)]).sum(0)


@torch.no_grad()
def validate(adapter: Adapter, sources: Sequence[Source], recipe: Recipe, fetch: Fetch = iter) -> float:
    """The mean loss of pictures at fixed noise and at the levels `VALIDATED`, unweighted: comparable between steps.

    It is of the factors' average, where there is one. fetch: as in `Flux.forward`.
    """
    plain, total = unweighted(recipe), 0.0
    with adapter.averaged(), differentiable(adapter.model, "none"):
        for i, source in enumerate(sources):
            one = source.draw(None)
            noise = noise_like([one], generator(recipe, "validation", i))
            for level in VALIDATED:
                sigma = torch.full((1,), level, dtype=torch.float32, device="cpu")
                total += each_loss(adapter, [one], plain, noise, sigma, fetch).item()
    return total / (len(sources) * len(VALIDATED))


def unweighted(recipe: Recipe) -> Recipe:
    """A recipe whose loss is the squared error of the velocity, and nothing else."""
    return replace(
        recipe, timesteps="uniform", weighting="none", loss="l2", preserve="", contrast=0.0, mask_prior=0.0
    )  # fmt: skip


def drawn(sources: Sequence[Source], recipe: Recipe, micro: int) -> list[Example]:
    """The examples of a micro-batch: each picture is seen once before any is seen again, but to fill a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(sources):
        groups.setdefault(one.size, []).append(i)
    epoch, at = divmod(micro, sum(-(-len(places) // recipe.batch) for places in groups.values()))
    draw, batches = generator(recipe, "order", epoch), []
    for places in groups.values():
        order = [places[i] for i in permuted(len(places), draw)]
        for first in range(0, len(order), recipe.batch):
            batches.append([order[i % len(order)] for i in range(first, first + recipe.batch)])
    chosen = batches[permuted(len(batches), draw)[at]]
    one_of = generator(recipe, "example", micro)
    return [sources[i].draw(one_of) for i in chosen]


def permuted(count: int, draw: torch.Generator) -> list[int]:
    """The numbers below `count` in a drawn order."""
    return torch.randperm(count, dtype=torch.int64, device="cpu", generator=draw).tolist()


def levels(recipe: Recipe, micro: int, count: int, tokens: int = 0) -> Tensor:
    """The noise levels of a micro-batch, fp32 [B], on the CPU. tokens: of a picture, for `flux_shift`."""
    way, draw, options = MAPS[recipe.timesteps], generator(recipe, "level", micro), dict(recipe.timestep_options)
    make = torch.randn if way.is_normal else torch.rand
    if recipe.timesteps == "flux_shift":
        options.setdefault("tokens", tokens)
    shift = 1.0 if recipe.timesteps == "shift" else options.pop("shift", 1.0)  # a way of its own has its own formula
    sigma = way.sigma(make(count, dtype=torch.float32, device="cpu", generator=draw), **options)
    sigma = on_table(sigma) if recipe.on_table else sigma
    return sigma if shift == 1 else shifted(sigma, shift)


def generator(recipe: Recipe, what: str, number: int) -> torch.Generator:
    """Numbers that hang on the seed, on what is drawn, and on its number."""
    digest = sha256(f"{recipe.seed} {DRAWN.index(what)} {number}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check(sources: Sequence[Source]) -> None:
    """UsageError where there is nothing to train on."""
    if not sources:
        raise UsageError("there is nothing to train on")


# Checkpoints -------------------------------------------------------------------------------------------


def identity(recipe: Recipe, sources: Sequence[Source], adapter: Adapter) -> dict[str, str]:
    """What a run is, as text: its recipe, its pictures, and what learns. The frozen weights are the caller's matter."""
    digest = sha256()
    for one in sources:
        digest.update(f"{one.name}\n{one.digest}\n".encode())
    told = asdict(recipe)
    for name in ADDED:
        if told[name] == Recipe.__dataclass_fields__[name].default:
            del told[name]  # as of versions that did not know it
    if recipe.schedule == "constant":
        del told["steps"]  # which nothing hangs on: a run may go on for longer
    known = {key: json.dumps(value, sort_keys=True) for key, value in (told | adapter.identity()).items()}
    modules = sha256(known.pop("target_modules").encode()).hexdigest()[:8]
    return {**known, "modules": f"{len(adapter.factors)}, {modules}", "pictures": digest.hexdigest()[:16]}


def save(folder: Path, state: State, losses: Sequence[float], run: Mapping[str, str], keep: int) -> None:
    """Write a checkpoint of a run whole, then delete those before the newest `keep`. run: `identity`. DiskError."""
    with disk_errors(folder, "folder"):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64, device="cpu"), **state.tensors()}
    write_safetensors(folder / CHECKPOINT.format(len(losses)), tensors, run)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def resume(folder: Path, state: State, run: Mapping[str, str]) -> list[float]:
    """Take the numbers of the newest checkpoint of a run, and return the losses so far, none without one.

    run: `identity`. UsageError, FileError: as in `train`.
    """
    if not (found := checkpoints(folder)):
        return []
    path = found[-1]
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: the checkpoint could not be read: {error}. Next: delete it.") from error
    for key in {**run, **metadata}:
        if key not in ("format", DATA) and metadata.get(key) != run.get(key):
            raise UsageError(
                f"{path} was trained {_unlike(key, metadata, run)}. Next: go on with what it was trained with, or name "
                "another folder"
            )
    state.load(tensors)
    return tensors["losses"].tolist()


def _unlike(key: str, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How runs differ in an entry of their identities, from which what had its default may be missing."""
    if key == "pictures" and DATA in then and DATA in now:
        old, new = json.loads(then[DATA]), json.loads(now[DATA])
        found = [_unlike(name, old, new) for name in {**old, **new} if old.get(name) != new.get(name)]
        general = "with other pictures or captions in the same folders, or other encoders, versions, devices or threads"
        return " and ".join(found) or general
    default = json.dumps(Recipe.__dataclass_fields__[key].default) if key in ADDED else None
    one, other = then.get(key, default), now.get(key, default)
    if one is None:
        return f"without {key}, not with {other}"
    return f"with {key} {one}, not {'without' if other is None else other}"


def checkpoints(folder: Path) -> list[Path]:
    """A folder's checkpoints, the oldest first."""
    return sorted(path for path in folder.glob("*") if SAVED.fullmatch(path.name)) if folder.is_dir() else []
