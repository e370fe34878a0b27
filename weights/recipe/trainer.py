"""What every stage of the recipe shares: AdamW with a moving average, and files to resume from and to hand on.

A stage is a loop over steps that may be cut at any time: `Trainer.save` writes parameters, both moments of AdamW, their
moving average and the step count as safetensors, and `Trainer.resume` finds them again. What a stage hands on is the
moving average in bf16, in shards small enough to travel.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux_core.training.optimizers import grouped, set_rate

SHARD_BYTES = int(15.9 * 2**20)
BORN = time.monotonic()


def say(text: str) -> None:
    """A line with the seconds since this process began."""
    print(f"{time.monotonic() - BORN:6.1f}s  {text}", flush=True)


def stage_arguments(
    doc: str, steps: int, minutes: float, batch: int, lr: float, data: bool = False
) -> argparse.ArgumentParser:
    """The arguments of every stage; `data`: whether it reads the raw data, too."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("work", type=Path, help="folder of states and results")
    parser.add_argument("--steps", type=int, default=steps, help="the stage ends after so many steps ...")
    parser.add_argument("--minutes", type=float, default=minutes, help="... or so many minutes of training")
    parser.add_argument(
        "--pause", type=float, default=1e9, help="save and stop after so many minutes; run again to go on"
    )
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--device", default="cuda")
    return parser


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def write_shards(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    """Cut a state dict into files `stem-0.safetensors`, … of at most SHARD_BYTES each."""
    shard: dict[str, Tensor] = {}
    index = size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES and shard:
            write(folder / f"{stem}-{index}.safetensors", shard)
            shard, index, size = {}, index + 1, 0
        shard[name] = tensor
        size += tensor.nbytes
    write(folder / f"{stem}-{index}.safetensors", shard)


def read_shards(folder: Path, stem: str) -> dict[str, Tensor]:
    """The state dict that `write_shards` cut."""
    files = sorted(folder.glob(f"{stem}-[0-9].safetensors"))
    if not files:
        raise SystemExit(f"{folder}: no {stem}-*.safetensors; run the stage before this one first")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def restore(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill every parameter from weights of the same names (tied parameters have one name, unlike in a state dict)."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


class Trainer:
    """A module in training: its optimizer, moving average and progress."""

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        steps: int,
        minutes: float,
        warmup: int = 500,
        decay_from: float = 0.6,
        rates: dict[str, float] | None = None,
    ) -> None:
        """`rates`: parameters, by name, whose learning rate is that part of `lr`."""
        self.module, self.lr, self.steps, self.minutes = module, lr, steps, minutes
        self.warmup, self.decay_from = warmup, decay_from
        self.names = [name for name, _ in module.named_parameters()]
        self.params = list(module.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        groups, fused = grouped(dict(module.named_parameters()), rates or {}), self.params[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
        self.step, self.seconds = 0, 0.0

    @property
    def progress(self) -> float:
        """The fraction of the stage that is done: of its steps or of its time, whichever is more."""
        return max(self.step / self.steps, self.seconds / (60 * self.minutes))

    def rate(self) -> float:
        """Warm-up, a plateau, and from `decay_from` of the way a straight line to 2 %."""
        decay = min(1.0, (1 - self.progress) / (1 - self.decay_from))
        return self.lr * min(1.0, (self.step + 1) / self.warmup) * max(0.02, decay)

    def update(self, loss: Tensor) -> None:
        """One step of AdamW with the gradient's norm held under 1, and of the moving average."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        set_rate(self.optimizer, self.rate())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.999, self.step / (self.step + 20))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - keep)

    def loop(self, pause: float) -> Iterator[int]:
        """Step numbers, until the stage is done or `pause` minutes of this process are over."""
        started, before = time.monotonic(), self.seconds
        while self.progress < 1 and time.monotonic() - BORN < 60 * pause:
            yield self.step
            self.seconds = before + time.monotonic() - started

    def average(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The moving average by parameter name: what a stage hands on."""
        return {name: p.to(dtype).cpu() for name, p in zip(self.names, self.ema, strict=True)}

    def load_average(self) -> None:
        """Replace the parameters by the moving average, to see what it draws."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.ema)

    def save(self, path: Path) -> None:
        """Write what `resume` needs; nothing before the first step."""
        if not self.step:
            return
        state = {}
        for name, p, ema in zip(self.names, self.params, self.ema, strict=True):
            moments = self.optimizer.state[p]
            state |= {f"param.{name}": p.detach(), f"ema.{name}": ema}
            state |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        write(path, state, {"step": str(self.step), "seconds": str(self.seconds)})

    def resume(self, path: Path) -> None:
        """Resume from a saved state, if there is one."""
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            found = file.metadata()
        self.step, self.seconds = int(found["step"]), float(found["seconds"])
        state = load_file(path, device=str(self.params[0].device))
        with torch.no_grad():
            for name, p, ema in zip(self.names, self.params, self.ema, strict=True):
                p.copy_(state[f"param.{name}"])
                ema.copy_(state[f"ema.{name}"])
                moments = {key: torch.empty_like(p).copy_(state[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step), device=p.device), **moments}
        say(f"resumed {path.name} at step {self.step}")
