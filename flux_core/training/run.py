"""A whole training run, stage by stage: pictures, captions, latents, steps, and what is left at the end.

Each stage keeps what it made in a folder of its own under the run's, and goes on with what is there. Between stages
memory is given back: text encoders are gone before latents are encoded, the autoencoder before the first step.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint import with_files
from ..checkpoint.files import weights_hashes
from ..device.budget import bytes_for
from ..device.choice import dtype_name, pick_device
from ..device.threads import set_threads
from ..errors import UsageError
from ..files import prepare_folder, write_whole
from ..images.metadata import png_bytes
from ..lora.file import FILE_NAMES
from ..pipeline import Pipeline, load_pipeline
from ..pipeline.placement import move
from ..request.fields import FILES
from ..session.sharing import rank_and_world
from ..session.stopping import Stop
from ..terminal import no_bars, note, tell
from . import captions
from .adapter import Adapter, adapt, by_pattern, matching, patterns_of
from .cached import Cached
from .card import SHOWN, Facts, model_card
from .charts import best_step, change_chart, sample_sheet
from .estimate import Estimate
from .latents import LatentCache, encoding
from .loop import DATA, Progress, checkpoints, factor, train, validate
from .losses import Losses
from .material import Material
from .optimizers import library
from .progress import Steps
from .ranks import Ranks, joined, own_device
from .samples import Samples
from .seen import WAYS, maker, widen
from .settings import BY_NAME, LATER, Settings, parsed
from .sharding import shard
from .signs import overfits
from .streaming import RoundTrip, streaming
from .tables import parquet_modules
from .text_encoders import TextForm, adapt_text, encoders_of, read_live, token_of
from .texts import TextCache, build

ADAPTER = f"{FILE_NAMES[0]}.safetensors"
KEPT_IN_MEMORY = 256
"""encoded captions, 4 MB each of FLUX.1-dev's"""
INPUT = "x_embedder"
"""diffusers' name of the Linear that pictures enter by"""


class Run(Material):
    """A run, and what its stages made so far."""

    pipeline: Pipeline
    adapter: Adapter
    texts: TextCache
    latents: LatentCache
    losses: Losses
    trip: RoundTrip

    def __init__(self, settings: Settings) -> None:
        """UsageError for settings that do not go together; nothing is read yet."""
        self.variant = with_files(settings.name, **{f.name: getattr(settings, f.name) for f in FILES})
        super().__init__(settings, f"{self.variant.width}x{self.variant.height}", Ranks(*rank_and_world()))
        self.ranks.share(settings.recipe)  # its errors
        self.device = pick_device(own_device(settings.device))
        with _errors_of("targets"):
            self.patterns = patterns_of(settings.targets, self.variant.name, self.variant.params)
            matching(self.variant.params, self.patterns)
        if settings.takes:
            self.patterns += [INPUT] if WAYS[settings.takes].widens else []
        self.own_ranks, self.own_rates = self._by_pattern("ranks", "rank"), self._by_pattern("rates", "lr")
        self.teaches = encoders_of(settings.train_text)
        self.live = read_live(self.teaches, settings.token)
        self._check()
        rank, text_rank = settings.rank, settings.text_rank or settings.rank
        alpha = settings.alpha if settings.rslora else settings.alpha * text_rank / rank
        self.text_form = TextForm(text_rank, alpha, settings.rslora, settings.text_lr, settings.token_lr)
        self.vectors = (settings.token_vectors or 1) if settings.token else 0
        self.places = ExitStack()
        self.text = lru_cache(KEPT_IN_MEMORY)(self._text)
        self.estimate, self.samples = Estimate(self), Samples(self)

    def _check(self) -> None:
        """UsageError for settings that do not go together."""
        settings = self.settings
        if self.variant.takes.channels or (settings.takes and self.variant.takes):
            raise UsageError(f"{self.variant.name} sees pictures already. Next: train a plain model, with --takes")
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
        if self.live and (settings.memory or settings.shard):
            raise UsageError("text encoders that learn stay whole on each card. Next: leave --memory and --shard out")

    def _by_pattern(self, name: str, of: str) -> dict[str, Any]:
        """A setting's values by modules. of: what each is. UsageError, FileError."""
        text, params, flag = getattr(self.settings, name) or "", self.variant.params, BY_NAME[name].flag
        learns = matching(params, self.patterns) if text else ()
        with _errors_of(name):
            return by_pattern(text, lambda x: parsed(BY_NAME[of], x, flag), self.variant.name, params, learns)

    def plan(self) -> None:
        """Print what will be done and what it takes. UsageError where it cannot fit, DiskError."""
        self.estimate.tell()

    # Captions and latents ----------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the model; T5 only when a caption is to be encoded."""
        settings = self.settings
        self.pipeline = load_pipeline(
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
        if settings.takes:
            widen(model, settings.takes)
        self.adapter = self._adapter()
        found = {one: Cached(self, one, list(self.captions_of(one))) for one in dict.fromkeys(self.epoch)}
        sources = [found[one] for one in self.epoch]
        self.held = [Cached(self, one, [captions.CAPTION]) for one in self.judged]
        if settings.compile:
            for block in (*model.double_blocks, *model.single_blocks):
                block.compile()
        done = checkpoints(self.folder / "checkpoints")
        self.losses = Losses(self.folder / "loss.csv", int(done[-1].stem.rpartition("-")[2]) if done else 0)
        stop = Stop("step", at_once=self.ranks.world == 1)
        with stop.listening(), stop.finishing(), self.places:
            self.place()
            if not len(self.losses):
                self.look(0)
            with Steps(settings.steps, len(self.losses)) as steps:

                def told(done: Progress) -> bool:
                    steps.add(done)
                    self.losses.add(done)
                    self.look(done.step)
                    return stop.requested

                about = {"base": self.base, "dtype": self.pipeline.precision, DATA: settings.examples}
                train(
                    self.adapter, sources, settings.recipe, self.folder / "checkpoints", settings.save_every,
                    settings.keep, told, about, self.fetch if settings.memory else None, self.ranks,
                )  # fmt: skip
        self.write_losses()
        if len(self.losses) < settings.steps:  # some rank was asked to stop
            note(f"stopped behind step {len(self.losses)}; the same command goes on")
            raise KeyboardInterrupt

    def _adapter(self) -> Adapter:
        """What learns, beside the model, with the text encoders' part and the word's."""
        settings, draw = self.settings, torch.Generator("cpu").manual_seed(self.settings.seed)
        adapter = adapt(
            self.pipeline.model, self.patterns, settings.rank, settings.alpha, draw, settings.rslora, settings.dora,
            settings.lokr, settings.rank_schedule, self.own_ranks,
        )  # fmt: skip
        adapter.rates = self.own_rates
        if self.live:
            encoders, word = {name: getattr(self.pipeline, name) for name in self.live}, settings.token
            token = token_of(encoders, word, settings.token_start, self.vectors) if word else None
            adapter = adapt_text(adapter, encoders, self.teaches, self.text_form, draw, token)
        self.pipeline.loras.also = [adapter]
        return adapter

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
        plan, budget = self.estimate.numbers(), bytes_for(settings.memory, None, self.device)
        at_work = plan.kept + plan.at_work + plan.learning
        self.trip = self.places.enter_context(streaming(pipeline.model, self.device, budget, at_work))

    def fetch(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """The blocks in order, each where it computes."""
        return self.trip.fetch(blocks) if self.settings.memory else iter(blocks)

    def look(self, step: int) -> None:
        """What is due behind a step: validation, samples, and the losses so far."""
        settings = self.settings
        if self.held and step % (settings.validate_every or settings.save_every) == 0:
            self.losses.judge(validate(self.adapter, self.held, settings.recipe, self.fetch))
            if line := overfits(self.losses.validated):
                note(f"step {step}: {line}")
        if step and step % settings.save_every == 0:
            self.write_losses()
        every = settings.sample_every or max(1, settings.steps // 10)
        if self.prompts and step % every == 0:
            self.samples.draw(step)

    def write(self, path: Path, data: bytes | str) -> None:
        """Write a file whole, on the first rank."""
        if self.ranks.is_first:
            write_whole(path, data)

    def write_losses(self) -> None:
        """The losses as a table and as a picture, which needs matplotlib."""
        self.write(self.folder / "loss.csv", self.losses.csv())
        rates = [self.settings.lr * factor(self.settings.recipe, i) for i in range(len(self.losses))]
        try:
            title = f"{self.variant.name}, {len(self.learned)} pictures"
            self.write(self.folder / "loss.png", self.losses.chart(rates, title))
        except ModuleNotFoundError:
            note('no chart without matplotlib: pip install "matplotlib>=3.9"')

    # The end -----------------------------------------------------------------------------------------------

    def finish(self) -> Path:
        """The adapter, its card, the A/B sheet, and how much was changed where. Returns the adapter's path."""
        settings, adapter = self.settings, self.adapter
        prompts = self.prompts or [*self.shown]
        with adapter.averaged():
            path = adapter.save(self.folder) if self.ranks.is_first else self.folder / ADAPTER
            changed = adapter.changes()
            trained = self.samples.each(prompts)
        adapter.remove()
        self.pipeline.loras.also = []
        self.text.cache_clear()  # token ids are others without a word that was learned
        base = self.samples.each(prompts)
        self.write(self.folder / "ab.png", png_bytes(sample_sheet([("base", base), ("adapter", trained)], prompts)))
        if not self.prompts and self.ranks.is_first:  # else their samples have told it
            self.samples.judge(base, trained)
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
        if validated := self.losses.validated:
            best = best_step(validated)
            tell(f"least validation loss: {validated[best]:.4f} behind step {best} of {settings.steps}")
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
            losses=self.losses.all, validated=self.losses.validated, files=there,
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
    try:
        check_libraries(settings)
    except UsageError as error:
        if not dry:
            raise
        note(str(error))
    if dry:
        return None
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


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Errors in it name that setting's flag."""
    flag = BY_NAME[name].flag
    try:
        yield
    except UsageError as error:
        raise UsageError(text if (text := str(error)).startswith(flag) else f"{flag}: {text}") from None


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run's last checkpoint and its adapter are there."""
    found = checkpoints(folder / "checkpoints")
    return bool(found) and found[-1].stem.endswith(f"-{steps:07d}") and (folder / ADAPTER).is_file()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
