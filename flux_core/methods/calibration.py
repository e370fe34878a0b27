"""What a model's Linears see while it draws, and its weights rounded to fp8 by that: `save --dtype fp8 --calibrate`.

The prompts are drawn once, by the model as it is, and the latents of every third step are kept. From these the model is
asked again, with readers at its Linears that sum up x x^T of what comes in. A Linear of K features takes K^2 fp32
numbers for that, at full size 65 GB in all, so as many of them are read at a time as `BUDGET` allows, and their weights
rounded, before the next are. The model stays as it is to the end, so the order of the Linears does not matter.
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
"""bytes of second moments that are gathered at a time, on the device that draws"""
EVERY = 3
"""the step of a trajectory that is kept: neighbours see much the same. The next prompt's are the steps between"""


class Path(NamedTuple):
    """A request's trajectory, where it is looked at."""

    request: GenerationRequest
    latents: dict[float, Tensor]
    """by their sigma, tokens [1, L, 64]"""


@torch.no_grad()
def calibrated(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> dict[str, Tensor]:
    """The codes, e4m3 on the CPU, of every weight that becomes fp8, by its name. NonFiniteError, MemoryShortage."""
    named = pipeline.model.named_modules()
    linears = {name: one for name, one in named if isinstance(one, nn.Linear) and not stays_bf16(name)}
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
    """Its codes on the CPU; from bf16, as every file is quantized."""
    if not moment.isfinite().all():
        raise NonFiniteError(f"NaN or infinity in the inputs of {name}; no file is written")
    here = moment.cpu() if moment.device.type == "mps" else moment  # which has neither fp64 nor e4m3
    return gptq(linear.weight.bfloat16(), here).codes.cpu()


def trajectories(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> list[Path]:
    """Draw the requests, and keep the latents before every third step: of the first one's steps 0, 3, 6, ..., of the
    next one's 1, 4, 7, ..."""
    pipeline.prompts.encode_ahead([text for one in requests for text in one.texts][:CACHED_PROMPTS])
    paths = []
    with _bar(sum(one.num_steps for one in requests), f"drawing {len(requests)} prompts", "step") as bar:
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


def in_turns(linears: Mapping[str, nn.Linear], budget: int) -> list[dict[str, nn.Linear]]:
    """The same Linears, as many at a time as have second moments of so many bytes together; at least one."""
    turns: list[dict[str, nn.Linear]] = []
    left = 0
    for name, one in linears.items():
        size = 4 * one.in_features**2
        if size > left:
            turns.append({})
            left = max(budget, size)
        turns[-1][name] = one
        left -= size
    return turns


def second_moments(
    pipeline: Pipeline, paths: Sequence[Path], linears: Mapping[str, nn.Linear], bar: Any
) -> dict[str, Tensor]:
    """The sum of x x^T over the inputs of each of these Linears, fp32 [K, K] on the pipeline's device."""
    sizes = {name: one.in_features for name, one in linears.items()}
    moments = {
        name: torch.zeros(size, size, dtype=torch.float32, device=pipeline.device) for name, size in sizes.items()
    }
    # A reader at every Linear, also where nothing is gathered: kernels that do more than a product make way for it, and
    # so all passes see the same bits.
    every = ((name, one) for name, one in pipeline.model.named_modules() if isinstance(one, nn.Linear))
    hooks = [one.register_forward_pre_hook(partial(_add, moments.get(name))) for name, one in every]
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
    """bf16 numbers are TF32 numbers, too, so CUDA's products of them in fp32 may run six times as fast."""
    before = torch.get_float32_matmul_precision()
    if x.is_cuda and x.dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _bar(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=unit, disable=no_bars())
