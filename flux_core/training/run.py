"""A whole training run, stage by stage: pictures, captions, latents, steps, and what is left at the end.

Each stage keeps what it made in a folder of its own under the run's, and goes on with what is there. Between stages
memory is given back: text encoders are gone before latents are encoded, the autoencoder before the first step.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..checkpoint import with_files
from ..checkpoint.files import weights_hashes
from ..device.budget import CONTEXT, bytes_for
from ..device.choice import dtype_name, pick_device, pick_dtype
from ..device.rates import measured
from ..device.threads import set_threads
from ..errors import DiskError, UsageError
from ..files import prepare_folder, user_path, write_whole
from ..hub.client import free_bytes
from ..images.metadata import png_bytes
from ..lora.file import FILE_NAMES
from ..pipeline import Condition, Pipeline, load_pipeline
from ..pipeline.load import own_format
from ..pipeline.placement import move
from ..request.fields import FILES
from ..request.generation import GenerationRequest
from ..session.sharing import rank_and_world
from ..session.stopping import Stop
from ..terminal import no_bars, note, tell
from . import captions
from .adapter import Adapter, adapt, by_pattern, matching, patterns_of
from .card import SHOWN, Facts, model_card
from .charts import LossRow, best_step, change_chart, loss_chart, loss_csv, sample_sheet
from .data import Found, Picture
from .folders import epoch_of, fetch, read_folders
from .latents import LatentCache, encoding
from .loop import Progress, checkpoints, factor, train, validate
from .loss import forwards_of, others_of
from .optimizers import library
from .plan import Plan, plan_of
from .ranks import Ranks, joined, own_device
from .recipe import Example
from .report import findings
from .seen import WAYS, condition_of, maker, widen
from .settings import BY_NAME, LATER, Settings, parsed
from .sharding import shard
from .signs import no_effect, overfits, stripes
from .sizes import Cut, Resolution, Size, cuts, parse_resolution
from .streaming import RoundTrip, streaming
from .text_encoders import TextForm, adapt_text, encoders_of, read_live, token_of
from .text_plan import TextCost, cost_of, with_text
from .texts import Text, TextCache, build, parquet_modules, texts_of

ADAPTER = f"{FILE_NAMES[0]}.safetensors"
MOST_HELD_OUT = 8
"""pictures that are held out by themselves"""
KEPT_IN_MEMORY = 256
"""encoded captions, 4 MB each of FLUX.1-dev's"""
INPUT = "x_embedder"
"""diffusers' name of the Linear that pictures enter by"""
SAMPLE = "sample"
"""the kind of a sample's prompt in the cache of texts, with its number behind it"""


class Cached:
    """A picture whose examples come from the caches."""

    def __init__(self, run: "Run", picture: Picture, kinds: Sequence[str]) -> None:
        self.run, self.picture, self.kinds, self.cuts = run, picture, kinds, run.cuts[picture]
        self.name = picture.path.name

    @property
    def size(self) -> tuple[int, ...]:
        return *self.cuts[0].size, len(self.picture.beside)

    @property
    def digest(self) -> str:
        """A hash of all that its examples depend on: the latents' file is named by one."""
        run, settings = self.run, self.run.settings
        texts = [run.texts.key(text) for text in run.captions_of(self.picture).values()]
        told: list[Any] = [
            run.latents.path(self.picture).name, texts, settings.caption_dropout, settings.trigger_only,
        ]  # fmt: skip
        if self.picture.mask is not None or self.weight != 1:
            told += [settings.mask_floor, self.weight]
        if run.class_word:
            told.append(run.texts.key(run.of_class(self.picture)))
        return sha256(json.dumps(told).encode()).hexdigest()

    @property
    def weight(self) -> float:
        """Of its loss."""
        weight: float = self.run.settings.prior_weight if self.picture.prior else 1.0
        return weight

    def draw(self, generator: torch.Generator | None) -> Example:
        """One of its cuts and captions; without a generator the first cut, and the caption as it is."""
        kind, number, settings = captions.CAPTION, 0, self.run.settings
        if generator is not None:
            chances = settings.caption_dropout, settings.trigger_only if captions.TRIGGER in self.kinds else 0.0
            kind = captions.draw(self.kinds, generator, *chances)
            drawn = torch.randint(len(self.cuts), (1,), dtype=torch.int64, device="cpu", generator=generator)
            number = int(drawn)
        sha, others = self.picture.sha256, others_of(settings.recipe) if generator is not None else set[str]()
        latents, text = self.run.latents, self.run.text
        seen = latents.seen(self.picture, number).float() if settings.takes else None
        mask, floor = None, settings.mask_floor
        if self.picture.mask is not None:
            mask = floor + (1 - floor) * latents.mask(self.picture, number)
        return Example(
            self.name, latents.get(self.picture, number).float(), *text(sha, kind), seen, mask, self.weight,
            {other: text(sha, other) for other in others},
        )  # fmt: skip


class Run:
    """A run, and what its stages made so far."""

    texts: TextCache
    latents: LatentCache
    trip: RoundTrip

    def __init__(self, settings: Settings) -> None:
        """UsageError for settings that do not go together; nothing is read yet."""
        self.settings = settings
        self.variant = with_files(settings.name, **{f.name: getattr(settings, f.name) for f in FILES})
        self.folder = user_path(settings.output_dir)
        self.ranks = Ranks(*rank_and_world())
        """who works on it: all draw and validate, as a model that is spread needs; the first one writes and speaks"""
        self.ranks.share(settings.recipe)  # its errors
        self.device = pick_device(own_device(settings.device))
        self.patterns = patterns_of(settings.targets, self.variant.name, self.variant.params)
        if self.variant.takes.channels or (settings.takes and self.variant.takes):
            raise UsageError(f"{self.variant.name} sees pictures already. Next: train a plain model, with --takes")
        if settings.takes:
            self.patterns += [INPUT] if WAYS[settings.takes].widens else []
        self.own_ranks, self.own_rates = self._by_pattern("ranks", "rank"), self._by_pattern("rates", "lr")
        side = settings.resolution or f"{self.variant.width}x{self.variant.height}"
        self.resolution: Resolution = parse_resolution(side, settings.rule or "")
        captions.check_chances(settings.caption_dropout, settings.trigger_only, bool(settings.triggers))
        if settings.shard and settings.memory:
            raise UsageError("--shard and --memory are two ways to make room. Next: leave one of them out")
        if settings.memory and (self.device.type != "cuda" or settings.checkpointing != "blocks"):
            raise UsageError("--memory streams blocks to a card, and needs --checkpointing blocks")
        if settings.shard and self.ranks.world == 1:
            raise UsageError(
                "--shard spreads the frozen base over several processes, and this is one. Next: torchrun "
                "--nproc-per-node 2 cli.py train …, with the number of cards"
            )
        if settings.precision == "fp16" and settings.compile:
            raise UsageError("--precision fp16 does not go with --compile")
        self.teaches = encoders_of(settings.train_text)
        self.live = read_live(self.teaches, settings.token)
        if self.live and (settings.memory or settings.shard):
            raise UsageError("text encoders that learn stay whole on each card. Next: leave --memory and --shard out")
        rank, text_rank = settings.rank, settings.text_rank or settings.rank
        alpha = settings.alpha if settings.rslora else settings.alpha * text_rank / rank
        self.text_form = TextForm(text_rank, alpha, settings.rslora, settings.text_lr, settings.token_lr)
        self.vectors = (settings.token_vectors or 1) if settings.token else 0
        self.places = ExitStack()
        self.text = lru_cache(KEPT_IN_MEMORY)(self._text)
        self.prompts: list[str] = settings.sample_prompts or []

    def _by_pattern(self, name: str, of: str) -> dict[str, Any]:
        """A setting's values by modules. of: what each is. UsageError, FileError."""
        text, params, flag = getattr(self.settings, name) or "", self.variant.params, BY_NAME[name].flag
        learns = matching(params, self.patterns) if text else ()
        return by_pattern(text, lambda x: parsed(BY_NAME[of], x, flag), self.variant.name, params, learns)

    # Pictures ----------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Read the data, and choose training sizes and cuts. What is left out is told. UsageError, FileError."""
        settings, hub = self.settings, self.folder / "data"
        with self.ranks.first_alone():
            fetch(settings.folders, hub)
        with tqdm(desc="pictures", unit="picture", disable=no_bars(), leave=False) as bar:
            found: Found = read_folders(
                settings.folders, self.resolution.size_of, hub, settings.trigger or "",
                settings.masks or "", settings.takes, bar.update,
            )  # fmt: skip
        for path, reason in found.skipped.items():
            note(f"{path}: left out: {reason}")
        if found.skipped and settings.strict:
            raise UsageError(f"{len(found.skipped)} pictures cannot be used. Next: mend them, or leave --strict out")
        every, learned = found.pictures, [one for one in found.pictures if not one.prior]
        if settings.takes and WAYS[settings.takes].widens and (several := [x for x in every if len(x.beside) > 1]):
            name, count = several[0].path.name, len(several[0].beside)
            raise UsageError(f"{name} has {count} maps. Next: name one for each picture")
        held = min(MOST_HELD_OUT, len(learned) // 10) if settings.held_out is None else settings.held_out
        if held >= len(learned):
            raise UsageError(f"--held-out {held} leaves nothing to train on: there are {len(learned)} pictures")
        order = sorted(learned, key=lambda one: sha256(f"{settings.seed} {one.sha256}".encode()).digest())
        judged = {one.sha256 for one in order[:held]}
        self.learned = [one for one in learned if one.sha256 not in judged]
        self.judged = [one for one in every if one.sha256 in judged]
        self.cuts: dict[Picture, list[Cut]] = {}
        for one in every:
            size, count = self.resolution.size_of(one.shape), settings.crops if settings.crop == "random" else 1
            how: Any = (settings.crop, count, settings.flip, settings.seed, one.sha256)
            self.cuts[one] = cuts(one.shape, size, *(() if one.sha256 in judged else how))
        self.left_out, self.findings = len(found.skipped), findings(found)
        self.priors = [one for one in every if one.prior]
        self.epoch = epoch_of([*self.learned, *self.priors], settings.repeats)

    @property
    def spelling(self) -> tuple[Any, ...]:
        """How texts are made of captions."""
        settings = self.settings
        return (
            settings.shuffles, settings.keep_tags, settings.seed, settings.wildcards, settings.keep_separator or "",
        )  # fmt: skip

    def captions_of(self, one: Picture) -> Mapping[str, str]:
        """The texts of a picture that a step may draw, by kind."""
        return captions.variants(one.caption, one.word(self.settings.trigger or ""), *self.spelling)

    @property
    def class_word(self) -> str:
        """What stands for the trigger word where a class is to stay as it was."""
        word: str = self.settings.class_word if captions.CLASS in others_of(self.settings.recipe) else ""
        return word

    def of_class(self, one: Picture) -> str:
        """A picture's caption, the first that wildcards make, with the class in place of the trigger word."""
        word, caption = one.word(self.settings.trigger or ""), self.captions_of(one)[captions.CAPTION]
        return caption.replace(word, self.class_word) if word else caption

    def wanted(self) -> list[Text]:
        """All texts to be encoded: those of the pictures, and the samples' prompts."""
        samples = [Text("", f"{SAMPLE}-{i}", text) for i, text in enumerate(self.prompts)]
        pictures = [*self.learned, *self.judged, *self.priors]
        classes = [Text(one.sha256, captions.CLASS, self.of_class(one)) for one in pictures if self.class_word]
        return [*texts_of(pictures, self.settings.trigger or "", *self.spelling), *classes, *samples]

    @property
    def shown(self) -> dict[str, tuple[str, str]]:
        """The prompts that are drawn, each with its picture and kind among the texts: the samples', or a caption."""
        if self.prompts:
            return {prompt: ("", f"{SAMPLE}-{i}") for i, prompt in enumerate(self.prompts)}
        first = self.learned[0]
        return {self.captions_of(first)[captions.CAPTION]: (first.sha256, captions.CAPTION)}

    # The plan ----------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Print what will be done and what it takes. UsageError where it cannot fit, DiskError."""
        settings, learned = self.settings, self.learned
        sizes: dict[Size, int] = {}
        for one in learned:
            sizes[self.cuts[one][0].size] = sizes.get(self.cuts[one][0].size, 0) + 1
        listed = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items()))
        seen = settings.steps * settings.batch * settings.accumulation / len(self.epoch)
        tell(
            f"pictures: {len(learned)} to learn from ({listed}), {len(self.judged)} held out, {self.left_out} left out"
        )
        if self.priors:
            tell(f"regularization: {len(self.priors)} pictures: half of an epoch of {len(self.epoch)}")
        if masked := sum(one.mask is not None for one in self.epoch):
            tell(f"masks: on {masked} of {len(self.epoch)} pictures of an epoch")
        for line in self.findings:
            tell(line)
        when = "once" if "t5" not in self.live else "at each step"
        tell(f"captions: {len(self.wanted())} texts to encode {when}; {self._too_long()}")
        tell(f"steps: {settings.steps}, {settings.batch * settings.accumulation} pictures each: {seen:.1f} epochs")
        plan = self._numbers()
        if self.live:
            tell(self._text_cost.line(self.live, plan.tera))
        rates = measured(self.device)
        for line in plan.lines(self.device.type, plan.tera / rates.tera if rates else None, settings.steps):
            tell(line)
        needed = self._disk(plan)
        free = free_bytes(self.folder, "--output_dir")
        tell(f"disk: {needed / 1e9:.2f} GB of {free / 1e9:.0f} GB free, into {self.folder}")
        self._refuse(plan)
        if needed > free:
            raise DiskError(f"{self.folder}: the run writes about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    @property
    def largest(self) -> Size:
        """Of the training sizes."""
        return max((every[0].size for every in self.cuts.values()), key=lambda size: size.width * size.height)

    @property
    def _precision(self) -> str:
        """Of the frozen base."""
        own = own_format(self.variant, "transformer")
        return self.settings.dtype or own or dtype_name(pick_dtype(None, self.device))

    @cached_property
    def _text_cost(self) -> TextCost:
        settings = self.settings
        return cost_of(
            self.variant, self._precision, settings.t5_dtype, self.live, self.teaches, self.text_form.rank,
            self.vectors, settings.batch, settings.accumulation,
        )  # fmt: skip

    def _numbers(self) -> Plan:
        settings, variant, share = self.settings, self.variant, self.ranks.share(self.settings.recipe)
        size, tokens = self.largest, 1 + max((len(one.beside) for one in self.cuts), default=0)
        if settings.takes and not WAYS[settings.takes].widens:  # references are tokens like the picture's
            size = Size(size.width, size.height * tokens)
        plan = plan_of(
            variant, size, self._precision, settings.t5_dtype, self.patterns, settings.rank,
            settings.batch // share.parts, settings.accumulation // share.micros.step, settings.checkpointing,
            settings.optimizer, settings.lokr, self.own_ranks, forwards_of(settings.recipe),
            self.ranks.world if settings.shard else 1,
        )  # fmt: skip
        return with_text(plan, self._text_cost, settings.optimizer) if self.live else plan

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
        params, texts = self.variant.params, len({text.caption for text in self.wanted()})
        of_texts = (
            0 if "t5" in self.live else texts * 4 * (self.variant.max_text * params.context_in_dim + params.vec_in_dim)
        )
        of_latents = sum(4 * len(all) * all[0].size.width * all[0].size.height // 4 for all in self.cuts.values())
        return of_texts + of_latents + 4 * plan.numbers * (3 * (self.settings.keep + 1) + 1)

    def _too_long(self) -> str:
        """How many captions T5 cuts, where its tokenizer is there."""
        from ..checkpoint.files import own_path, text_files
        from ..text.tokenizer import load_tokenizer

        if not self.variant.embedded and own_path(self.variant, "t5") is None:
            return "how many are too long is not known before the model is there"
        tokenizer = load_tokenizer(text_files(self.variant).t5_tokenizer, "t5", 10**6)
        texts = [self.captions_of(one)[captions.CAPTION] for one in self.learned]
        found = [text for text in texts if len(tokenizer.pieces(text)) > self.variant.max_text]
        return f"{len(found)} are longer than T5's {self.variant.max_text} tokens, and cut"

    # Captions and latents ----------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the model; T5 only when a caption is to be encoded."""
        settings = self.settings
        self.pipeline: Pipeline = load_pipeline(
            self.variant, self.device, settings.dtype, settings.shard, settings.vae_tiling, t5_dtype=settings.t5_dtype,
            t5_device=settings.t5_device, memory=settings.memory or None, keep_embeddings=self.folder / "texts",
        )  # fmt: skip
        hashes = weights_hashes(self.variant)
        self.base, *_ = hashes.values()
        how = f"{list(hashes.values())[1]} {dtype_name(self.pipeline.dtype)} {self.device.type} {torch.__version__}"
        self.latents = LatentCache(self.folder / "latents", how, self.cuts, settings.takes, self.device)

    def encode_captions(self) -> None:
        """T5 and CLIP, once. Then T5 is gone. Where T5 learns, nothing is encoded here."""
        disk, texts = self.pipeline.prompts.disk, self.wanted()
        assert disk is not None
        self.texts = TextCache(self.folder / "texts", json.dumps(disk.facts(), sort_keys=True))
        self.pipeline.prompts.disk = None  # captions are kept in parquet
        self.said = {(text.sha256, text.kind): text.caption for text in texts}
        if "t5" in self.live:
            return
        missing = self.texts.missing(texts)
        with (
            tqdm(total=len(missing), desc="captions", unit="text", disable=no_bars() if missing else True) as bar,
            torch.no_grad(),
        ):
            build(self.texts, texts, self.pipeline.prompts, lambda text: bar.update())
        for prompt, place in self.shown.items():
            self.pipeline.prompts.remember(prompt, *self.texts.get(*place))
        self.pipeline.free_t5()

    def encode_pictures(self) -> None:
        """The autoencoder, once."""
        missing = self.latents.missing()
        encode = encoding(self.pipeline.codec)
        for picture in tqdm(missing, desc="latents", unit="picture", disable=no_bars() if missing else True):
            self.latents.add(picture, encode)
        maker.cache_clear()

    def _text(self, sha256: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A text as examples have it: encoded, or the token ids of encoders that read at each step."""
        if not self.live:
            return self.texts.get(sha256, kind)
        text = self.said[(sha256, kind) if (sha256, kind) in self.said else ("", kind)]
        clip, t5 = self.pipeline.clip.tokens([text])[0], self.pipeline.t5
        return t5.tokens([text])[0] if "t5" in self.live else self.texts.get(sha256, kind)[0], clip

    # Steps -------------------------------------------------------------------------------------------------

    def learn(self) -> None:
        """The loop, with samples, validation and losses as it goes. KeyboardInterrupt when it is stopped."""
        settings, model = self.settings, self.pipeline.model
        draw = torch.Generator("cpu").manual_seed(settings.seed)
        if settings.takes:
            widen(model, settings.takes)
        self.adapter: Adapter = adapt(
            model, self.patterns, settings.rank, settings.alpha, draw, settings.rslora, settings.dora, settings.lokr,
            settings.rank_schedule, self.own_ranks,
        )  # fmt: skip
        self.adapter.rates, self.pipeline.loras.also = self.own_rates, [self.adapter]
        if self.live:
            encoders, word = {name: getattr(self.pipeline, name) for name in self.live}, settings.token
            start = settings.token_init or (word or "").strip("<>")
            token = token_of(encoders, word, start, self.vectors) if word else None
            self.adapter = adapt_text(self.adapter, encoders, self.teaches, self.text_form, draw, token)
            self.pipeline.loras.also = [self.adapter]
        found = {one: Cached(self, one, list(self.captions_of(one))) for one in dict.fromkeys(self.epoch)}
        sources = [found[one] for one in self.epoch]
        self.held = [Cached(self, one, [captions.CAPTION]) for one in self.judged]
        if settings.compile:
            for block in (*model.double_blocks, *model.single_blocks):
                block.compile()
        done = checkpoints(self.folder / "checkpoints")
        self.rows = self._rows_before(int(done[-1].stem.rpartition("-")[2]) if done else 0)
        stop = Stop("step", at_once=self.ranks.world == 1)
        bar = tqdm(total=settings.steps, initial=len(self.rows), desc="steps", unit="step", disable=no_bars())
        with bar, stop.listening(), stop.finishing(), self.places:
            self.place()
            if not self.rows:
                self.look(0)

            def told(done: Progress) -> bool:
                bar.update()
                bar.set_postfix(loss=f"{done.loss:.4f}", refresh=False)
                self.rows.append(LossRow(done.step, done.loss, done.rate, done.norm, None))
                self.look(done.step)
                return stop.requested

            about = {"base": self.base, "dtype": self.pipeline.precision}
            train(
                self.adapter, sources, settings.recipe, self.folder / "checkpoints", settings.save_every,
                settings.keep, told, about, self.fetch if settings.memory else None, self.ranks,
            )  # fmt: skip
        self.write_losses()
        if len(self.rows) < settings.steps:  # some rank was asked to stop
            note(f"stopped behind step {len(self.rows)}; the same command goes on")
            raise KeyboardInterrupt

    def _rows_before(self, step: int) -> list[LossRow]:
        """The rows of the table of losses up to a checkpoint; empty ones where the table is gone."""
        path = self.folder / "loss.csv"
        rows: list[LossRow] = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [
                    LossRow(int(row["step"]), *(float(x) if (x := row[key]) else None for key in LossRow._fields[1:]))
                    for row in csv.DictReader(file)
                ]
        known = {row.step: row for row in rows}
        return [known.get(i, LossRow(i, None, None, None, None)) for i in range(1, step + 1)]

    def place(self) -> None:
        """Put the transformer where it learns: whole on the device, or block by block in a budget. MemoryShortage."""
        pipeline, settings = self.pipeline, self.settings
        pipeline.placement.release()
        if settings.shard:
            shard(pipeline.model, self.adapter.parameters(), self.device)
            pipeline.components.ae.to(self.device)
            pipeline.fallback.offload = False  # it stays so: nothing takes turns from now on
            return
        if not settings.memory:
            pipeline.model.to(self.device)
            for name in self.live:
                move(getattr(pipeline, name), self.device)
            return
        plan, budget = self._numbers(), bytes_for(settings.memory, None, self.device)
        at_work = plan.kept + plan.at_work + plan.learning
        self.trip = self.places.enter_context(streaming(pipeline.model, self.device, budget, at_work))

    def fetch(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """The blocks in order, each where it computes."""
        return self.trip.fetch(blocks) if self.settings.memory else iter(blocks)

    def look(self, step: int) -> None:
        """What is due behind a step: validation, samples, and the losses so far."""
        settings = self.settings
        if self.held and step % (settings.validate_every or settings.save_every) == 0:
            value = validate(self.adapter, self.held, settings.recipe, self.fetch)
            if self.rows:
                self.rows[-1] = self.rows[-1]._replace(validation=value)
            if line := overfits(self.validated):
                note(f"step {step}: {line}")
        if step and step % settings.save_every == 0:
            self.write_losses()
        every = settings.sample_every or max(1, settings.steps // 10)
        if self.prompts and step % every == 0:
            self.draw(step)

    def draw(self, step: int) -> None:
        """Samples, and the sheet of all so far."""
        folder = prepare_folder(self.folder / "samples")
        with self.adapter.averaged(), self.drawing():
            for i, prompt in enumerate(self.prompts):
                path = folder / f"step-{step:07d}-{i}.png"
                self.write(path, png_bytes(self.picture(prompt, i)))
        if self.ranks.is_first:  # others may be here before its files are
            self.write_sheet()
            self.tell_signs(step)

    def tell_signs(self, step: int) -> None:
        """Say what the samples of a step show of trouble, beside those of the same prompts before the first step."""
        first, last = (self.samples().get(at, {}) for at in (0, step))
        both = sorted(first.keys() & last.keys())  # a run may have got other prompts since
        before, now = ([Image.open(of[i]) for i in both] for of in (first, last))
        if step and before:
            largest = max((row.rate or 0.0 for row in self.rows), default=0.0)
            for line in (stripes(before, now), no_effect(before, now, largest)):
                if line:
                    note(f"step {step}: {line}")

    def write(self, path: Path, data: bytes | str) -> None:
        """Write a file whole, on the first rank."""
        if self.ranks.is_first:
            write_whole(path, data)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """A context in which pictures are drawn: the transformer is the pipeline's, and then again where it learns."""
        self.places.close()
        eager = torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()
        with eager, torch.no_grad():
            if self.live:
                self.read_prompts()
            yield
        if self.pipeline.fallback.offload or self.settings.memory:
            self.place()

    def read_prompts(self) -> None:
        """Encode the samples' prompts by the encoders as they are now."""
        prompts = self.pipeline.prompts
        prompts.forget()
        for prompt, place in self.shown.items():
            txt, vec = self.adapter.encoded(*(x[None] for x in self.text(*place)))
            prompts.remember(prompt, txt[0], vec[0])

    def picture(self, prompt: str, number: int = 0) -> Image.Image:
        """A sample of a prompt; always of the same seed. number: of the prompt, by which it sees a held-out picture's
        map or references, where it learns to see some."""
        size, settings = self.largest, self.settings
        request = GenerationRequest(
            name=self.variant.name, prompt=prompt, seed=self.settings.seed, width=size.width, height=size.height,
            num_steps=self.settings.sample_steps, force=True,
        )  # fmt: skip
        seen: list[Condition] = []
        if settings.takes:
            one = (self.judged or self.learned)[number % len(self.judged or self.learned)]
            size = self.cuts[one][0].size
            request = request.model_copy(update={"width": size.width, "height": size.height})
            seen = [condition_of(settings.takes, [self.latents.seen(one, 0).float().to(self.device)])]
        image = self.pipeline.draw(self.pipeline.complete(request), conditions=seen)
        image.info = {"xmp": image.info["xmp"]}  # its request does not name what learns, and would draw another picture
        return image

    def samples(self) -> dict[int, dict[int, Path]]:
        """The samples that are there, by step and prompt."""
        found: dict[int, dict[int, Path]] = {}
        for path in sorted((self.folder / "samples").glob("step-*-*.png")):
            _, step, number = path.stem.split("-")
            found.setdefault(int(step), {})[int(number)] = path
        return found

    def write_sheet(self) -> None:
        """The growing sheet: a row for each sampled step."""
        every, found = range(len(self.prompts)), self.samples()
        rows = [
            (str(step), [Image.open(of[i]) for i in every]) for step, of in sorted(found.items()) if len(of) > every[-1]
        ]
        if rows:
            self.write(self.folder / "samples.png", png_bytes(sample_sheet(rows, self.prompts)))

    def write_losses(self) -> None:
        """The losses as a table and as a picture, which needs matplotlib."""
        self.write(self.folder / "loss.csv", loss_csv(self.rows))
        losses = [row.loss or 0.0 for row in self.rows]
        rates = [self.settings.lr * factor(self.settings.recipe, i) for i in range(len(self.rows))]
        try:
            title = f"{self.variant.name}, {len(self.learned)} pictures"
            self.write(self.folder / "loss.png", loss_chart(losses, rates, self.validated, title))
        except ModuleNotFoundError:
            note('no chart without matplotlib: pip install "matplotlib>=3.9"')

    @property
    def validated(self) -> dict[int, float]:
        return {row.step: row.validation for row in self.rows if row.validation is not None}

    # The end -----------------------------------------------------------------------------------------------

    def finish(self) -> Path:
        """The adapter, its card, the A/B sheet, and how much was changed where. Returns the adapter's path."""
        settings, adapter = self.settings, self.adapter
        prompts = self.prompts or [*self.shown]
        with adapter.averaged():
            path = adapter.save(self.folder) if self.ranks.is_first else self.folder / ADAPTER
            changed = adapter.changes()
            with self.drawing():
                trained = [self.picture(prompt, i) for i, prompt in enumerate(prompts)]
        adapter.remove()
        self.pipeline.loras.also = []
        self.text.cache_clear()  # token ids are others without a word that was learned
        with self.drawing():
            base = [self.picture(prompt, i) for i, prompt in enumerate(prompts)]
        self.write(self.folder / "ab.png", png_bytes(sample_sheet([("base", base), ("adapter", trained)], prompts)))
        try:
            if changed:
                self.write(self.folder / "changes.png", change_chart(changed, "how much was changed, and where"))
        except ModuleNotFoundError:
            note('no chart of changes without matplotlib: pip install "matplotlib>=3.9"')
        there = [name for name in SHOWN if (self.folder / name).exists()]
        self.write(self.folder / "README.md", model_card(self.facts(prompts[0], there)))
        if changed:
            name, most = changed[0]
            tell(f"most changed: {name}, {most:.1%} of its weight")
        if self.validated:
            best = best_step(self.validated)
            tell(f"least validation loss: {self.validated[best]:.4f} behind step {best} of {settings.steps}")
        return path

    def facts(self, prompt: str, there: Sequence[str]) -> Facts:
        """What the card tells."""
        left = {"data", "output_dir", "model", "ae", "clip_l", "t5xxl", "device", "threads", "sample_prompts", "name"}
        left |= {"regularization", "masks"}
        left |= {name for name in LATER if getattr(self.settings, name) == BY_NAME[name].default}
        told = {
            name: x for name, x in vars(self.settings).items() if name not in left | {"given"} and x not in (None, "")
        }
        return Facts(
            variant=self.variant, base=self.base, pictures=[one.sha256 for one in self.learned],
            trigger=", ".join(self.settings.triggers), prompt=prompt, settings=told,
            losses=[row.loss or 0.0 for row in self.rows], validated=self.validated, files=there,
        )  # fmt: skip


def run(settings: Settings, dry: bool = False) -> Path | None:
    """The whole run; returns the adapter's path, None for a dry one. What is there already is not done again."""
    set_threads(settings.threads)
    this = Run(settings)
    with joined(this.ranks, this.device):
        return _stages(this, dry)


def _stages(this: Run, dry: bool) -> Path | None:
    settings = this.settings
    record, told = this.folder / "settings.json", json.dumps(settings.given, indent=1, sort_keys=True) + "\n"
    if not dry and is_finished(this.folder, settings.steps) and _read(record) == told:
        tell(f"finished: {this.folder / ADAPTER}")
        return this.folder / ADAPTER
    this.find()
    this.plan()
    if dry:
        return None
    check_libraries(settings)
    prepare_folder(this.folder)
    this.load()
    with this.ranks.first_alone():  # the others find the caches full
        this.encode_captions()
        this.encode_pictures()
    this.learn()
    path = this.finish()
    this.write(record, told)
    tell(str(path))
    return path


def check_libraries(settings: Settings) -> None:
    """UsageError where one that is needed later is not installed, before anything is loaded."""
    parquet_modules()
    library(settings.optimizer)


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run's last checkpoint and its adapter are there."""
    found = checkpoints(folder / "checkpoints")
    return bool(found) and found[-1].stem.endswith(f"-{steps:07d}") and (folder / ADAPTER).is_file()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
