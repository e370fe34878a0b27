"""What an exploration draws: lists of values, the pictures of their combinations, and the paths of these.

One axis varies at a time, the others keep their first value (`cross`: all combinations), for every prompt. A picture
that two axes share is drawn once and has a path in both folders. Everything follows from the lists: `session.json`,
which holds them, says what the session's folder should contain, and the folder shows what of it exists. No torch.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product, zip_longest
from typing import Annotated, Any, Literal, NamedTuple, Self

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UsageError
from ..hooks import Intervention
from ..jsonfile import first_finding
from ..request.batch import MOST_ROWS, batches
from ..request.fields import FIELDS, MAX_SEED, Field
from ..request.generation import DRAWN_BY, GenerationRequest
from ..terminal import note, printable
from ..version import __version__

AXES = ("prompt", "seed", "steps", "guidance", "lora")
FOLDERS = {
    "seed": "exploration_images",
    "steps": "inference_steps_images",
    "guidance": "guidance_images",
    "lora": "lora_images",
}
MAX_PICTURES = 10_000
SOME = pydantic.Field(min_length=1)


class Point(NamedTuple):
    """The values that a picture is drawn with; the prompt by its number."""

    prompt: int
    seed: int
    steps: int
    guidance: float | None
    lora: float | None = None
    """the scale of the LoRAs that have none of their own"""


class View(NamedTuple):
    """A folder of pictures in which some axes vary, and the others keep their first value."""

    folder: str
    axes: tuple[str, ...]


class Sheet(NamedTuple):
    """A grid: its name, and rows of points. The last of `axes` varies along a row, the last but one from row to row."""

    name: str
    axes: tuple[str, ...]
    rows: list[list[Point]]


class Drawn(BaseModel):
    """Dtypes, attention and weights of all pictures, so that a resumed session uses the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dtype: str
    t5_dtype: str | None = None
    """None: the model's own choice, as in sessions of earlier versions"""
    attention: str = "exact"
    """or in which eight bits"""
    weights: dict[str, str]


class Exploration(BaseModel):
    """Everything that a session draws; its JSON is the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    version: str = __version__
    prompts: Annotated[tuple[str, ...], SOME]
    seeds: Annotated[tuple[int, ...], SOME]
    steps: Annotated[tuple[int, ...], SOME]
    guidance: Annotated[tuple[float | None, ...], SOME]
    cross: bool = False
    save_latents: Literal["last", "every"] | None = None
    metadata: bool = True
    request: dict[str, Any]
    """the other fields of every picture's request"""
    drawn: Drawn | None = None
    """None until a model was loaded"""
    lora_scales: Annotated[tuple[float | None, ...], SOME] = (None,)
    """(None,): every LoRA has its own"""
    varied: tuple[int, ...] = ()
    """entries of the request's plan that these scales are for"""
    beside: tuple[str, ...] = ()
    """what else the pictures are drawn with, that reads or writes files: the user gives it again"""
    batch: Annotated[int, pydantic.Field(ge=1, le=MOST_ROWS)] = 1
    """pictures that are drawn at once"""

    @pydantic.model_validator(mode="after")
    def _check_size(self) -> Self:
        lengths = [len(self.values(axis)) for axis in AXES[1:]]
        size = len(self.prompts) * (math.prod(lengths) if self.cross else sum(lengths))
        if size > MAX_PICTURES:
            raise ValueError(f"these are {size:,} pictures, at most {MAX_PICTURES:,} make a session: give fewer values")
        return self

    def values(self, axis: str) -> Sequence[Any]:
        lists = {"seed": self.seeds, "steps": self.steps, "guidance": self.guidance, "lora": self.lora_scales}
        return range(len(self.prompts)) if axis == "prompt" else lists[axis]

    @cached_property
    def views(self) -> list[View]:
        moving = [axis for axis in AXES if len(self.values(axis)) > 1]
        prompt = [axis for axis in moving if axis == "prompt"]
        settings = [axis for axis in moving if axis != "prompt"] or ["seed"]
        if self.cross:
            return [View(FOLDERS["seed"], (*prompt, *settings))]
        return [View(FOLDERS[axis], (*prompt, axis)) for axis in settings]

    def points(self, view: View) -> list[Point]:
        every = [self.values(axis) if axis in view.axes else self.values(axis)[:1] for axis in AXES]
        return [Point(*values) for values in product(*every)]

    @cached_property
    def places(self) -> dict[Point, list[str]]:
        """Pictures in the order of drawing -> paths without suffix: written to the first, linked to the others."""
        found: dict[Point, list[str]] = {}
        for view in self.views:
            for point in self.points(view):
                found.setdefault(point, []).append(f"{view.folder}/{self._stem(point, view.axes)}")
        return dict(sorted(found.items(), key=lambda item: item[0].prompt))  # stable: a prompt is encoded once

    @cached_property
    def batches(self) -> list[list[Point]]:
        """The pictures as they are drawn: each always in the same company, which its last bits depend on."""
        return batches(self.places, self.batch, lambda point: (point.steps, point.lora))

    def _stem(self, point: Point, axes: Sequence[str]) -> str:
        return "_".join(f"{axis}_{self._value(point, axis)}" for axis in axes)

    def _value(self, point: Point, axis: str) -> str:
        if axis == "prompt":
            return str(point.prompt + 1).zfill(len(str(len(self.prompts))))
        return _short(getattr(point, axis))

    def sheets(self) -> Iterator[Sheet]:
        """A grid for each view. Where more than two axes vary, a grid for each combination of all but the last two."""
        for view in self.views:
            points, columns = self.points(view), len(self.values(view.axes[-1]))
            rows = [points[i : i + columns] for i in range(0, len(points), columns)]
            sheets: dict[str, list[list[Point]]] = {}
            for row in rows:
                sheets.setdefault(self._stem(row[0], view.axes[:-2]), []).append(row)
            name = view.folder.replace("images", "grid")
            yield from (Sheet("_".join(filter(None, (name, stem))), view.axes, rows) for stem, rows in sheets.items())

    def label(self, point: Point, axis: str) -> str:
        """A value as a grid shows it; empty where the model takes none."""
        if axis == "prompt":
            return printable(self.prompts[point.prompt])
        value = _short(getattr(point, axis))
        name = "LoRA" if axis == "lora" else axis
        return f"{value} steps" if axis == "steps" else value and f"{name} {value}"

    def request_of(self, point: Point) -> GenerationRequest:
        changes = {"seed": point.seed, "num_steps": point.steps, "guidance": point.guidance}
        drawn = self.drawn.model_dump(include={"dtype", "t5_dtype"}, exclude_none=True) if self.drawn else {}
        fields = {**self.request, **drawn, **changes, "prompt": self.prompts[point.prompt]}
        if point.lora is not None:
            plan = enumerate(self.request.get("plan", ()))
            fields["plan"] = [entry | ({"scale": point.lora} if i in self.varied else {}) for i, entry in plan]
        return GenerationRequest(**fields, force=True, allow_empty_prompt=True)

    @property
    def hooks(self) -> tuple[Intervention, ...]:
        """The plan of every picture, without LoRAs."""
        return self.request_of(next(iter(self.places))).hooks

    def settings(self) -> str:
        """The lists as text, for people."""
        lists = {"seed": self.seeds, "steps": self.steps, "guidance": self.guidance, "LoRA": self.lora_scales}
        return ", ".join(
            f"{name} {' '.join(map(_short, values))}" for name, values in lists.items() if values != (None,)
        )

    def text(self) -> str:
        """The manifest as JSON."""
        return self.model_dump_json(indent=2, exclude={"batch"} if self.batch == 1 else None) + "\n"


def _short(value: float | None) -> str:
    """A number as text, as short as is exact: 3.5 -> "3.5", 4.0 -> "4"."""
    return "" if value is None else f"{value:g}" if float(f"{value:g}") == value else repr(value)


# From flags to an exploration -----------------------------------------------------------------------


def numbers(field: Field, flag: str, texts: Sequence[str] | None) -> list[Any]:
    """The values of a list as in "4,8,28", without duplicates; [] without a list. UsageError by the field's bounds."""
    parts = [part.strip() for text in texts or () for part in text.split(",")]
    values = [replace(field, name=flag, multiple=False).parse(part) for part in parts]
    unique = list(dict.fromkeys(values))
    if len(unique) < len(values):
        note(f"--{flag}: repeated values are drawn once")
    return unique


def seeds_of(texts: Sequence[str] | None) -> list[int]:
    """The seeds of a list, as `numbers`; `auto:8` gives eight random seeds, and -1, as in many tools, a single one."""
    text = ",".join(texts or ("auto:1",)).strip()
    text = "auto:1" if text == "-1" else text
    if text.startswith("auto:"):
        how_many = replace(FIELDS["num_images"], name="seeds auto:N").parse(text.removeprefix("auto:"))
        return secrets.SystemRandom().sample(range(MAX_SEED + 1), how_many)
    return numbers(FIELDS["seed"], "seeds", [text])


def plan_exploration(
    prompts: Sequence[str],
    fields: dict[str, Any],
    seeds: Sequence[str] | None = None,
    steps: Sequence[str] | None = None,
    guidance: Sequence[str] | None = None,
    lora_scales: Sequence[str] | None = None,
    varied: Sequence[int] = (),
    **options: Any,
) -> Exploration:
    """The exploration that the flags describe. fields: of every request; options: the manifest's others.

    varied: the entries of the fields' plan that --lora-scales is for. UsageError for anything that is wrong with any of
    its requests. Their notes are printed, once each.
    """
    all_seeds, all_steps = seeds_of(seeds), numbers(FIELDS["num_steps"], "steps", steps)
    strengths, texts = numbers(FIELDS["guidance"], "guidance", guidance), list(dict.fromkeys(prompts))
    scales = numbers(FIELDS["lora_scale"], "lora-scales", lora_scales)
    if scales and not varied:
        raise UsageError(
            "--lora-scales is for LoRAs without a scale of their own, and there is none. Next: --lora FILE without one"
        )
    if len(texts) < len(prompts):
        note("repeated prompts are drawn once")
    fields = {**fields, "seed": all_seeds[0]}
    first, *others = [
        GenerationRequest(**fields, prompt=texts[0], num_steps=x, guidance=y)
        for x, y in zip_longest(all_steps or [None], strengths or [None])
    ]
    others += [GenerationRequest(**fields, prompt=text) for text in texts[1:]]
    if len(strengths) > 1 and not first.variant.params.guidance_embed:
        raise UsageError(f"{first.name} takes no guidance: all pictures would be the same. Next: leave out --guidance")
    for line in dict.fromkeys(line for request in (first, *others) for line in request.notes()):
        note(line)
    try:
        return Exploration(
            prompts=tuple(texts),
            seeds=tuple(all_seeds),
            steps=tuple(all_steps or [first.num_steps]),
            guidance=tuple(strengths or [first.guidance]),
            lora_scales=tuple(scales or [None]),
            varied=tuple(varied) if scales else (),
            request=first.model_dump(mode="json", exclude=_OWN, exclude_none=True),
            **options,
        )
    except ValidationError as error:
        raise UsageError(first_finding(error)["msg"].removeprefix("Value error, ")) from None


_OWN = {"prompt", "seed", "num_steps", "guidance", "num_images", *DRAWN_BY} - {"compiled"}
"""fields of a request that the manifest holds in lists of its own, or not at all"""
