"""The training loop, and what it needs to go on after it was killed, to the bit.

What a step draws (pictures, noise, noise levels) is a function of the seed and the step alone, so there is no state of
generators to keep: a checkpoint is the factors, their optimizer's moments, and the losses so far, in one file that
appears whole. The same examples, recipe and machine give the same bytes.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checkpoint.write import write_safetensors
from ..errors import FileError, NonFiniteError, UsageError
from ..files import disk_errors
from ..sampling import FlowInputs, image_ids
from .adapter import Adapter
from .objective import MAPS, WEIGHTINGS, flow_loss, on_table

BETAS, EPS = (0.9, 0.999), 1e-8
"""of AdamW, as in diffusers' script"""
CHECKPOINT = "step-{:07d}.safetensors"
SAVED = re.compile(r"step-(\d{7})\.safetensors")
DRAWN = ("order", "noise", "level")
"""what is drawn, each from numbers of its own"""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. Defaults are those of diffusers' script; two runs of one recipe are equal."""

    steps: int
    lr: float = 1e-4
    batch: int = 1
    accumulation: int = 1
    """micro-batches of a step, whose mean is taken"""
    warmup: int = 0
    """steps in which the rate grows from 0"""
    schedule: str = "constant"
    """of the rate after that: constant, or cosine to 0"""
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    timesteps: str = "logit_normal"
    """a name in `MAPS`"""
    timestep_options: Mapping[str, float] = field(default_factory=dict)
    on_table: bool = True
    """whether levels are those of diffusers' table of 1000"""
    weighting: str = "none"
    """a name in `WEIGHTINGS`"""
    guidance: float = 3.5
    seed: int = 0
    checkpointing: str = "none"
    """which blocks are computed again for their gradient: none, blocks (all), or second (every second)"""

    def __post_init__(self) -> None:
        """UsageError for a value that is none."""
        known = {
            "timesteps": MAPS, "weighting": WEIGHTINGS, "schedule": SCHEDULES, "checkpointing": CHECKPOINTING,
        }  # fmt: skip
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")
        for name in ("steps", "batch", "accumulation"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
}
"""factors of the rate, by the share of steps behind the warm-up that is done"""
CHECKPOINTING: Mapping[str, Callable[[int], bool]] = {
    "none": lambda i: False,
    "blocks": lambda i: True,
    "second": lambda i: i % 2 == 1,
}
"""whether a block is computed again, by its number"""


class Example(NamedTuple):
    """A picture to learn from, encoded."""

    name: str
    latents: Tensor
    """[16, H/8, W/8], as the transformer takes them"""
    txt: Tensor
    """[T, D], in the dtype that the model computes in"""
    vec: Tensor
    """[V]"""


class Progress(NamedTuple):
    """What is told after a step."""

    step: int
    """steps that are done"""
    loss: float
    rate: float
    names: list[str]


@torch.enable_grad()
def train(
    adapter: Adapter,
    examples: Sequence[Example],
    recipe: Recipe,
    folder: Path | None = None,
    every: int = 100,
    keep: int = 2,
    on_step: Callable[[Progress], bool | None] | None = None,
) -> list[float]:
    """Train an adapter in place, and return the loss of each step.

    folder: where checkpoints are, from the last of which it goes on; one is written every so many steps and at the end,
    and the newest `keep` stay. on_step: called after each step; when it returns True, the state is saved, and training
    ends. UsageError where a checkpoint is of another recipe, FileError for one that cannot be read, DiskError;
    NonFiniteError names step and pictures, and changes nothing that was saved.
    """
    check(examples)
    parameters = adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, recipe.lr, BETAS, EPS, recipe.weight_decay)
    run = identity(recipe, examples, adapter)
    losses = [] if folder is None else resume(folder, adapter, optimizer, run)
    for step in range(len(losses), recipe.steps):
        rate = recipe.lr * factor(recipe, step)
        optimizer.param_groups[0]["lr"] = rate
        total, names = 0.0, []
        for micro in range(step * recipe.accumulation, (step + 1) * recipe.accumulation):
            batch = drawn(examples, recipe, micro)
            loss = loss_of(adapter, batch, recipe, micro)
            names += [one.name for one in batch]
            if not loss.isfinite():
                raise NonFiniteError(f"step {step + 1}: the loss of {', '.join(names)} is {loss.item()}")
            (loss / recipe.accumulation).backward()
            total += loss.item() / recipe.accumulation
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        ends = on_step is not None and on_step(Progress(step + 1, total, rate, names)) is True
        if folder is not None and (ends or len(losses) == recipe.steps or len(losses) % every == 0):
            save(folder, adapter, optimizer, losses, run, keep)
        if ends:
            break
    return losses


def factor(recipe: Recipe, step: int) -> float:
    """Of the rate, at a step counted from 0."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return SCHEDULES[recipe.schedule]((step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))


def loss_of(adapter: Adapter, batch: Sequence[Example], recipe: Recipe, micro: int) -> Tensor:
    """The loss of a micro-batch, at the noise and the levels that are its own."""
    model, device = adapter.model, adapter.parameters()[0].device
    latents, txt, vec = (torch.stack(parts).to(device) for parts in list(zip(*batch, strict=True))[1:])
    noise = torch.randn(latents.shape, dtype=torch.float32, device="cpu", generator=generator(recipe, "noise", micro))
    inputs = FlowInputs(
        img_ids=image_ids(len(batch), latents.shape[2] // 2, latents.shape[3] // 2, device),
        txt=txt,
        txt_ids=torch.zeros(len(batch), txt.shape[1], 3, dtype=torch.float32, device=device),
        vec=vec,
        guidance=torch.full((len(batch),), recipe.guidance, dtype=txt.dtype, device=device),
    )
    sigma, weighting = levels(recipe, micro, len(batch)).to(device), WEIGHTINGS[recipe.weighting]
    again = CHECKPOINTING[recipe.checkpointing]
    fetch = iter if recipe.checkpointing == "none" else partial(recomputed, again=again)
    return flow_loss(model, inputs, latents, noise.to(device), sigma, weighting, fetch).mean()


def recomputed(blocks: Iterable[Any], again: Callable[[int], bool]) -> Iterator[Any]:
    """The blocks, of which some keep only their inputs for the backward."""
    for i, block in enumerate(blocks):
        yield partial(checkpoint, block, use_reentrant=False) if again(i) else block


def drawn(examples: Sequence[Example], recipe: Recipe, micro: int) -> list[Example]:
    """The examples of a micro-batch: each is seen once before any is seen again."""
    found = []
    for number in range(micro * recipe.batch, (micro + 1) * recipe.batch):
        epoch, at = divmod(number, len(examples))
        order = torch.randperm(
            len(examples), dtype=torch.int64, device="cpu", generator=generator(recipe, "order", epoch)
        )
        found.append(examples[int(order[at])])
    return found


def levels(recipe: Recipe, micro: int, count: int) -> Tensor:
    """The noise levels of a micro-batch, fp32 [B], on the CPU."""
    way, draw = MAPS[recipe.timesteps], generator(recipe, "level", micro)
    make = torch.randn if way.is_normal else torch.rand
    sigma = way.sigma(make(count, dtype=torch.float32, device="cpu", generator=draw), **dict(recipe.timestep_options))
    return on_table(sigma) if recipe.on_table else sigma


def generator(recipe: Recipe, what: str, number: int) -> torch.Generator:
    """Numbers that hang on the seed, on what is drawn, and on its number."""
    digest = sha256(f"{recipe.seed} {DRAWN.index(what)} {number}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check(examples: Sequence[Example]) -> None:
    """UsageError where there are none, or shapes differ."""
    if not examples:
        raise UsageError("there is nothing to train on")
    shapes = {(tuple(one.latents.shape), tuple(one.txt.shape)) for one in examples}
    if len(shapes) > 1:
        raise UsageError(f"examples of {len(shapes)} shapes: they must be of one size, with as many text tokens")


# Checkpoints -------------------------------------------------------------------------------------------


def identity(recipe: Recipe, examples: Sequence[Example], adapter: Adapter) -> dict[str, str]:
    """What a run is, as text: its recipe, its examples, and what learns. The frozen weights are the caller's matter."""
    digest = sha256()
    for one in examples:
        for x in (one.latents, one.txt, one.vec):
            digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    known = {key: json.dumps(value, sort_keys=True) for key, value in asdict(recipe).items()}
    ranks = sorted((name, len(one.down)) for name, one in adapter.factors.items())
    modules = f"{len(ranks)}, {sha256(repr(ranks).encode()).hexdigest()[:8]}"
    return {**known, "alpha": str(adapter.alpha), "modules": modules, "examples": digest.hexdigest()[:16]}


def save(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
    run: Mapping[str, str],
    keep: int,
) -> None:
    """Write a checkpoint of a run whole, then delete those before the newest `keep`. run: `identity`. DiskError."""
    with disk_errors(folder, "folder"):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64, device="cpu")}
    for name, x in numbers_of(adapter, optimizer).items():
        tensors[name] = x.detach().cpu()
    write_safetensors(folder / CHECKPOINT.format(len(losses)), tensors, run)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def resume(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, str],
) -> list[float]:
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
    for key, value in run.items():
        if metadata.get(key) != value:
            raise UsageError(
                f"{path} was trained with {key} {metadata.get(key, 'unknown')}, not {value}. Next: go on with what it "
                "was trained with, or name another folder"
            )
    for x in adapter.parameters():  # AdamW makes its moments at its first step
        x.grad = torch.zeros_like(x)
        optimizer.state[x] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": torch.zeros_like(x),
            "exp_avg_sq": torch.zeros_like(x),
        }
        x.grad = None
    mine = numbers_of(adapter, optimizer)
    with torch.no_grad():
        for name, mine_now in mine.items():
            mine_now.copy_(tensors[name])
    return tensors["losses"].tolist()


def numbers_of(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a step changes, by name: the tensors themselves."""
    found: dict[str, Tensor] = {}
    for module in sorted(adapter.factors):
        for name, x in adapter.factors[module].named_parameters():
            found[f"{module}.{name}"] = x
            found |= {f"{module}.{name}.{key}": value for key, value in optimizer.state[x].items()}
    return found


def checkpoints(folder: Path) -> list[Path]:
    """A folder's checkpoints, the oldest first."""
    return sorted(path for path in folder.glob("*") if SAVED.fullmatch(path.name)) if folder.is_dir() else []
