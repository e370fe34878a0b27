"""What a run learns from: pictures with their sizes and cuts, those of an epoch, and the texts that go with them."""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from tqdm import tqdm

from ..errors import UsageError
from ..files import user_path
from ..terminal import no_bars, note
from ..text import TrainedWords
from . import captions
from .data import Found, Picture
from .folders import epoch_of, fetch, read_folders
from .loss import others_of
from .ranks import Ranks
from .report import findings
from .seen import WAYS
from .settings import Settings
from .sizes import Cut, Resolution, Size, cuts, parse_resolution
from .texts import Text, texts_of

MOST_HELD_OUT = 8
"""pictures that are held out by themselves"""
SAMPLE = "sample"
"""the kind of a sample's prompt in the cache of texts, with its number behind it"""


class Material:
    """The pictures and texts of a run."""

    learned: list[Picture]
    judged: list[Picture]
    """those that are held out"""
    priors: list[Picture]
    """of regularization sets"""
    epoch: list[Picture]
    """those that learn, each as often as it comes"""
    cuts: dict[Picture, list[Cut]]
    left_out: int
    findings: list[str]
    """the report on them, a line each"""

    def __init__(self, settings: Settings, size: str, ranks: Ranks) -> None:
        """Nothing is read yet. size: the model's, as 512x512. UsageError for settings that do not go together.

        ranks: who works on it: all draw and validate, as a model that is spread needs; the first one writes and speaks.
        """
        self.settings, self.ranks = settings, ranks
        self.folder = user_path(settings.output_dir)
        self.resolution: Resolution = parse_resolution(settings.resolution or size, settings.rule or "")
        captions.check_chances(settings.caption_dropout, settings.trigger_only, bool(settings.triggers))
        self.prompts: list[str] = settings.sample_prompts or []

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
        self.cuts = {}
        for one in every:
            size, count = self.resolution.size_of(one.shape), settings.crops if settings.crop == "random" else 1
            how: Any = (settings.crop, count, settings.flip, settings.seed, one.sha256)
            self.cuts[one] = cuts(one.shape, size, *(() if one.sha256 in judged else how))
        self.left_out, self.findings = len(found.skipped), findings(found)
        self.priors = [one for one in every if one.prior]
        self.epoch = epoch_of([*self.learned, *self.priors], settings.repeats)
        if settings.token:
            self._check_token(settings.token)

    def _check_token(self, token: str) -> None:
        """Tell how many captions are without a word that learns, as prompts are read. UsageError where all are."""
        word, kinds = TrainedWords({token: torch.empty(0, 0, dtype=torch.float32, device="cpu")}), captions.COMMON
        texts = [[text for kind, text in self.captions_of(one).items() if kind not in kinds] for one in self.learned]
        bare = sum(not any(map(word.names, of)) for of in texts)
        if bare == len(texts):
            raise UsageError(
                f"no caption has {token} as a word of its own, so no picture would teach it. Next: write it into "
                "captions, or name it by --trigger"
            )
        if bare:
            note(f"{bare} of {len(texts)} captions are without {token} as a word of its own, and do not teach it")

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

    @property
    def largest(self) -> Size:
        """Of the training sizes."""
        return max((every[0].size for every in self.cuts.values()), key=lambda size: size.width * size.height)
