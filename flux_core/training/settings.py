"""A run's settings: read from a TOML file and from flags, which win; and the files that ship as examples.

Keys are flags without their dashes (`request/training.py`). Tables in a file only group them: `[adapter] rank = 16` is
`rank = 16`.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FileError, UsageError, nearest
from ..files import user_path
from ..hub.places import ROOTS
from ..lora.ranks import RankSchedule
from ..request.fields import DTYPES, Field
from ..request.training import DATA, MORE_DATA, SECTIONS, SETTINGS
from .adapter import Form
from .folders import Folder, parse_folders
from .loss import PRESERVED, PRIOR
from .objective import MAPS
from .recipe import Recipe

BY_NAME = {field.name: field for field in SETTINGS}
LATER = (
    *(field.name for field in MORE_DATA), "rank_min", "rank_curve", "lokr", "lora_plus", "loss", "huber_c",
    "huber_schedule", "preserve_weight", "contrast",
)  # fmt: skip
"""settings that a card does not tell at their defaults, as before there were any"""
MAKE_EXAMPLES = (
    *(field.name for field in (*DATA, *MORE_DATA) if field.name not in ("strict", "mask_prior")), "takes", "class_word",
    "preserve", "t5_dtype", "t5_device", "threads",
)  # fmt: skip
"""settings by which pictures and captions become examples"""
TOLD = ("name", "rank", "alpha", "steps", "lr", "resolution")
"""settings that are told even at their defaults"""
NOTO, ZIB = "noto", "zib"
"""a style and a character that ship, and their triggers"""
NOTEBOOK: Mapping[str, Any] = MappingProxyType(
    {
        "dtype": "nf4", "rank": 4, "alpha": 4, "targets": "attention", "optimizer": "adamw8bit",
        "resolution": "512x768", "checkpointing": "blocks", "accumulation": 4, "guidance": 1.0, "caption_dropout": 0.0,
    }
)  # fmt: skip
"""of the notebook that trains a painter's style in NF4 on a card of 8 to 16 GB"""
EXAMPLES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "style": {
            "name": "flux-dev", "dtype": "int8", "data": "pictures", "trigger": "in the style of mucha",
            "resolution": "512,768", "rank": 16, "alpha": 16, "caption_dropout": 0.1, "steps": 1500, "lr": 2e-4,
            "accumulation": 1, "warmup": 50, "schedule": "cosine", "checkpointing": "blocks", "timesteps": "flux_shift",
            "guidance": 1.0, "ema": 0.99, "sample_prompts": ["a lighthouse in a storm", "portrait of a woman"],
        },
        "noto": {
            "name": "flux-mini", "trigger": NOTO, "output_dir": "output/noto", "resolution": "256x256", "rank": 4,
            "targets": "blocks", "steps": 1200, "lr": 1e-3, "batch": 2, "warmup": 20, "schedule": "cosine",
            "timesteps": "flux_shift", "guidance": 1.0, "seed": 1, "sample_every": 300,
            "sample_prompts": ["a noto hamburger", "a noto dog", "a noto robot", "a noto strawberry"],
        },
        "zib": {
            "name": "flux-mini", "trigger": ZIB, "output_dir": "output/zib", "resolution": "256x256", "rank": 2,
            "targets": "blocks", "steps": 400, "lr": 2e-3, "lora_plus": 8.0, "batch": 4, "warmup": 20,
            "schedule": "cosine", "timesteps": "flux_shift", "guidance": 1.0, "flip": True, "held_out": 0, "seed": 1,
            "preserve": "differential", "class_word": "alien", "sample_every": 400,
            "sample_prompts": ["a zib on a green background", "a zib to the left of an apple", "two zibs", "a robot"],
        },
    }
)  # fmt: skip
"""what `--example NAME` sets"""


class Settings:
    """A run's settings, an attribute for each of `SETTINGS`."""

    alpha: Any
    trigger: Any
    dtype: str | None
    t5_dtype: str | None

    def __init__(self, values: Mapping[str, Any]) -> None:
        """values: parsed, those that are given. UsageError for what does not go together."""
        self.given = dict(values)
        for field in SETTINGS:
            setattr(self, field.name, values.get(field.name, field.default))
        self.dtype, self.t5_dtype = (DTYPES.get(x or "auto") for x in (self.dtype, self.t5_dtype))  # auto: None
        if self.alpha is None:
            self.alpha = float(self.rank)
        if not self.data:
            raise UsageError("there is no --data. Next: name a folder of pictures with captions, or --example noto")
        self._check_token()
        options = {"timestep_mean": "logit_normal", "timestep_std": "logit_normal",
                   "timestep_shift": "shift, uniform, mode, beta, mixflow",
                   "timestep_scale": "sigmoid, shift, flux_shift, mode"}  # fmt: skip
        for name, ways in options.items():
            if name in values and self.timesteps not in ways.split(", "):
                raise UsageError(f"{BY_NAME[name].flag} goes with --timesteps {ways}, not {self.timesteps}")
        masked = bool(self.masks) or any(folder.masks for folder in self.folders)
        for name, other, there in (("crops", "--crop random", self.crop == "random"),
                                   ("keep_tags", "--shuffles", self.shuffles),
                                   ("huber_c", "--loss huber or smooth_l1", self.loss in ("huber", "smooth_l1")),
                                   ("huber_schedule", "--loss huber or smooth_l1", self.loss in ("huber", "smooth_l1")),
                                   ("preserve_weight", "--preserve differential or blank", self.preserve in PRESERVED),
                                   ("text_rank", "--train-text", self.train_text),
                                   ("text_lr", "--train-text", self.train_text),
                                   ("token_init", "--token", self.token),
                                   ("token_vectors", "--token", self.token),
                                   ("token_lr", "--token", self.token),
                                   ("class_word", "--preserve differential", self.preserve == "differential"),
                                   ("keep_separator", "--shuffles", self.shuffles),
                                   ("prior_weight", "--regularization", self.regularization),
                                   ("mask_floor", "--masks", masked), ("mask_prior", "--masks", masked)):  # fmt: skip
            if name in values and not there:
                raise UsageError(f"{BY_NAME[name].flag} goes with {other}")
        if self.preserve == PRIOR and not self.regularization:
            raise UsageError("--preserve regularization keeps what --regularization shows. Next: name a folder with it")
        if self.preserve == "differential":
            if not (self.triggers and self.class_word):
                raise UsageError("--preserve differential needs --trigger and --class-word, which stands in its place")
            if not self.class_word.strip():
                raise UsageError(f"--class-word {self.class_word!a} is no word. Next: say what it is one of, as in dog")
            if self.class_word in self.triggers:
                raise UsageError(
                    f"--class-word {self.class_word!a} is the trigger, so what is learned would be kept as it was. "
                    "Next: say what it is one of, as in dog"
                )
        if "rank_curve" in values and not self.rank_min:
            raise UsageError(f"{BY_NAME['rank_curve'].flag} goes with {BY_NAME['rank_min'].flag}")
        if self.ema == 1:
            raise UsageError("--ema must be less than 1, not 1. Next: 0.99, as in the example style")
        if not self.lora_plus:
            raise UsageError("--lora-plus 0 would leave the factors at zero that begin there. Next: a number above 0")
        if self.optimizer == "prodigy" and (self.rates or self.lora_plus != 1):
            raise UsageError("prodigy finds one rate for all. Next: leave --lora-plus and --rates out")
        if self.optimizer == "prodigy" and "lr" not in values:
            self.lr = 1.0
        Form(self.rank, self.alpha, self.rslora, self.dora, self.lokr, self.rank_schedule)  # for its errors
        if self.timestep_shift == 0:
            raise UsageError("--timestep-shift 0 makes every noise level 0. Next: 1, which shifts nothing, or more")
        if self.timesteps == "shift" and self.timestep_shift is None:
            raise UsageError("--timesteps shift needs --timestep-shift, as in 3")
        self.recipe  # noqa: B018 - its errors

    def _check_token(self) -> None:
        """The token is the trigger, if there is no other. UsageError."""
        if self.token:
            if self.token.split() != [self.token]:
                raise UsageError(f"--token is one word without spaces, as in <thing>, not {self.token!a}")
            if not self.token_start.strip():
                flag, given = ("--token-init", self.token_init) if self.token_init else ("--token", self.token)
                raise UsageError(f"{flag} {given!a} has no words to begin as. Next: --token-init, as in a dog")
            self.trigger = self.trigger or self.token
        elif self.targets == "none":
            raise UsageError("--targets none goes with --token. Next: name other targets, or a token that learns")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    @property
    def token_start(self) -> str:
        """What the word that learns begins as."""
        return self.token_init or (self.token or "").strip("<>")

    @property
    def rank_schedule(self) -> RankSchedule | None:
        """T-LoRA's, if there is one."""
        return RankSchedule(self.rank_min, self.rank_curve) if self.rank_min else None

    @property
    def folders(self) -> list[Folder]:
        """What it learns from, and then the regularization sets. UsageError."""
        priors = parse_folders(self.regularization, "--regularization")
        return parse_folders(self.data) + [one._replace(prior=True) for one in priors]

    @property
    def triggers(self) -> list[str]:
        """The words for what is learned, each once."""
        words = [self.trigger if one.trigger is None else one.trigger for one in self.folders if not one.prior]
        return [word for word in dict.fromkeys(words) if word]

    @property
    def examples(self) -> str:
        """What examples are made by, as JSON of JSON by the settings' names."""
        values = {name: getattr(self, name) for name in MAKE_EXAMPLES}
        return json.dumps({name: json.dumps(x) for name, x in values.items() if x not in (None, "", [])})

    @property
    def recipe(self) -> Recipe:
        """How it learns. UsageError."""
        names = {"mean", "std", "scale", "shift"}
        options = {name: x for name in sorted(names) if (x := getattr(self, f"timestep_{name}")) is not None}
        return Recipe(
            on_table=MAPS[self.timesteps].tabled,
            timestep_options=options,
            **{name: getattr(self, name) for name in Recipe.__dataclass_fields__ if name in BY_NAME},
        )


def read_settings(
    config: str | None, example: str | None, flags: Mapping[str, Any], other: Mapping[str, Any] = MappingProxyType({})
) -> Settings:
    """The settings of an example, a file and flags, each over those before. UsageError, FileError.

    flags: texts, lists of them, and True, by the fields' names. other: of another tool's config, below all of these.
    """
    values = {**other, **(example_values(example) if example else {})}
    if config:
        values |= read_file(user_path(config))
    values |= {name: parsed(BY_NAME[name], _joined(value), BY_NAME[name].flag) for name, value in flags.items()}
    return Settings({name: value for name, value in values.items() if value not in ("", [])})


def _joined(value: Any) -> Any:
    """The values of all uses of a flag that takes several."""
    nested = isinstance(value, list) and any(isinstance(one, list) for one in value)
    return [text for one in value for text in one] if nested else value


def example_values(name: str) -> dict[str, Any]:
    """What an example sets. FileError where its pictures are not there."""
    values = dict(EXAMPLES[name])
    if name in (NOTO, ZIB):
        folders = [root / name / "pictures" for root in ROOTS]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            raise FileError(
                f"the pictures of the example are not in {' or '.join(map(str, folders))}. Next: clone the repository "
                "again, whole, or reinstall the package from it"
            )
        values["data"] = str(found)
    return values


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. FileError; UsageError names file and key."""
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileError(f"{path} is no TOML: {error}. Next: `train --example style` prints a file") from None
    found: dict[str, Any] = {}
    for key, value in document.items():
        for name, one in value.items() if isinstance(value, dict) else [(key, value)]:
            name = name.replace("-", "_")
            if name not in BY_NAME:
                raise UsageError(
                    f"{path}: there is no setting {name!a}.{nearest(name, BY_NAME)} Next: leave it out, or train with "
                    "the version that the file is of"
                )
            if name in found:
                raise UsageError(f"{path}: {name} is set twice")
            found[name] = parsed(BY_NAME[name], one, f"{path}: {name}")
    return found


def parsed(field: Field, value: Any, named: str) -> Any:
    """A setting's value, from a file's or a flag's. UsageError. named: for its text."""
    try:
        if field.repeated and not field.multiple and isinstance(value, list):
            found = [field.parse(one) for one in value if isinstance(one, str)]
            if len(found) < len(value) or not all(found):
                raise UsageError(f"{field.flag} must be a text or a list of texts, not {value!a}")
            return found[0] if len(found) == 1 else found
        if field.multiple:
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise UsageError(f"{field.flag} must be a list of texts, not {value!a}")
            return value
        if field.kind is bool:
            if not isinstance(value, bool):
                raise UsageError(f"{field.flag} must be true or false, not {value!a}")
            return value
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UsageError(f"{field.flag} must be {field.expected}, not {value!a}")
        if value == "":
            return ""
        text = str(value)
        return field.parse(text if field.kind is not int else text.removesuffix(".0"))
    except UsageError as error:
        raise UsageError(str(error).replace(field.flag, named, 1)) from None


def example_file(name: str) -> str:
    """An example as a TOML file: every setting with its help; those that it leaves to their defaults are comments."""
    values, lines = example_values(name), [f"# python cli.py train {name}.toml", ""]
    for title, fields in SECTIONS.items():
        lines += [f"# {title} {'-' * (100 - len(title))}", ""]
        for field in fields:
            lines += _setting(field, values, NOTEBOOK if name == "style" else {})
    return "\n".join(lines)


def _setting(field: Field, values: Mapping[str, Any], notebook: Mapping[str, Any]) -> list[str]:
    """A setting's lines: what it is, and its value."""
    is_set, default = field.name in values, field.default
    shown = values[field.name] if is_set else default if default is not None else _blank(field)
    other = notebook.get(field.name, shown)
    beside = "" if other == shown else f"  # the notebook's: {_toml(other)}"
    return [f"# {field.help}", f"{'' if is_set else '# '}{field.name} = {_toml(shown)}{beside}", ""]


def settings_lines(settings: Settings) -> list[str]:
    """The settings that are given and no defaults, and `TOLD`, as the lines of a TOML file that gives them again."""
    given = {name: value for name, value in settings.given.items() if value != BY_NAME[name].default}
    told = {name: getattr(settings, name) for name in TOLD} | given
    return [f"{field.name} = {_toml(told[field.name])}" for field in SETTINGS if told.get(field.name) is not None]


def _blank(field: Field) -> Any:
    return [] if field.multiple else ""


def _toml(value: Any) -> str:
    """As JSON, which TOML takes for texts, numbers, booleans and lists."""
    return json.dumps(value, ensure_ascii=False)
