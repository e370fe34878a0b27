"""What a run draws: its prompts at fixed seeds while it learns, a growing sheet of them, and the signs of trouble."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..files import prepare_folder
from ..images.metadata import png_bytes
from ..pipeline import Condition
from ..request.generation import GenerationRequest
from ..terminal import note
from .charts import sample_sheet
from .seen import condition_of
from .signs import no_effect, stripes

if TYPE_CHECKING:
    from .run import Run


class Samples:
    """Of a run, by its pipeline with what it learned so far."""

    def __init__(self, run: "Run") -> None:
        self.run, self.settings, self.folder = run, run.settings, run.folder / "samples"

    def draw(self, step: int) -> None:
        """Samples, and the sheet of all so far."""
        prepare_folder(self.folder)
        with self.run.adapter.averaged(), self.drawing():
            for i, prompt in enumerate(self.run.prompts):
                path = self.folder / f"step-{step:07d}-{i}.png"
                self.run.write(path, png_bytes(self.picture(prompt, i)))
        if self.run.ranks.is_first:  # others may be here before its files are
            self.write_sheet()
            self.tell_signs(step)

    def tell_signs(self, step: int) -> None:
        """Say what the samples of a step show of trouble, beside those of the same prompts before the first step."""
        first, last = (self.there().get(at, {}) for at in (0, step))
        both = sorted(first.keys() & last.keys())  # a run may have got other prompts since
        before, now = ([Image.open(of[i]) for i in both] for of in (first, last))
        if step and before:
            self.judge(before, now, f"step {step}: ")

    def judge(self, before: Sequence[Image.Image], now: Sequence[Image.Image], where: str = "") -> None:
        """Say what pictures show of trouble, beside the same without what was learned."""
        for line in (stripes(before, now), no_effect(before, now, self.run.losses.largest_rate)):
            if line:
                note(where + line)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """A context in which pictures are drawn: the transformer is the pipeline's, and then again where it learns."""
        self.run.places.close()
        eager = torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()
        with eager, torch.no_grad():
            if self.run.live:
                self.read_prompts()
            yield
        if self.run.pipeline.fallback.offload or self.settings.memory:
            self.run.place()

    def read_prompts(self) -> None:
        """Encode the samples' prompts by the encoders as they are now."""
        prompts = self.run.pipeline.prompts
        prompts.forget()
        for prompt, place in self.run.shown.items():
            txt, vec = self.run.adapter.encoded(*(x[None] for x in self.run.text(*place)))
            prompts.remember(prompt, txt[0], vec[0])

    def picture(self, prompt: str, number: int = 0) -> Image.Image:
        """A sample of a prompt; always of the same seed. number: of the prompt, by which it sees a held-out picture's
        map or references, where it learns to see some."""
        run, size, settings = self.run, self.run.largest, self.settings
        request = GenerationRequest(
            name=run.variant.name, prompt=prompt, seed=settings.seed, width=size.width, height=size.height,
            num_steps=settings.sample_steps, force=True,
        )  # fmt: skip
        seen: list[Condition] = []
        if settings.takes:
            among = run.judged or run.learned
            one = among[number % len(among)]
            size = run.cuts[one][0].size
            request = request.model_copy(update={"width": size.width, "height": size.height})
            seen = [condition_of(settings.takes, [run.latents.seen(one, 0).float().to(run.device)])]
        image = run.pipeline.draw(run.pipeline.complete(request), conditions=seen)
        image.info = {"xmp": image.info["xmp"]}  # its request does not name what learns, and would draw another picture
        return image

    def there(self) -> dict[int, dict[int, Path]]:
        """The samples that are there, by step and prompt."""
        found: dict[int, dict[int, Path]] = {}
        for path in sorted(self.folder.glob("step-*-*.png")):
            _, step, number = path.stem.split("-")
            found.setdefault(int(step), {})[int(number)] = path
        return found

    def write_sheet(self) -> None:
        """The growing sheet: a row for each sampled step."""
        every, found = range(len(self.run.prompts)), self.there()
        rows = [
            (str(step), [Image.open(of[i]) for i in every]) for step, of in sorted(found.items()) if len(of) > every[-1]
        ]
        if rows:
            self.run.write(self.folder.with_suffix(".png"), png_bytes(sample_sheet(rows, self.run.prompts)))

    def each(self, prompts: Sequence[str]) -> list[Image.Image]:
        """A picture of each prompt."""
        with self.drawing():
            return [self.picture(prompt, i) for i, prompt in enumerate(prompts)]
