"""Weights rounded to fp8 by GPTQ, on the inputs of a model's Linears as it draws: `save --dtype fp8 --calibrate`.

The prompts are drawn once, by the unquantized model, and the latents of every third step are kept. These forwards are
repeated, with hooks at the Linears that sum x x^T over their inputs. That takes K^2 fp32 numbers for a Linear of K
features, at full size 65 GB in all, so a group of Linears within `BUDGET` is measured and rounded at a time. The model
is not changed until the end, so the order of the Linears does not matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..device.choice import memory_errors
from ..device.memory import CACHED_PROMPTS
from ..errors import NonFiniteError
from ..linears.fp8 import stays_bf16
from ..linears.gptq import gptq
from ..pipeline import Pipeline
from ..request.generation import GenerationRequest
from ..sampling import Step
from ..terminal import no_bars

BUDGET = 8 * 2**30
"""bytes of second moments in one pass, on the device that draws"""
EVERY = 3
"""steps from one that is kept to the next: neighbours have similar inputs. The next prompt's are the steps between"""


class Path(NamedTuple):
    """A request and the kept latents of its trajectory."""

    request: GenerationRequest
    latents: dict[float, Tensor]
    """by sigma, tokens [1, L, 64]"""


@torch.no_grad()
def calibrated(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> dict[str, Tensor]:
    """The codes, e4m3 on the CPU, of every weight that becomes fp8, by its name. NonFiniteError, MemoryShortage."""
    named = pipeline.model.named_modules()
    linears = {name: m for name, m in named if isinstance(m, nn.Linear) and not stays_bf16(name)}
    paths = trajectories(pipeline, requests)
    turns = in_turns(linears, BUDGET)
    forwards = sum(len(path.latents) for path in paths)
    codes = {}
    remedy = "calibrate on a machine with more memory, or leave --calibrate out"
    with memory_errors("calibrating", pipeline.device, remedy):
        for number, turn in enumerate(turns, 1):
            with _bar(forwards, f"inputs of {len(turn)} layers, pass {number} of {len(turns)}", "forward") as bar:
                moments = second_moments(pipeline, paths, turn, bar)
            for name in tqdm(turn, f"rounding, pass {number} of {len(turns)}", unit="layer", disable=no_bars()):
                codes[f"{name}.weight"] = _rounded(name, turn[name], moments.pop(name))
    return codes


def _rounded(name: str, linear: nn.Linear, moment: Tensor) -> Tensor:
    """The codes of its weight, on the CPU; from bf16, as every file is quantized."""
    if not moment.isfinite().all():
        raise NonFiniteError(f"NaN or infinity in the inputs of {name}; no file is written")
    here = moment.cpu() if moment.device.type == "mps" else moment  # MPS has neither fp64 nor e4m3
    return gptq(linear.weight.bfloat16(), here).codes.cpu()


def trajectories(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> list[Path]:
    """Draw the requests, and keep the latents before every third step: steps 0, 3, 6, ... of the first request,
    1, 4, 7, ... of the next."""
    ahead = CACHED_PROMPTS // 2  # each has at most two texts
    pipeline.encode_ahead(requests[:ahead], last=len(requests) <= ahead)
    paths = []
    with _bar(sum(request.num_steps for request in requests), f"drawing {len(requests)} prompts", "step") as bar:
        for number, request in enumerate(requests):
            latents: dict[float, Tensor] = {}
            kept = range(request.num_steps)[number % min(EVERY, request.num_steps) :: EVERY]

            def keep(step: Step, latents: dict[float, Tensor] = latents, kept: range = kept) -> None:
                bar.update()
                if step.index in kept:
                    latents[step.sigma] = step.before

            pipeline.draw(request, on_step=keep)
            paths.append(Path(request, latents))
    return paths


def velocities(pipeline: Pipeline, paths: Sequence[Path]) -> Tensor:
    """The velocities at the kept latents, all in one vector, fp64 on the CPU."""
    found = []
    for request, latents in paths:
        strengths = [request.guidance or 0.0] * len(request.texts)
        velocity = pipeline.denoiser.velocity(request.texts, strengths, request.padded_size, sigmas=tuple(latents))
        found += [velocity(x.expand(len(request.texts), -1, -1), sigma).cpu() for sigma, x in latents.items()]
    return torch.cat([x.double().flatten() for x in found])


def in_turns(linears: Mapping[str, nn.Linear], budget: int) -> list[dict[str, nn.Linear]]:
    """The Linears in groups whose second moments take at most `budget` bytes; at least one Linear in each."""
    turns: list[dict[str, nn.Linear]] = []
    left = 0
    for name, linear in linears.items():
        size = 4 * linear.in_features**2
        if size > left:
            turns.append({})
            left = max(budget, size)
        turns[-1][name] = linear
        left -= size
    return turns


def second_moments(
    pipeline: Pipeline, paths: Sequence[Path], linears: Mapping[str, nn.Linear], bar: Any
) -> dict[str, Tensor]:
    """The sum of x x^T over the inputs of each Linear, fp32 [K, K] on the pipeline's device."""
    sizes = {name: linear.in_features for name, linear in linears.items()}
    moments = {
        name: torch.zeros(size, size, dtype=torch.float32, device=pipeline.device) for name, size in sizes.items()
    }
    # A hook at every Linear, also where nothing is summed: fused kernels are not used for hooked layers, so all passes
    # have the same bits.
    every = ((name, m) for name, m in pipeline.model.named_modules() if isinstance(m, nn.Linear))
    hooks = [linear.register_forward_pre_hook(partial(_add, moments.get(name))) for name, linear in every]
    try:
        for request, latents in paths:
            texts = request.texts
            strengths = [request.guidance or 0.0] * len(texts)
            velocity = pipeline.denoiser.velocity(texts, strengths, request.padded_size, sigmas=tuple(latents))
            for sigma, x in latents.items():
                velocity(x.expand(len(texts), -1, -1), sigma)
                bar.update()
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _add(moment: Tensor | None, layer: nn.Module, args: tuple[Tensor]) -> None:
    if moment is None:
        return
    x = args[0].reshape(-1, len(moment))
    with exact_in_tf32(x):
        moment.addmm_(x.float().t(), x.float())


@contextmanager
def exact_in_tf32(x: Tensor) -> Iterator[None]:
    """A context in which products of bf16 numbers as fp32 use TF32 on CUDA: exact, and six times as fast."""
    before = torch.get_float32_matmul_precision()
    if x.is_cuda and x.dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _bar(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=unit, disable=no_bars())
