"""The importance of each block: pictures drawn without it are compared with those of the whole model.

After Stable Flow (arXiv 2411.14430, section 3.1): for every prompt and seed the whole model draws a reference, and a
picture is drawn without each block, whose output is then its input. The importance of a block is 1 minus the mean
similarity, by DINOv2, of its pictures to their references.

A study is a folder: a file for every picture, written once, and `study.json` with the settings that all share. So a
study can be resumed after any end, with more prompts, and by several processes at once: each draws the pictures that no
other process has claimed.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import FileError, UsageError
from ..files import disk_errors, write_whole
from ..hooks import Skip
from ..hooks.sites import block_names
from ..images.given import told
from ..images.metadata import png_bytes
from ..images.pictures import as_rgb, open_picture
from ..jsonfile import first_finding, in_words, quoted, read_json
from ..request.fields import FIELDS, MAX_SEED, MAX_SEEDS, PICTURE_FILES, kind_of_attention
from ..request.generation import GenerationRequest
from ..session.sharing import claim, end_claims
from ..variants import VARIANTS

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from .scoring import Scorer

REFERENCE = "reference"
SHARE = 9 / 57
"""the share of FLUX.1-dev's blocks that Stable Flow calls vital"""
PROMPTS = Path(__file__).resolve().parents[1] / "prompts"
HOW, NONE = ("strength", "fit", "mask_padding", "pad"), "none"
"""fields that say how pictures are used, and what a study's settings have for those that are not given"""


class Prompt(BaseModel):
    """An entry of a file of prompts. `seed` is the first of its seeds, the others follow it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str = Field(min_length=1)
    seed: int = Field(ge=0, le=MAX_SEED + 1 - MAX_SEEDS)


def default_prompts(name: str) -> Path:
    """The included file of 64 prompts for a model: its own, that of the one it stands on, or that for all models."""
    variant = VARIANTS.get(name)
    own = PROMPTS / f"{variant.base if variant and variant.base else name}.json"
    return own if own.is_file() else PROMPTS / "prompts.json"


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSON file, a list of `{"prompt": …, "seed": …}`. FileError, UsageError for other contents."""
    entries = read_json(path, "the list of prompts")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{path} holds no prompts: it should be [{{"prompt": "a red apple", "seed": 1}}, …]')
    try:
        return TypeAdapter(list[Prompt]).validate_python(entries)
    except ValidationError as error:
        first = first_finding(error)
        number, *keys = first["loc"]
        finding = in_words(first, f"entry {int(number) + 1}", str([*keys, "it"][0]), Prompt.model_fields)
        raise UsageError(f'{path}: {finding}. Next: entries as {{"prompt": "a red apple", "seed": 1}}') from None


# The study -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A picture: a prompt's number, a seed, and the block that is left out, or REFERENCE."""

    number: int
    seed: int
    block: str


class Study:
    """The pictures of a study: which exist, and how to draw the others."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt], seeds: int, request: GenerationRequest) -> None:
        """seeds: how many for each prompt. request: what all pictures share. UsageError where it has no step."""
        if not request.num_forward_steps:
            raise UsageError("--strength 0 leaves no step, and no block to leave out. Next: a larger one")
        self.folder, self.prompts, self.request = folder, tuple(prompts), request
        self.blocks = block_names(request.variant.params)
        self.pairs = [(i, prompt.seed + j) for i, prompt in enumerate(prompts) for j in range(seeds)]
        self.seeds = seeds

    def path(self, task: Task) -> Path:
        return self.folder / "images" / f"{task.number:03}_seed{task.seed}" / f"{task.block}.png"

    def groups(self, batch: int) -> list[list[Task]]:
        """All pictures in batches of at most `batch`, prompt by prompt: a study that ends early has whole prompts."""
        chunks = [self.pairs[i : i + batch] for i in range(0, len(self.pairs), batch)]
        blocks = (REFERENCE, *self.blocks)
        return [[Task(number, seed, block) for number, seed in chunk] for chunk in chunks for block in blocks]

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks whose pictures do not exist yet."""
        return [task for task in tasks if not self.path(task).is_file()]

    @contextmanager
    def claimed(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """The missing ones of a batch, which is claimed as a whole while the block runs; none if others draw any."""
        with ExitStack() as stack:
            mine = all(stack.enter_context(claim(self.folder, _name(task))) for task in tasks)
            yield self.missing(tasks) if mine else []  # another process may have drawn them before

    def end(self) -> None:
        """Remove the claims, once all pictures exist."""
        end_claims(self.folder)

    def request_of(self, task: Task) -> GenerationRequest:
        skips = () if task.block == REFERENCE else (Skip(blocks=(task.block,), follow=bool(self.request.hooks)),)
        plan = (*self.request.plan, *skips)
        changes = {"prompt": self.prompts[task.number].prompt, "seed": task.seed, "plan": plan}
        return self.request.model_copy(update=changes)

    def draw(self, pipeline: "Pipeline", tasks: Sequence[Task]) -> None:
        """Draw the pictures of one block as one batch, and write those that are missing. DiskError."""
        missing = self.missing(tasks)
        images = pipeline.draw_rows([self.request_of(task) for task in tasks])
        for task, image in ((task, image) for task, image in zip(tasks, images, strict=True) if task in missing):
            path = self.path(task)
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, png_bytes(image))

    def check_settings(self, request: GenerationRequest, keep: bool = True) -> None:
        """Compare the study's settings with those in its folder: UsageError where they differ. keep: write them."""
        path, settings, then = self.folder / "study.json", self._settings(request), None
        if path.is_file():
            then = _read_settings(path)
            for difference in _differences(then, settings):
                raise UsageError(f"{self.folder} holds {difference}, or choose another folder with --output-dir")
            settings = _merge(then, settings)
        if keep and settings != then:  # so that no process replaces what another is reading, which Windows refuses
            write_whole(path, json.dumps(settings, indent=2) + "\n")

    def _settings(self, request: GenerationRequest) -> dict[str, Any]:
        shared = ("name", "width", "height", "num_steps", "guidance", "dtype", "t5_dtype")
        values = {key: getattr(request, key) for key in shared}
        recorded = request.recorded()
        entries = [entry.model_dump(mode="json", exclude_none=True) for entry in recorded.plan]
        values["plan"] = [*entries, *recorded.functions]
        pictures = {name: told(getattr(request, name)) or NONE for name in PICTURE_FILES}
        how = {name: NONE if (value := getattr(request, name)) is None else value for name in HOW}
        values |= json.loads(json.dumps(pictures | how))  # as they are read again
        values["attention"] = kind_of_attention(request.environment["attention"]) if request.environment else None
        return {**values, "weights": request.weights or None, "prompts": [prompt.prompt for prompt in self.prompts]}

    def picture(self, task: Task) -> Image.Image:
        """The RGB picture of a task that was drawn."""
        return as_rgb(open_picture(self.path(task), formats=("PNG",))[0], str(self.path(task)))


def _name(task: Task) -> str:
    return f"{task.number:03}_seed{task.seed}_{task.block}"


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings in `study.json`. FileError when it is damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and isinstance(settings.get("prompts"), list):
            return dict.fromkeys((*PICTURE_FILES, *HOW), NONE) | settings
    except (OSError, ValueError):
        pass
    raise FileError(f"{path} does not hold a study's settings. Next: delete it, if the pictures beside it are right")


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Texts for the settings and prompts that both have and that differ."""
    for key in now:
        if key == "prompts" or None in (then.get(key), now[key]) or then[key] == now[key]:
            continue
        if key in PICTURE_FILES:
            said = "no" if then[key] == NONE else "another" if now[key] != NONE else "a"
            yield f"a study with {said} {FIELDS[key].flag}: use the same"
        else:
            yield f"a study with {key} {quoted(then[key])}, this one has {quoted(now[key])}: use the same"
    for i, (old, new) in enumerate(zip(then["prompts"], now["prompts"], strict=False), 1):
        if old != new:
            yield f"a study whose prompt {i} is {quoted(old)}, this one's is {quoted(new)}: give the same prompts"


def _merge(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings `now`; where they have none, and for further prompts, those of `then`."""
    merged = {key: then.get(key) if value is None else value for key, value in now.items()}
    return merged | {"prompts": now["prompts"] + then["prompts"][len(now["prompts"]) :]}


# Results -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The result for a block, a row of the table. `spread` and `seed_spread`: standard deviations of 1 - similarity."""

    block: str
    layer: int
    importance: float
    spread: float
    """over all pictures"""
    ci95: float
    """half the width of a 95 % confidence interval of the importance, from the spread over the prompts"""
    seed_spread: float | None
    """over the seeds of a prompt, pooled over the prompts; None with a single seed"""


def similarities(study: Study, scorer: "Scorer", on_pair: Callable[[], Any] = lambda: None) -> list[dict[str, float]]:
    """For each pair of prompt and seed: block -> cosine similarity of its picture to the reference."""
    results = []
    for number, seed in study.pairs:
        tasks = [Task(number, seed, block) for block in (REFERENCE, *study.blocks)]
        reference, *others = scorer.features([study.picture(task) for task in tasks])
        results.append({block: float(reference @ other) for block, other in zip(study.blocks, others, strict=True)})
        on_pair()
    return results


def other_seeds(study: Study, scorer: "Scorer") -> float | None:
    """The effect of another start noise: mean 1 - similarity of two seeds' references. None with a single seed."""
    changes = []
    for number, prompt in enumerate(study.prompts):
        tasks = [Task(number, prompt.seed + j, REFERENCE) for j in range(study.seeds)]
        features = scorer.features([study.picture(task) for task in tasks])
        changes += [1 - float(a @ b) for i, a in enumerate(features) for b in features[:i]]
    return _mean(changes) if changes else None


def rows_of(study: Study, similar: Sequence[dict[str, float]]) -> list[Row]:
    """The rows of the table, in the order of the blocks. similar: of `similarities`."""
    return [_row(i, block, study.seeds, [1 - pair[block] for pair in similar]) for i, block in enumerate(study.blocks)]


def _row(layer: int, block: str, seeds: int, values: list[float]) -> Row:
    by_prompt = [values[i : i + seeds] for i in range(0, len(values), seeds)]
    means = [_mean(group) for group in by_prompt]
    half = 1.96 * _deviation(means) / math.sqrt(len(means))
    within = math.sqrt(_mean([_deviation(group) ** 2 for group in by_prompt])) if seeds > 1 else None
    return Row(block, layer, _mean(values), _deviation(values), half, within)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; nan for a single value."""
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def choose(rows: Sequence[Row], top: int | None = None, threshold: float | None = None) -> tuple[list[str], float]:
    """The vital blocks, in order, and the threshold: those above it, or the `top` blocks and a value between them and
    the next, of equal ones the first.

    With neither, `top` is Stable Flow's share of FLUX.1-dev's blocks.
    """
    if threshold is not None:
        return [row.block for row in rows if row.importance > threshold], threshold
    ranked = sorted(rows, key=lambda row: -row.importance)
    top = min(round(SHARE * len(rows)) if top is None else top, len(rows))
    last, next_ = (ranked[i].importance if i < len(rows) else 0.0 for i in (top - 1, top))
    vital = {row.block for row in ranked[:top]}
    return [row.block for row in rows if row.block in vital], (last + next_) / 2


def csv_of(rows: Sequence[Row]) -> str:
    """The table as CSV, with six decimals."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6f}" if isinstance(value, float) else value for key, value in asdict(row).items()}
        for row in rows
    )
    return table.getvalue()


def json_rows(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries for JSON, with None for nan."""
    for row in rows:
        values = asdict(row).items()
        yield {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values}
