"""What a run will do, and what it takes of time, memory and disk, before anything is loaded."""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..device.budget import CONTEXT, bytes_for
from ..device.choice import dtype_name, pick_dtype
from ..device.rates import measured
from ..errors import DiskError, UsageError
from ..hub.client import free_bytes
from ..pipeline.load import own_format
from ..terminal import tell
from . import captions
from .loss import forwards_of
from .plan import Plan, plan_of
from .seen import WAYS
from .sizes import Size
from .text_plan import TextCost, cost_of, with_text

if TYPE_CHECKING:
    from .run import Run


class Estimate:
    """Of a run whose pictures are known."""

    def __init__(self, run: "Run") -> None:
        self.run, self.settings, self.variant, self.device = run, run.settings, run.variant, run.device

    def tell(self) -> None:
        """Print what will be done and what it takes. UsageError where it cannot fit, DiskError."""
        run, settings, plan = self.run, self.settings, self.numbers()
        for line in self._of_data():
            tell(line)
        if run.live:
            tell(self._text_cost.line(run.live, plan.tera))
        rates = measured(self.device)
        for line in plan.lines(self.device.type, plan.tera / rates.tera if rates else None, settings.steps):
            tell(line)
        needed = self._disk(plan)
        free = free_bytes(run.folder, "--output_dir")
        tell(f"disk: {needed / 1e9:.2f} GB of {free / 1e9:.0f} GB free, into {run.folder}")
        self._refuse(plan)
        if needed > free:
            raise DiskError(f"{run.folder}: the run writes about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    def _of_data(self) -> Iterator[str]:
        """What is told of pictures, captions and steps."""
        run, settings, sizes = self.run, self.settings, Counter(self.run.cuts[one][0].size for one in self.run.learned)
        listed = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items()))
        seen = settings.steps * settings.batch * settings.accumulation / len(run.epoch)
        held, left = len(run.judged), run.left_out
        yield f"pictures: {len(run.learned)} to learn from ({listed}), {held} held out, {left} left out"
        if run.priors:
            yield f"regularization: {len(run.priors)} pictures: half of an epoch of {len(run.epoch)}"
        apart = [one for one in run.epoch if not one.word(settings.trigger or "")] if run.class_word else []
        if apart:
            yield f"--preserve differential holds {len(apart)} of {len(run.epoch)} where they are: they have no trigger"
        if masked := sum(one.mask is not None for one in run.epoch):
            yield f"masks: on {masked} of {len(run.epoch)} pictures of an epoch"
        yield from run.findings
        when = "once" if "t5" not in run.live else "at each step"
        yield f"captions: {len(run.wanted())} texts to encode {when}; {self._too_long()}"
        yield f"steps: {settings.steps}, {settings.batch * settings.accumulation} pictures each: {seen:.1f} epochs"

    @property
    def _precision(self) -> str:
        """Of the frozen base."""
        own = own_format(self.variant, "transformer")
        return self.settings.dtype or own or dtype_name(pick_dtype(None, self.device))

    @cached_property
    def _text_cost(self) -> TextCost:
        run, settings = self.run, self.settings
        return cost_of(
            self.variant, self._precision, settings.t5_dtype, run.live, run.teaches, run.text_form.rank,
            run.vectors, settings.batch, settings.accumulation, forwards_of(settings.recipe),
        )  # fmt: skip

    def numbers(self) -> Plan:
        """What a step takes, of the largest pictures."""
        run, settings = self.run, self.settings
        share, size = run.ranks.share(settings.recipe), run.largest
        if settings.takes and not WAYS[settings.takes].widens:  # references are tokens like the picture's
            size = Size(size.width, size.height * (1 + max((len(one.beside) for one in run.cuts), default=0)))
        plan = plan_of(
            self.variant, size, self._precision, settings.t5_dtype, run.patterns, settings.rank,
            settings.batch // share.parts, settings.accumulation // share.micros.step, settings.checkpointing,
            settings.optimizer, settings.lokr, run.own_ranks, forwards_of(settings.recipe),
            run.ranks.world if settings.shard else 1,
        )  # fmt: skip
        return with_text(plan, self._text_cost, settings.optimizer) if run.live else plan

    def _refuse(self, plan: Plan) -> None:
        """UsageError where a card is too small, with what would fit."""
        if self.device.type != "cuda":
            return
        _, total = torch.cuda.mem_get_info(self.device)
        memory = self.settings.memory
        most = bytes_for(memory, None, self.device) + CONTEXT if memory else total
        least = plan.streamed if memory else plan.needed
        if least > most:
            raise UsageError(
                f"this takes about {least / 1e9:.1f} GB of {self.device}, and {most / 1e9:.1f} GB are there. Next: "
                "--checkpointing blocks, a smaller --resolution or --batch, --dtype int8 or nf4, --memory, with "
                "which blocks come when they compute, or torchrun and --shard, with which each card has a part of them"
            )

    def _disk(self, plan: Plan) -> int:
        """Bytes of caches, checkpoints and the adapter, at most."""
        params, texts = self.variant.params, len({text.caption for text in self.run.wanted()})
        of_text = 4 * (self.variant.max_text * params.context_in_dim + params.vec_in_dim)
        of_texts = 0 if "t5" in self.run.live else texts * of_text
        of_latents = sum(4 * len(all) * all[0].size.width * all[0].size.height // 4 for all in self.run.cuts.values())
        return of_texts + of_latents + 4 * plan.numbers * (3 * (self.settings.keep + 1) + 1)

    def _too_long(self) -> str:
        """How many captions T5 cuts, where its tokenizer is there."""
        from ..checkpoint.files import own_path, text_files
        from ..text.tokenizer import load_tokenizer

        if not self.variant.embedded and own_path(self.variant, "t5") is None:
            return "how many are too long is not known before the model is there"
        tokenizer = load_tokenizer(text_files(self.variant).t5_tokenizer, "t5", 10**6)
        texts = [self.run.captions_of(one)[captions.CAPTION] for one in self.run.learned]
        found = [text for text in texts if len(tokenizer.pieces(text)) > self.variant.max_text]
        return f"{len(found)} are longer than T5's {self.variant.max_text} tokens, and cut"
