"""Sampling of a rectified flow: noise, tokens, schedule, Euler. Functions on tensors, with the official names.

With `x = sigma * noise + (1 - sigma) * data`, the model's velocity is `dx/dsigma`, and a picture is the integral from
sigma 1 to 0. `euler` is independent of FLUX: it calls `velocity(x, sigma)`, which any kind of guidance may wrap;
`denoise` is the official function on top of it. Source: black-forest-labs/flux `src/flux/sampling.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..model import Adapt, Flux, Modulations, ModulationTable, Run
from ..model.transformer import Changes, Fetch
from ..strength import skipped_steps
from .graph import GraphedVelocity, is_worth_it

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Step:
    """One Euler step, as a step callback gets it."""

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    """latents after the step, at sigma_next"""
    velocity: Tensor
    before: Tensor
    """latents before the step, at sigma"""


OnStep = Callable[[Step], Tensor | None]


class SampledRun(Run, Protocol):
    """A run for all forwards of a sampling; `begin` is called with the sigma before each."""

    @property
    def needs_vec(self) -> bool: ...

    def begin(self, sigma: float) -> None: ...


@runtime_checkable
class SeesLatents(Protocol):
    """A run that computes from the latents of each forward, before its blocks run."""

    def see(self, x: Tensor, sigmas: Sequence[float]) -> None:
        """Called after `begin`. x: [B, L, C], without conditions; sigmas: those of all steps, if known."""
        ...


@dataclass(frozen=True, eq=False)
class FlowInputs:
    """The fixed inputs of `flow_velocity`: its arguments by name, a row for each picture."""

    img_ids: Tensor
    """[B, L, 3]"""
    txt: Tensor
    """[B, T, D]"""
    txt_ids: Tensor
    """[B, T, 3]"""
    vec: Tensor
    """[B, V]"""
    guidance: Tensor
    """[B]"""
    img_cond: Tensor | None = None
    """[B, L, C], concatenated to the image tokens by channels"""
    img_cond_seq: Tensor | None = None
    """[B, K, C], concatenated after them by sequence, at the positions"""
    img_cond_seq_ids: Tensor | None = None
    """[B, K, 3]"""


def get_noise(
    num_samples: int, height: int, width: int, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Tensor:
    """Start noise [num_samples, 16, 2*ceil(height/16), 2*ceil(width/16)] for a picture of height x width pixels.

    Drawn in fp32 on the CPU and cast, so that a seed gives the same start on every device and in every dtype.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (num_samples, 16, 2 * math.ceil(height / 16), 2 * math.ceil(width / 16))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device=device, dtype=dtype)


def pack(x: Tensor) -> Tensor:
    """Latent [B, C, H, W] -> tokens [B, H/2 * W/2, C*4], one for each patch of 2 x 2."""
    return rearrange(x, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, L, C*4] -> latent [B, C, 2*ceil(height/16), 2*ceil(width/16)]; height and width in pixels."""
    h, w = math.ceil(height / 16), math.ceil(width / 16)
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=h, w=w, ph=2, pw=2)


def image_ids(batch: int, h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
    """Position ids (0, row, column) of h x w tokens: [batch, h*w, 3], fp32."""
    ids = torch.zeros(h, w, 3, dtype=torch.float32, device=device)
    ids[..., 1] = torch.arange(h, dtype=torch.float32, device=device)[:, None]
    ids[..., 2] = torch.arange(w, dtype=torch.float32, device=device)[None, :]
    return repeat(ids, "h w c -> b (h w) c", b=batch)


def prepare(t5, clip, img: Tensor, prompt: str | list[str]) -> dict[str, Tensor]:
    """The inputs of `denoise` without the schedule: img, img_ids, txt, txt_ids, vec (official `prepare`).

    img: latent noise [B, C, H, W]; t5, clip: callables from a list of prompts to [n, T, D] and [n, D]. One prompt for
    several images, or several prompts for one, are repeated.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if img.shape[0] == 1 and len(prompts) > 1:
        img = repeat(img, "1 ... -> b ...", b=len(prompts))
    batch, _, height, width = img.shape
    txt, vec = t5(prompts), clip(prompts)
    if txt.shape[0] == 1 and batch > 1:
        txt, vec = repeat(txt, "1 ... -> b ...", b=batch), repeat(vec, "1 ... -> b ...", b=batch)
    return {
        "img": pack(img),
        "img_ids": image_ids(batch, height // 2, width // 2, img.device),
        "txt": txt.to(img.device),
        "txt_ids": torch.zeros(batch, txt.shape[1], 3, dtype=torch.float32, device=img.device),
        "vec": vec.to(img.device),
    }


def time_shift(mu: float, sigma: float, t: Tensor) -> Tensor:
    """Times shifted towards noise: `e^mu / (e^mu + (1/t - 1)^sigma)`."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma)


def resolution_mu(image_seq_len: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """The exponent of `time_shift` for so many image tokens: a line through (256, base_shift), (4096, max_shift)."""
    slope = (max_shift - base_shift) / (4096 - 256)
    return slope * image_seq_len + (base_shift - slope * 256)


def get_schedule(
    num_steps: int,
    image_seq_len: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    shift: bool = True,
) -> list[float]:
    """num_steps + 1 sigmas from 1 to 0, shifted by `resolution_mu`."""
    timesteps = torch.linspace(1, 0, num_steps + 1, dtype=torch.float32, device="cpu")
    if shift:
        timesteps = time_shift(resolution_mu(image_seq_len, base_shift, max_shift), 1.0, timesteps)
    return timesteps.tolist()


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """The latents at sigmas[-1], from x at sigmas[0], by Euler: one call of the velocity for each step.

    `on_step` is called after every step, and may return latents that replace its result.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        before, x = x, x + (sigma_next - sigma) * v
        if on_step is not None:
            changed = on_step(Step(index, sigma, sigma_next, x, v, before))
            x = x if changed is None else changed
    return x


def invert(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> list[Tensor]:
    """The latents from a picture back to its noise, by Euler: `path[i]` at `sigmas[-1 - i]`, `path[0]` is x.

    Every step evaluates the velocity at its noisier sigma and its current latents (as Stable Flow's released code
    does), so that going forward again retraces the path to first order.
    """
    path = [x]
    for sigma_next, sigma in pairwise(reversed(sigmas)):
        path.append(path[-1] + (sigma - sigma_next) * velocity(path[-1], sigma))
    return path


def with_seen(x: Tensor, img_cond: Tensor | None, img_cond_seq: Tensor | None) -> Tensor:
    """Tokens [B, L, C] as the model takes them, with what it sees beside them, by channels and by sequence."""
    img = x if img_cond is None else torch.cat((x, img_cond), dim=-1)
    return img if img_cond_seq is None else torch.cat((img, img_cond_seq), dim=1)


def flow_velocity(
    model: Flux,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    guidance: float | Tensor,
    img_cond: Tensor | None = None,
    img_cond_seq: Tensor | None = None,
    img_cond_seq_ids: Tensor | None = None,
    run: SampledRun | None = None,
    sigmas: Sequence[float] = (),
    replay: bool = False,
    fetch: Fetch = iter,
    adapt: Adapt | None = None,
) -> Velocity:
    """The model as `velocity(x, sigma)`, with all other inputs fixed. guidance: one number, or [B].

    run: the hooks of every forward. sigmas: those of the calls to come, if known: the modulation of all is computed at
    the first call, with identical bits. replay: these steps are replayed from a CUDA graph, with identical bits, where
    there is no run and it `is_worth_it` (sampling/graph.py). fetch: as in `Flux.forward`. adapt: called before each
    forward, and for each row of the modulation.

    img_cond [B, L, C] is concatenated to the tokens by channels (control, fill), img_cond_seq [B, K, C] by sequence
    (kontext). Time and guidance are rounded to the dtype of x, as the official code rounds them.
    """
    if (img_cond_seq is None) != (img_cond_seq_ids is None):
        raise ValueError("img_cond_seq and img_cond_seq_ids go together")
    ids = img_ids if img_cond_seq_ids is None else torch.cat((img_ids, img_cond_seq_ids), dim=1)
    known = () if run is not None and run.needs_vec else tuple(sigmas)
    tokens = txt.shape[0] * (txt.shape[1] + ids.shape[1])
    graphed = replay and run is None and is_worth_it(model, txt.device, tokens, len(known))

    def forward(x: Tensor, sigma: float, mods: Modulations | None) -> Tensor:
        ones = torch.ones(x.shape[0], device=x.device, dtype=x.dtype)
        img = with_seen(x, img_cond, img_cond_seq)
        v = model(img, ids, txt, txt_ids, ones * sigma, vec, ones * guidance, run, mods, fetch)
        return v[:, : x.shape[1]]

    @cache
    def scheduled(batch: int, device: torch.device, dtype: torch.dtype) -> TabledVelocity:
        """The velocity at the known sigmas."""
        strengths = torch.ones(batch, device=device, dtype=dtype) * guidance
        return TabledVelocity(model, forward, lambda: ModulationTable(model, known, vec, strengths, adapt), graphed)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        if run is not None:
            run.begin(sigma)
        if isinstance(run, SeesLatents):
            run.see(x, sigmas)
        step = scheduled(x.shape[0], x.device, x.dtype).step() if sigma in known else None
        if adapt is not None:
            adapt.set(sigma)
        return forward(x, sigma, None) if step is None else step(x, sigma)

    return velocity


class TabledVelocity:
    """The velocity at the sigmas of a schedule, with their modulation computed ahead, and again after any change to the
    model: a LoRA that is attached, rescaled or removed."""

    def __init__(
        self,
        model: Flux,
        forward: Callable[[Tensor, float, Modulations], Tensor],
        make: Callable[[], ModulationTable],
        graphed: bool,
    ) -> None:
        self.model, self.forward, self.make, self.graphed = model, forward, make, graphed
        self._changes: Changes | None = None
        self._table: ModulationTable
        self._replayed: GraphedVelocity

    def step(self) -> Velocity:
        """The velocity of the model as it is now. A change of scales keeps what was recorded."""
        before, now = self._changes, self.model.changes
        if before != now:
            self._table = self.make()
            if self.graphed and before is not None and before.layers == now.layers:
                self._replayed.exchange(self._table)
            elif self.graphed:
                self._replayed = GraphedVelocity(self.forward, self._table)
            self._changes = now
        return self._replayed if self.graphed else self._computed

    def _computed(self, x: Tensor, sigma: float) -> Tensor:
        return self.forward(x, sigma, self._table.at(sigma))


def denoise(
    model: Flux,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    timesteps: list[float],
    guidance: float | Tensor = 4.0,
    img_cond: Tensor | None = None,
    img_cond_seq: Tensor | None = None,
    img_cond_seq_ids: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Tokens of noise [B, L, C] -> tokens of a picture, by Euler over `timesteps` (official `denoise`)."""
    conditions = img_cond, img_cond_seq, img_cond_seq_ids
    velocity = flow_velocity(model, img_ids, txt, txt_ids, vec, guidance, *conditions, sigmas=timesteps[:-1])
    return euler(velocity, img, timesteps, on_step)


def start_from_image(latent: Tensor, noise: Tensor, sigmas: list[float], strength: float) -> tuple[Tensor, list[float]]:
    """The start of image-to-image: the latent mixed with noise, and the rest of the schedule.

    strength 1 starts from pure noise, 0 changes nothing (see `strength.skipped_steps`).
    """
    first = skipped_steps(len(sigmas) - 1, strength)
    sigma = sigmas[first]
    return sigma * noise + (1 - sigma) * latent, sigmas[first:]
