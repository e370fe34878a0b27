"""A pipeline's parts for those who sample on their own: noise, schedule, velocity, one forward, and pictures.

    x, sigmas = pipeline.noise(seed=7), pipeline.schedule(28)
    with pipeline.run([Skip(blocks="layer.6")], sigmas) as run:
        x = euler(pipeline.velocity("a red apple", run=run), x, sigmas)
    pipeline.decode(x)[0].save("apple.png")

Sizes are pixels, by default the model's; tokens are [B, L, 64] for the next multiples of 16. Nothing here is inside
`torch.no_grad`, and weights need no gradients: so what a gradient is wanted of keeps a graph, and nothing else does.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..hooks import Custom, HookRun, Intervention
from ..hooks.sites import match_sites
from ..images.metadata import marked
from ..images.pictures import crop_centre, open_source
from ..request.fields import FIT
from ..request.generation import PATCH
from ..sampling import SampledRun, Velocity, get_noise, get_schedule, invert, pack
from ..variants import Variant
from .codec import Codec
from .denoiser import Denoiser, Prompt
from .loras import Loras


class ByHand:
    """The base of `Pipeline` that holds these methods."""

    variant: Variant
    dtype: torch.dtype
    codec: Codec
    denoiser: Denoiser
    loras: Loras
    device: Any
    t5: Any

    def noise(self, seed: int | Iterable[int] = 0, *, width: int | None = None, height: int | None = None) -> Tensor:
        """Tokens of noise [B, L, 64], a row for each seed: those that pictures of these seeds start from."""
        wide, high = self._padded(width, height)
        seeds = [seed] if isinstance(seed, int) else seed
        return torch.cat([pack(get_noise(1, high, wide, self.device, self.dtype, one)) for one in seeds])

    def schedule(
        self, num_steps: int | None = None, *, width: int | None = None, height: int | None = None
    ) -> list[float]:
        """num_steps + 1 sigmas from 1 to 0, as a picture of that size has them. num_steps: by default the model's."""
        tokens = _tokens(self._padded(width, height))
        return get_schedule(num_steps or self.variant.num_steps, tokens, shift=self.variant.shift)

    def run(
        self,
        plan: Intervention | Iterable[Intervention] = (),
        sigmas: Sequence[float] | None = None,
        *,
        branches: tuple[str, ...] = ("image",),
        passes: bool = False,
    ) -> HookRun:
        """A plan for one sampling, as a context manager whose end writes captures, whatever happens in it.

        sigmas: the schedule, falling or rising; by default the model's. branches, passes: as in `HookRun`. UsageError
        for a plan that does not fit.
        """
        return HookRun(plan, self.variant.params, sigmas or self.schedule(), branches, passes)

    def velocity(
        self,
        prompts: Prompt | Sequence[Prompt],
        guidance: float | Sequence[float] | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        run: SampledRun | None = None,
    ) -> Velocity:
        """The model as `velocity(x, sigma)`, with a prompt for each row of x, and a guidance for each row or for all.

        A prompt is a text, or the tensors that `pipeline.prompts(text)` gives, (txt [1, T, D], vec [1, V]), as you
        changed them. guidance: by default the model's. LoRAs of `load_lora` are applied. UsageError for rows or tokens
        that do not fit.
        """
        texts: list[Prompt] = [prompts] if _is_prompt(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        if not texts:
            raise UsageError('a velocity needs a prompt, which may be empty. Next: velocity("")')
        strengths = self._strengths(guidance, len(texts))
        size = self._padded(width, height)
        adapt = self.loras.prepare((), (1.0, 0.0))
        of = self.denoiser.velocity(texts, strengths, size, run, adapt=adapt)
        shape = len(texts), _tokens(size), self.variant.params.out_channels

        def velocity(x: Tensor, sigma: float) -> Tensor:
            if tuple(x.shape) != shape:
                pixels = f"{size[0]}x{size[1]} pixels"
                raise UsageError(
                    f"x is {list(x.shape)}, but {len(texts)} prompt(s) at {pixels} take {list(shape)}. "
                    "Next: a prompt for each row, and the width and height of the noise"
                )
            v = of(x, sigma)
            if v.requires_grad and getattr(self.denoiser.placement, "_streams", None):
                raise UsageError("a gradient needs all blocks where they compute, and in this budget they come and go. "
                                 "Next: a larger --memory, or x.detach()")  # fmt: skip
            return v

        return velocity

    def forward(
        self,
        prompt: Prompt | Sequence[Prompt],
        x: Tensor,
        sigma: float,
        sites: str | Sequence[str] = (),
        guidance: float | Sequence[float] | None = None,
        grad: bool = False,
        *,
        width: int | None = None,
        height: int | None = None,
        plan: Intervention | Iterable[Intervention] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The velocity of one forward, and by full name the values at the sites, on the model's device.

        grad: with a graph: the velocity can be differentiated by x, and by each of the values. plan: what else is done
        in this forward.
        """
        values: dict[str, Tensor] = {}

        def keep(value: Tensor, at: Any) -> Tensor:
            if grad and not value.requires_grad:
                value = value.detach().requires_grad_()
            values[at.name] = value if grad else value.clone()
            return value

        entries = [plan] if isinstance(plan, Intervention) else list(plan)
        names = tuple(part.strip() for part in sites.split(",")) if isinstance(sites, str) else tuple(sites)
        matched = match_sites(names, self.variant.params) if sites else []
        looks = [Custom(sites=tuple(matched), fn=keep, follow=True)] if matched else []
        with torch.set_grad_enabled(grad), self.run([*entries, *looks], (sigma + 1.0, sigma)) as run:
            return self.velocity(prompt, guidance, width=width, height=height, run=run)(x, sigma), values

    def encode(
        self, image: str | Path | Image.Image, *, width: int | None = None, height: int | None = None, fit: str = FIT
    ) -> Tensor:
        """A picture's tokens [1, L, 64], fitted to that size. FileError."""
        source, _ = open_source(image)
        assert source is not None
        return self.codec.encode(source, *self._padded(width, height), fit)

    def invert(
        self,
        image: str | Path | Image.Image | Tensor,
        prompt: str = "",
        guidance: float = 1.0,
        *,
        num_steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        run: SampledRun | None = None,
    ) -> list[Tensor]:
        """The way from a picture, or its tokens, back to noise: `path[0]` is the picture, `path[-1]` its noise.

        By Euler along the schedule of num_steps, each step at its noisier sigma (`sampling.invert`), so `path[i]` is at
        `schedule[-1 - i]`.
        """
        x = image if isinstance(image, Tensor) else self.encode(image, width=width, height=height)
        velocity = self.velocity(prompt, guidance, width=width, height=height, run=run)
        with torch.no_grad():
            return invert(velocity, x, self.schedule(num_steps, width=width, height=height))

    def decode(self, x: Tensor, *, width: int | None = None, height: int | None = None) -> list[Image.Image]:
        """The picture of each row of tokens [B, L, 64], with the mark of media made by a model."""
        wide, high = width or self.variant.width, height or self.variant.height
        padded = self._padded(wide, high)
        if x.shape[1] != (tokens := _tokens(padded)):
            raise UsageError(f"{wide}x{high} pixels are {tokens} tokens, not {x.shape[1]}. Next: width= and height=")
        with torch.no_grad():
            return [marked(crop_centre(self.codec.decode(row, *padded), wide, high)) for row in x.split(1)]

    def words(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        """The words of a prompt, each with the numbers of its text tokens, for maps, steering and attribution.

        Words are parted by spaces, and punctuation stands alone. What T5 does not read of a long prompt is left out.
        UsageError for a T5 that is a plain function.
        """
        pieces = getattr(self.t5, "pieces", None)
        if pieces is None:
            raise UsageError("this T5 is a plain function, and has no tokens that could be counted")
        spans = [(m.start(), m.end()) for m in re.finditer(r"\w+(?:['\u2019-]\w+)*|[^\w\s]+", prompt)]
        found: dict[tuple[int, int], list[int]] = {span: [] for span in spans}
        for number, (_, start, end) in enumerate(pieces(prompt)[: self.t5.max_length - 1]):
            for first, last in spans:
                if start < last and first < end:
                    found[first, last].append(number)
        return [(prompt[first:last], tuple(numbers)) for (first, last), numbers in found.items() if numbers]

    def _padded(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height as the next multiples of 16."""
        wide, high = width or self.variant.width, height or self.variant.height
        return -(-wide // PATCH) * PATCH, -(-high // PATCH) * PATCH

    def _strengths(self, guidance: float | Sequence[float] | None, rows: int) -> list[float]:
        """A guidance for each row. UsageError for another number of them."""
        if guidance is None or isinstance(guidance, int | float):
            return [self.variant.guidance or 0.0 if guidance is None else float(guidance)] * rows
        if len(guidance) != rows:
            raise UsageError(
                f"these are {rows} prompt(s), but {len(guidance)} guidances. Next: one number, or one for each"
            )
        return list(guidance)


def _tokens(size: tuple[int, int]) -> int:
    """Image tokens of a padded size."""
    return size[0] * size[1] // PATCH**2


def _is_prompt(value: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt: a text, or a pair of tensors."""
    return isinstance(value, str) or (len(value) == 2 and all(isinstance(x, Tensor) for x in value))
